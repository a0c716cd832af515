"""What is seen of a run while it goes on: a live display, or plain lines where there is no terminal."""

import atexit
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from rich import get_console
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress import Progress
from rich.table import Table
from transformers import TrainerCallback

from r2ec_trl.cli.terminal import WorkDisplay, is_plain, make_bar, printable, say
from r2ec_trl.training.health import finite_number, selection_figure

# Display: metric -> (words, format). `rewards/*/mean` follows the reward by itself.
FIGURES = {
    "loss": ("loss", "{:.4f}"),
    "reward": ("reward", "{:.4f}"),
    "rollout/no_signal": ("groups without signal", "{:.0%}"),
    "completions/mean_length": ("tokens a rollout", "{:.1f}"),
    "completions/clipped_ratio": ("cut at the limit", "{:.0%}"),
    "rollout/missing_marker": ("marker missing", "{:.0%}"),
    "item/loss": ("item loss", "{:.4f}"),
    "item/mean_pairwise_cosine": ("cosine of random items", "{:.2f}"),
    "grad_norm": ("gradient norm", "{:.3g}"),
    "recommendation/hit@10": ("training Hit@10", "{:.3f}"),
}
BAR_WIDTH = 24


class RecPOProgressCallback(TrainerCallback):
    """
    Live display of a run: progress, losses, reward parts, lengths, where the time goes, validation (the figure that
    `selection_mask` chooses) and the newest rollouts with their top items. Where stdout is no terminal, one plain
    line each `logging_steps`. Main process only.

    Args:
        rollout (`Callable[[], dict]`, *optional*):
            Gives the rollout to show at each log, e.g. `lambda: trainer.last_rollout_example`. Keys: `user_id`,
            `history_titles`, `reasoning`, `target_title`, `rank`, `top_titles`.
        console (`rich.console.Console`, *optional*):
            Where to draw. Defaults to stdout.
        shown (`int`, *optional*, defaults to `1`):
            How many of the newest rollouts are shown.
    """

    def __init__(
        self,
        rollout: Callable[[], Mapping[str, Any]] | None = None,
        console: Console | None = None,
        shown: int = 1,
    ):
        self.rollout = rollout
        self.console = console or get_console()
        self.figures: dict[str, float] = {}
        self.best_ndcg: float | None = None
        self._examples: deque[Mapping[str, Any]] = deque(maxlen=shown)
        self._metric, self._words = selection_figure(None)
        self._live: Live | None = None
        self._bar: Progress | None = None
        self._work: WorkDisplay | None = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._metric, self._words = selection_figure(getattr(args, "selection_metric", None))
        if not state.is_world_process_zero or is_plain(self.console):
            return
        self._bar = make_bar(self.console)
        self._bar.add_task("step", total=state.max_steps, completed=state.global_step)
        self._live = Live(self._render(), console=self.console, refresh_per_second=2)
        self._live.start()
        self._work = WorkDisplay(console=self.console, bar=self._bar).__enter__()
        atexit.register(self.close)  # an exception skips on_train_end: give the cursor back all the same

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if not state.is_world_process_zero or not logs:
            return
        new = {name: number for name, value in logs.items() if (number := finite_number(value)) is not None}
        self.figures.update(new)
        if self._metric in new:
            self.best_ndcg = max(new[self._metric], self.best_ndcg or 0.0)
        if self.rollout is not None:
            self._keep(self.rollout())
        if self._live is not None:
            self._live.update(self._render())
        else:
            self._print_line(state, new)

    def show_rollout(self, example: Mapping[str, Any]) -> None:
        """Show this rollout from now on (for a caller that gives no `rollout` function)."""
        self._keep(example)
        if self._live is not None:
            self._live.update(self._render())

    def _keep(self, example: Mapping[str, Any] | None) -> None:
        if example and (not self._examples or example != self._examples[-1]):
            self._examples.append(example)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.close()

    def close(self) -> None:
        """Leave the last picture on the terminal and give it back."""
        atexit.unregister(self.close)
        if self._work is not None:
            self._work.__exit__()
        if self._live is not None:
            self._live.stop()
        self._live = self._bar = self._work = None

    def _rows(self, figures: Mapping[str, float]) -> list[tuple[str, str]]:
        rows = []
        for name, (words, form) in {**FIGURES, self._metric: (self._words, "{:.4f}")}.items():
            if name in figures:
                rows.append((words, form.format(figures[name])))
            if name == "reward":
                parts = [key for key in figures if key.startswith("rewards/") and key.endswith("/mean")]
                rows += [(printable(key.split("/")[1]), f"{figures[key]:.4f}") for key in parts if len(parts) > 1]
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
        say(f"step {state.global_step}/{state.max_steps} | " + " | ".join(words), self.console)
        for example in self._examples if self._metric in new else ():
            for name, text in _rollout_rows(example):
                say(f"  {name}: {text}", self.console)

    def _render(self) -> RenderableType:
        figures = Table.grid(padding=(0, 2))
        figures.add_column(style="cyan", no_wrap=True)
        figures.add_column(justify="right", no_wrap=True)
        for words, value in self._rows(self.figures):
            figures.add_row(escape(words), value)
        if self.best_ndcg is not None:
            figures.add_row(f"[bold]best {self._words}", f"[bold]{self.best_ndcg:.4f}")
        times = Table.grid(padding=(0, 1))
        seconds = self._seconds(self.figures)
        total = sum(seconds.values()) or 1.0
        for part, spent in sorted(seconds.items(), key=lambda pair: -pair[1]):
            bar = "█" * round(BAR_WIDTH * max(spent, 0.0) / total)
            times.add_row(f"[cyan]{escape(part)}", f"{spent:.2f} s", f"{spent / total:.0%}", f"[green]{bar}")
        both = Table.grid(padding=(0, 4))
        both.add_row(figures if self.figures else "waiting for the first log ...", times)
        parts: list[RenderableType] = [self._bar, both] if self._bar is not None else [both]
        for example in self._examples:
            rollout = Table.grid(padding=(0, 2))
            rollout.add_column(style="cyan", no_wrap=True)
            rollout.add_column(overflow="fold")
            for row in _rollout_rows(example):
                rollout.add_row(*map(escape, row))
            parts.append(Panel(rollout, title="one rollout", title_align="left", border_style="dim"))
        return Panel(Group(*parts), title="RecPO", title_align="left")


def _rollout_rows(example: Mapping[str, Any]) -> list[tuple[str, str]]:
    history = [str(title) for title in example.get("history_titles", [])]
    shown = ["…", *history[-5:]] if len(history) > 5 else history
    rows = [
        (f"user {example.get('user_id', '?')}", ", ".join(shown)),
        ("reasoning", " ".join(str(example.get("reasoning", "")).split())),
        (f"target, rank {example.get('rank', '?')}", str(example.get("target_title", ""))),
        ("top items", ", ".join(str(title) for title in example.get("top_titles", [])[:5])),
    ]
    return [(printable(words), printable(text)) for words, text in rows]
