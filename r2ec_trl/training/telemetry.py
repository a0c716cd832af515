"""What is logged beside TRL's figures: rollout ends, table, ranks, gradient norms of both terms, time split."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainerCallback

from r2ec_trl.items.scoring import CatalogueScores
from r2ec_trl.items.table import ItemTable
from r2ec_trl.metrics import ndcg_at_k
from r2ec_trl.policy.rollouts import Rollout
from r2ec_trl.training.objective import mean_pairwise_cosine
from r2ec_trl.training.process_watch import ProcessWatch

NUM_WATCHED_ROWS = 256  # fixed rows whose mean pairwise cosine is logged
PARTS = ("generate", "sync", "score", "items")  # of a step; the rest of it is "train"


class Telemetry(TrainerCallback):
    """
    Looks at a run and changes nothing of it: fills the series that the trainer logs, knows what the run is doing and
    how long each part of a step takes. [`~r2ec_trl.training.health.HealthCallback`] warns on these figures.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Gathers figures of all processes.
        step (`Callable[[], int]`):
            Gives the number of optimizer steps taken.
        series (`dict[str, list[float]]`, *optional*):
            Where figures go until they are logged (TRL's own).
        watch_steps (`int`, *optional*, defaults to 0):
            Every so many steps the costly figures are measured; 0 never.
        num_rollouts (`int`, *optional*, defaults to 1):
            How many rollouts of a generation batch are kept for display, each of another user.

    Attributes:
        phase (`str`): what the run is doing, a key of [`~r2ec_trl.training.faults.MEMORY_KNOBS`].
        watch ([`~r2ec_trl.training.process_watch.ProcessWatch`], *optional*): tells the other processes.
        last_rollouts (`list[dict]`): rollouts with their users, ranks and top items, for display.
    """

    def __init__(
        self,
        accelerator: Any,
        step: Callable[[], int],
        series: dict[str, list[float]] | None = None,
        watch_steps: int = 0,
        num_rollouts: int = 1,
    ):
        self.accelerator, self.step, self.watch_steps = accelerator, step, watch_steps
        self.num_rollouts = num_rollouts
        self.series: dict[str, list[float]] = defaultdict(list) if series is None else series
        self.phase = "train"
        self.watch: ProcessWatch | None = None
        self.last_rollouts: list[dict[str, Any]] = []
        self.train_ndcg: list[float] = []  # of generation batches since the last evaluation
        self._seconds: dict[str, float] = defaultdict(float)  # of the step's parts so far
        self._normed_step: int | None = None

    # -------------------------------------------------------------------- time
    def come_to(self, phase: str) -> None:
        """The run has come to a phase: an error now belongs to it, and the other processes can see it."""
        self.phase = phase
        if self.watch is not None:
            self.watch.beat(f"'{phase}' of step {self.step()}")

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Around a part of a step: its seconds are logged, those of a part within it with that one alone; an error
        leaves the phase where it is."""
        before, start, counted = self.phase, time.perf_counter(), sum(self._seconds.values())
        self.come_to(part)
        yield
        self.come_to(before)
        self._seconds[part] += time.perf_counter() - start - (sum(self._seconds.values()) - counted)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.series.get("step_time"):  # TRL's, of the step that ends
            parts = {part: self._seconds[part] for part in PARTS}
            parts["train"] = self.series["step_time"][-1] - sum(parts.values())
            for part, seconds in parts.items():
                self.series[f"time/{part}"].append(seconds)
        self._seconds.clear()

    # ----------------------------------------------------------------- figures
    @property
    def is_watched_step(self) -> bool:
        """Whether the costly figures are due."""
        return self.watch_steps > 0 and self.step() % self.watch_steps == 0

    def add(self, **figures: float) -> None:
        """Append each figure to its series."""
        for name, value in figures.items():
            self.series[name].append(value)

    def rollouts(self, rollouts: Sequence[Rollout]) -> None:
        """Missing markers, overflowing ones, and TRL's lengths, which look for an end-of-sequence id, set right."""
        rows = [[not r.has_marker, r.overflows, r.truncated, sum(r.trained)] for r in rollouts]
        flags = self.accelerator.gather(torch.tensor(rows, dtype=torch.float32, device=self.accelerator.device))
        lengths = flags[:, 3]
        ended = lengths[flags[:, 2] == 0]
        ended = ended if len(ended) else torch.zeros(1, device=flags.device)
        for column, name in enumerate(("missing_marker", "marker_overflow")):
            self.series[f"rollout/{name}"].append(flags[:, column].mean().item())
        self.series["completions/clipped_ratio"][-1] = flags[:, 2].mean().item()
        for name, values in (("length", lengths), ("terminated_length", ended)):
            self.series[f"completions/mean_{name}"][-1] = values.mean().item()
            self.series[f"completions/min_{name}"][-1] = values.min().item()
            self.series[f"completions/max_{name}"][-1] = values.max().item()

    def table(
        self,
        table: ItemTable,
        candidates: Sequence[int],
        stale: torch.Tensor | None,
        stale_rank: torch.Tensor | None,
        rank: torch.Tensor,
    ) -> None:
        """
        How alike the rows are, how far the targets' rows had drifted, and how much their ranks gain from being fresh
        among stale ones.

        Args:
            table ([`~r2ec_trl.items.table.ItemTable`]), candidates:
                The table with the targets' rows fresh, and which rows these are.
            stale, stale_rank (`torch.Tensor`, *optional*):
                The targets' rows before, `(C, d)`, and the ranks they gave, `(B*G,)`; `None` where every row is fresh.
            rank (`torch.Tensor` of shape `(B*G,)`):
                The ranks now.
        """
        watched = range(0, len(table), max(1, len(table) // NUM_WATCHED_ROWS))[:NUM_WATCHED_ROWS]
        drift, gain = 0.0, 0.0
        if stale is not None and stale_rank is not None:
            drift = 1 - torch.nn.functional.cosine_similarity(stale, table.take(candidates), dim=1).mean().item()
            gain = (stale_rank.log() - rank.log()).mean().item()
        cosine = mean_pairwise_cosine(table.take(watched)).item()
        self.add(**{"item/mean_pairwise_cosine": cosine, "table/target_drift": drift, "table/fresh_rank_gain": gain})

    def recommendations(
        self, titles: dict[str, str], rows: Sequence[dict[str, Any]], texts: Sequence[str], scores: CatalogueScores
    ) -> None:
        """
        Ranks of all processes' targets, and rollouts to show.

        Args:
            titles (`dict[str, str]`):
                Title of each item id.
            rows, texts:
                Users with what their rewards see, and their reasonings.
            scores ([`~r2ec_trl.items.scoring.CatalogueScores`]):
                Ranks of the targets.
        """
        ranks = self.accelerator.gather(scores.rank.float())
        hits = (ranks <= 10).float().mean().item()
        gain = float(ndcg_at_k(ranks.long().cpu().numpy(), 10).mean())
        self.train_ndcg.append(gain)
        self.add(**{"recommendation/hit@10": hits, "recommendation/mean_log_rank": ranks.log().mean().item()})
        self.add(**{"recommendation/ndcg@10": gain})
        first = {row["user_id"]: at for at, row in reversed(list(enumerate(rows)))}  # one rollout a user
        self.last_rollouts = [
            {
                "user_id": rows[at]["user_id"],
                "history_titles": [titles[item_id] for item_id in rows[at]["history"]],
                "reasoning": texts[at],
                "target_title": titles[rows[at]["target"]],
                "rank": rows[at]["target_rank"],
                "top_titles": [titles[item_id] for item_id in rows[at]["top_item_ids"]],
            }
            for at in sorted(first.values())[: self.num_rollouts]
        ]

    def item(self, loss: torch.Tensor, logprob: torch.Tensor | None, clip_ratio: torch.Tensor | None) -> None:
        """The item term of a micro-batch: a loss of 0 and no other figure where it has no row."""
        for name, value in (("loss", loss), ("clip_ratio", clip_ratio), ("logprob", logprob)):
            if value is not None:
                self.series[f"item/{name}"].append(value.item())

    def gradient_norms(self, parameters: Iterator[torch.nn.Parameter], **losses: torch.Tensor) -> None:
        """Gradient norm of each loss alone, once a watched step; the backward of their sum comes later."""
        if self._normed_step == self.step():
            return
        self._normed_step = self.step()
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        for name, loss in losses.items():
            gradients = torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True)
            squares = [gradient.float().square().sum() for gradient in gradients if gradient is not None]
            self.series[f"grad_norm/{name}"].append(torch.stack(squares).sum().sqrt().item())
