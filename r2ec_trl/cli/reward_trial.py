"""What rewards made of kept rollouts, as tables: rendering alone."""

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from r2ec_trl.cli.terminal import printable


def trial_table(found: Mapping[str, Any]) -> Table:
    """A line a reward of [`~r2ec_trl.evaluation.reward_trial.try_rewards`]."""
    table = Table(title="Rewards on the same rollouts", caption="correlations: Spearman; signal: within groups")
    table.add_column("reward")
    for name in ("mean", "spread in a group", "groups without signal", "with fused", "with rank", "not applicable"):
        table.add_column(name, justify="right")
    for name, one in found.items():
        figures = (_number(one["mean"]), _number(one["spread"]), f"{one['without_signal']:.0%}")
        correlations = (_number(one["with_fused"], "+.2f"), _number(one["with_rank"], "+.2f"))
        table.add_row(escape(printable(name)), *figures, *correlations, f"{one['not_applicable']:.0%}")
    return table


def examples(name: str, one: Mapping[str, Any]) -> Table:
    """The rollouts that a reward would push up and down."""
    table = Table(title=f"{escape(printable(name))} would push up and down")
    for column in ("advantage", "reward", "rank", "user", "reasoning"):
        table.add_column(column, justify="left" if column in ("user", "reasoning") else "right")
    for way in ("up", "down"):
        for row in one[way]:
            words = [escape(printable(" ".join(str(row[key]).split()))) for key in ("user_id", "completion")]
            table.add_row(f"{row['advantage']:+.3f}", f"{row['reward']:.3f}", str(row["rank"]), *words)
        table.add_section()
    return table


def _number(value: float | None, digits: str = ".3f") -> str:
    return "–" if value is None else format(value, digits)
