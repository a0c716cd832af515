"""What is seen of a run: a live display, the learning curve on disk, and warnings that name the cure."""

import atexit
import json
import logging
import math
import os
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from transformers import TrainerCallback

logger = logging.getLogger(__name__)

VALIDATION_NDCG = "eval_recommendation/ndcg@10"

# Display: metric -> (words, format). `rewards/*/mean` follows the reward by itself.
FIGURES = {
    "loss": ("loss", "{:.4f}"),
    "reward": ("reward", "{:.4f}"),
    "frac_reward_zero_std": ("groups without signal", "{:.0%}"),
    "completions/mean_length": ("tokens a rollout", "{:.1f}"),
    "completions/clipped_ratio": ("cut at the limit", "{:.0%}"),
    "rollout/missing_marker": ("marker missing", "{:.0%}"),
    "item/loss": ("item loss", "{:.4f}"),
    "item/mean_pairwise_cosine": ("cosine of random items", "{:.2f}"),
    "grad_norm": ("gradient norm", "{:.3g}"),
    "recommendation/hit@10": ("training Hit@10", "{:.3f}"),
    VALIDATION_NDCG: ("validation NDCG@10", "{:.4f}"),
}
BAR_WIDTH = 24

# Health. Each threshold is compared with the mean of the last HEALTH_WINDOW logged values, once there are
# HEALTH_MINIMUM of them: a single batch of few users is too noisy to warn of.
HEALTH_WINDOW = 3
HEALTH_MINIMUM = 2
# Measured with the item term averaged over rows: item gradients of 3-22 against .17 dissolved the text.
GRADIENT_RATIO = 10.0
# Appended markers are not trained on: with a third of them, much of the reward is not the policy's doing.
MISSING_MARKER = 0.3
# A cut rollout never reached its conclusion; beyond half, the limit decides what is rewarded.
CLIPPED = 0.5
# Groups whose rewards are all equal have zero advantage: half of the rollouts are paid for and teach nothing.
ZERO_STD = 0.5
# An untrained language model's rows start near .98 and fall while they learn to differ; staying above .95, or rising
# by .2 from the start, means that the items collapse onto one direction.
COSINE = 0.95
COSINE_RISE = 0.2
COSINE_GRACE = 10  # logged values before a high, falling cosine counts as a collapse
# Mean log-rank that fresh target rows gain among stale ones: .5 is a rank 1.6 times better for no learning at all.
FRESH_RANK_GAIN = 0.5
# Mean |log-prob of the sampler - log-prob of the trainer| a token; bf16 noise of a merged adapter stays near .04.
SAMPLING_DIFFERENCE = 0.1
# One item first for a third of the users is a popularity list (34 % was seen in a collapsed run of a peer).
TOP1_SHARE = 0.3


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


class RecPOProgressCallback(TrainerCallback):
    """
    Live display of a run: progress, losses, reward parts, lengths, where the time goes, validation and one rollout
    with its top items. Where stdout is no terminal, one plain line each `logging_steps`. Main process only.

    Args:
        rollout (`Callable[[], dict]`, *optional*):
            Gives the rollout to show at each log, e.g. `lambda: trainer.last_rollout_example`. Keys: `user_id`,
            `history_titles`, `reasoning`, `target_title`, `rank`, `top_titles`.
        console (`rich.console.Console`, *optional*):
            Where to draw. Defaults to stdout.
    """

    def __init__(self, rollout: Callable[[], Mapping[str, Any]] | None = None, console: Console | None = None):
        self.rollout = rollout
        self.console = console or Console()
        self.figures: dict[str, float] = {}
        self.best_ndcg: float | None = None
        self._example: Mapping[str, Any] = {}
        self._live: Live | None = None
        self._bar: Progress | None = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if not state.is_world_process_zero or not self.console.is_terminal or self.console.is_dumb_terminal:
            return
        words = TextColumn("[bold]{task.description}")
        self._bar = Progress(words, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self._bar.add_task("step", total=state.max_steps, completed=state.global_step)
        self._live = Live(self._render(), console=self.console, refresh_per_second=2)
        self._live.start()
        atexit.register(self.close)  # an exception skips on_train_end: give the cursor back all the same

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if not state.is_world_process_zero or not logs:
            return
        new = {name: number for name, value in logs.items() if (number := _number(value)) is not None}
        self.figures.update(new)
        if VALIDATION_NDCG in new:
            self.best_ndcg = max(new[VALIDATION_NDCG], self.best_ndcg or 0.0)
        if self.rollout is not None:
            self._example = self.rollout() or {}
        if self._live is not None:
            self._live.update(self._render())
        else:
            self._print_line(state, new)

    def show_rollout(self, example: Mapping[str, Any]) -> None:
        """Show this rollout from now on (for a caller that gives no `rollout` function)."""
        self._example = example
        if self._live is not None:
            self._live.update(self._render())

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.close()

    def close(self) -> None:
        """Leave the last picture on the terminal and give it back."""
        atexit.unregister(self.close)
        if self._live is not None:
            self._live.stop()
        self._live = self._bar = None

    def _rows(self, figures: Mapping[str, float]) -> list[tuple[str, str]]:
        rows = []
        for name, (words, form) in FIGURES.items():
            if name in figures:
                rows.append((words, form.format(figures[name])))
            if name == "reward":
                parts = [key for key in figures if key.startswith("rewards/") and key.endswith("/mean")]
                rows += [(key.split("/")[1], f"{figures[key]:.4f}") for key in parts if len(parts) > 1]
        return rows

    @staticmethod
    def _seconds(figures: Mapping[str, float]) -> dict[str, float]:
        return {name.removeprefix("time/"): value for name, value in figures.items() if name.startswith("time/")}

    def _print_line(self, state, new: Mapping[str, float]) -> None:
        words = [f"{words} {value}" for words, value in self._rows(new)]
        if seconds := self._seconds(new):
            words.append("seconds a step: " + ", ".join(f"{part} {value:.2f}" for part, value in seconds.items()))
        if not words:
            return
        lines = [f"step {state.global_step}/{state.max_steps} | " + " | ".join(words)]
        if VALIDATION_NDCG in new and self._example:
            lines += [f"  {words}: {text}" for words, text in _rollout_rows(self._example)]
        for line in lines:
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _render(self) -> RenderableType:
        figures = Table.grid(padding=(0, 2))
        figures.add_column(style="cyan", no_wrap=True)
        figures.add_column(justify="right", no_wrap=True)
        for words, value in self._rows(self.figures):
            figures.add_row(escape(words), value)
        if self.best_ndcg is not None:
            figures.add_row("[bold]best validation NDCG@10", f"[bold]{self.best_ndcg:.4f}")
        times = Table.grid(padding=(0, 1))
        seconds = self._seconds(self.figures)
        total = sum(seconds.values()) or 1.0
        for part, spent in sorted(seconds.items(), key=lambda pair: -pair[1]):
            bar = "█" * round(BAR_WIDTH * max(spent, 0.0) / total)
            times.add_row(f"[cyan]{escape(part)}", f"{spent:.2f} s", f"{spent / total:.0%}", f"[green]{bar}")
        both = Table.grid(padding=(0, 4))
        both.add_row(figures if self.figures else "waiting for the first log ...", times)
        parts: list[RenderableType] = [self._bar, both] if self._bar is not None else [both]
        if self._example:
            rollout = Table.grid(padding=(0, 2))
            rollout.add_column(style="cyan", no_wrap=True)
            rollout.add_column(overflow="fold")
            for words, text in _rollout_rows(self._example):
                rollout.add_row(words, escape(text))
            parts.append(Panel(rollout, title="one rollout", title_align="left", border_style="dim"))
        return Panel(Group(*parts), title="RecPO", title_align="left")


def _rollout_rows(example: Mapping[str, Any]) -> list[tuple[str, str]]:
    history = [str(title) for title in example.get("history_titles", [])]
    shown = ["…", *history[-5:]] if len(history) > 5 else history
    return [
        (f"user {example.get('user_id', '?')}", ", ".join(shown)),
        ("reasoning", " ".join(str(example.get("reasoning", "")).split())),
        (f"target, rank {example.get('rank', '?')}", str(example.get("target_title", ""))),
        ("top items", ", ".join(str(title) for title in example.get("top_titles", [])[:5])),
    ]


class LearningCurveCallback(TrainerCallback):
    """
    Writes `learning_curve.png` and `log_history.json` to the output folder at each evaluation and at the end:
    validation NDCG@10, reward, share of missing markers, tokens a rollout. A file is written beside, then renamed.
    """

    PANELS = {
        VALIDATION_NDCG: "validation NDCG@10",
        "reward": "training reward",
        "rollout/missing_marker": "share of missing markers",
        "completions/mean_length": "tokens a rollout",
    }

    def on_evaluate(self, args, state, control, **kwargs) -> None:
        self._write(args, state)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self._write(args, state)

    def _write(self, args, state) -> None:
        if not state.is_world_process_zero or not state.log_history:
            return
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        history = [{key: None if value != value else value for key, value in row.items()} for row in state.log_history]
        text = json.dumps(history, indent=1, default=float) + "\n"
        _write_whole(folder / "log_history.json", lambda path: path.write_text(text, encoding="utf-8"))
        figure = self.draw(history)
        _write_whole(folder / "learning_curve.png", lambda path: figure.savefig(path, dpi=110, format="png"))

    def draw(self, history: list[dict[str, Any]]) -> Figure:
        """
        The figure of a `log_history`.

        Args:
            history (`list[dict]`):
                `state.log_history`, or the content of `log_history.json`.

        Returns:
            `matplotlib.figure.Figure`: One panel a series; a series that was never logged says so.
        """
        figure = Figure(figsize=(9, 6), layout="constrained")
        for axes, (name, title) in zip(figure.subplots(2, 2).flat, self.PANELS.items()):
            points = [
                (row["step"], number)
                for row in history
                if "step" in row and (number := _number(row.get(name))) is not None
            ]
            axes.set_title(title)
            axes.set_xlabel("optimizer step")
            axes.grid(alpha=0.3)
            if not points:
                axes.text(0.5, 0.5, "not logged", ha="center", va="center", transform=axes.transAxes)
                continue
            steps, values = zip(*points)
            axes.plot(steps, values, marker="o" if name == VALIDATION_NDCG else None, markersize=4)
            if name == "rollout/missing_marker":
                axes.set_ylim(-0.02, 1.02)
        return figure


def _write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


class Rule(NamedTuple):
    """A warning: `metric` above `limit` on average; `warning` is formatted with the value."""

    metric: str
    limit: float
    warning: str


RULES = (
    Rule(
        "rollout/missing_marker",
        MISSING_MARKER,
        "{:.0%} of the rollouts never write the answer marker; raise --max_completion_length, lower --temperature "
        "or --learning_rate, or warm-start the policy on reasonings that end with the marker.",
    ),
    Rule(
        "completions/clipped_ratio",
        CLIPPED,
        "{:.0%} of the rollouts are cut at the length limit; raise --max_completion_length, lower --temperature, or "
        "set --mask_truncated_completions.",
    ),
    Rule(
        "frac_reward_zero_std",
        ZERO_STD,
        "{:.0%} of the groups have equal rewards and teach nothing; raise --num_generations or --temperature, or mix "
        "in a denser reward (--reward_funcs fused, a larger --reward_cutoff).",
    ),
    Rule(
        "table/fresh_rank_gain",
        FRESH_RANK_GAIN,
        "target rows gain {:.2f} in mean log-rank merely by being fresh among stale rows, so the reward flatters; "
        "raise --table_refresh_budget (1.0 re-encodes the whole table before each reward pass).",
    ),
    Rule(
        "sampling/sampling_logp_difference/mean",
        SAMPLING_DIFFERENCE,
        "the sampler's log-probs differ from the trainer's by {:.2f} a token, so it is not the policy being trained; "
        "use one dtype for both (--bf16) and check that the weights are synchronised.",
    ),
    Rule(
        "recommendation/top1_share",
        TOP1_SHARE,
        "one item is first for {:.0%} of the users; lower --learning_rate or --item_coef, or go back to an earlier "
        "checkpoint.",
    ),
)


class HealthCallback(TrainerCallback):
    """
    Watches the logged metrics and warns once for each cause, with the cure in the sentence. Thresholds and their
    reasons are the constants at the top of this file. Main process only; it never stops a run.
    """

    def __init__(self) -> None:
        self.warned: set[str] = set()
        self._recent: dict[str, deque[float]] = {}
        self._cosines: list[float] = []

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if not state.is_world_process_zero or not logs:
            return
        for rule in RULES:
            mean = self._mean(rule.metric, logs.get(rule.metric))
            if mean is not None and mean > rule.limit:
                self._warn(rule.metric, rule.warning.format(mean), state)
        self._check_gradients(logs, state)
        self._check_cosine(logs, state)

    def _mean(self, name: str, value: Any) -> float | None:
        """Mean of the last few values with this one; `None` while there are too few, or where this log has none."""
        number = _number(value)
        if number is None:
            return None
        recent = self._recent.setdefault(name, deque(maxlen=HEALTH_WINDOW))
        recent.append(number)
        return sum(recent) / len(recent) if len(recent) >= HEALTH_MINIMUM else None

    def _check_gradients(self, logs: Mapping[str, Any], state) -> None:
        token, item = (self._mean(name, logs.get(name)) for name in ("grad_norm/token", "grad_norm/item"))
        if token and item and item > GRADIENT_RATIO * token:
            self._warn(
                "grad_norm/item",
                f"the item term's gradient ({item:.3g}) is {item / token:.0f} times the tokens' ({token:.3g}) and "
                "will dissolve the text; lower --item_coef, or use recipes/contrastive.py for the item head alone.",
                state,
            )

    def _check_cosine(self, logs: Mapping[str, Any], state) -> None:
        number = _number(logs.get("item/mean_pairwise_cosine"))
        if number is None:
            return
        self._cosines.append(number)
        rise = number - self._cosines[0]
        stuck = len(self._cosines) > COSINE_GRACE or rise >= 0
        mean = self._mean("item/mean_pairwise_cosine", number)
        if mean is not None and ((mean > COSINE and stuck) or rise > COSINE_RISE):
            self._warn(
                "item/mean_pairwise_cosine",
                f"random items have a mean cosine of {number:.2f} ({rise:+.2f} since the start), so the catalogue is "
                "hardly told apart; warm-start with recipes/contrastive.py, lower --learning_rate, or set "
                "--item_negatives catalogue.",
                state,
            )

    def _warn(self, cause: str, sentence: str, state) -> None:
        if cause not in self.warned:
            self.warned.add(cause)
            logger.warning("step %d: %s", state.global_step, sentence)
