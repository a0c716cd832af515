"""What RecPO logs beside TRL's figures: rollout ends, table, ranks, gradient norms of both terms, time split."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from r2ec_trl.items.scoring import CatalogueScores
from r2ec_trl.policy.rollouts import Rollout
from r2ec_trl.training.objective import mean_pairwise_cosine

if TYPE_CHECKING:
    from trl import GRPOTrainer as _Base
else:
    _Base = object

NUM_WATCHED_ROWS = 256  # fixed rows whose mean pairwise cosine is logged


class RecPOMetrics(_Base):
    """
    Mixin of [`~r2ec_trl.training.recpo_trainer.RecPOTrainer`] that only looks: it fills `_metrics` and never touches a
    loss.

    `log` is overridden to add the time of the training part;
    [`~r2ec_trl.training.health.HealthCallback`] warns on these
    figures.
    """

    args: Any
    prompts: Any
    table: Any
    _candidates: list[int]
    _normed_step: int | None = None
    last_rollout_example: dict[str, Any]

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        self.come_to(part)
        yield
        self.come_to("train")
        self._metrics["train"][f"time/{part}"].append(time.perf_counter() - start)

    def _log_rollouts(self, rollouts: list[Rollout]) -> None:
        """Missing markers, overflowing ones, and TRL's truncation figures, which look for an end-of-sequence id."""
        rows = [[not r.has_marker, r.overflows, r.truncated, sum(r.trained)] for r in rollouts]
        flags = self.accelerator.gather(torch.tensor(rows, dtype=torch.float32, device=self.accelerator.device))
        ended = flags[flags[:, 2] == 0, 3]
        ended = ended if len(ended) else torch.zeros(1, device=flags.device)
        metrics = self._metrics["train"]
        metrics["rollout/missing_marker"].append(flags[:, 0].mean().item())
        metrics["rollout/marker_overflow"].append(flags[:, 1].mean().item())
        metrics["completions/clipped_ratio"][-1] = flags[:, 2].mean().item()
        metrics["completions/mean_terminated_length"][-1] = ended.mean().item()
        metrics["completions/min_terminated_length"][-1] = ended.min().item()
        metrics["completions/max_terminated_length"][-1] = ended.max().item()

    def _log_table(self, stale: torch.Tensor | None, score: Callable, states: torch.Tensor) -> None:
        """How far the targets' rows had drifted, and how much their ranks gain from being fresh among stale ones."""
        watched = range(0, len(self.table), max(1, len(self.table) // NUM_WATCHED_ROWS))[:NUM_WATCHED_ROWS]
        figures = {"item/mean_pairwise_cosine": mean_pairwise_cosine(self.table.take(watched)).item()}
        drift, gain = 0.0, 0.0
        if stale is not None:
            fresh = self.table.take(self._candidates)
            drift = 1 - torch.nn.functional.cosine_similarity(stale, fresh, dim=1).mean().item()
            after = score(states).rank
            self.table.put(self._candidates, stale)
            gain = (score(states).rank.log() - after.log()).mean().item()
            self.table.put(self._candidates, fresh)
        figures.update({"table/target_drift": drift, "table/fresh_rank_gain": gain})
        for name, value in figures.items():
            self._metrics["train"][name].append(value)

    def _log_recommendations(self, inputs, completions, scores: CatalogueScores, extra: list[dict]) -> None:
        ranks = self.accelerator.gather(scores.rank.float())
        self._metrics["train"]["recommendation/hit@10"].append((ranks <= 10).float().mean().item())
        self._metrics["train"]["recommendation/mean_log_rank"].append(ranks.log().mean().item())
        titles = self.prompts.titles
        text = completions[0] if isinstance(completions[0], str) else completions[0][0]["content"]
        self.last_rollout_example = {
            "user_id": inputs[0]["user_id"],
            "history_titles": [titles[item_id] for item_id in inputs[0]["history"]],
            "reasoning": text,
            "target_title": titles[inputs[0]["target"]],
            "rank": extra[0]["target_rank"],
            "top_titles": [titles[item_id] for item_id in extra[0]["top_item_ids"]],
        }

    def _is_watched_step(self) -> bool:
        return self.args.watch_steps > 0 and self.state.global_step % self.args.watch_steps == 0

    def _log_gradient_norms(self, token_loss: torch.Tensor, item_loss: torch.Tensor) -> None:
        """
        Gradient norms of both terms apart, once a watched step, of its first micro-batch with an item term (not under
        DeepSpeed or reentrant checkpointing, whose hooks forbid a second backward).
        """
        reentrant = (self.args.gradient_checkpointing_kwargs or {}).get("use_reentrant", False)
        done = self._normed_step == self.state.global_step
        if done or self.is_deepspeed_enabled or (self.args.gradient_checkpointing and reentrant):
            return
        self._normed_step = self.state.global_step
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        for name, loss in (("token", token_loss), ("item", item_loss)):
            gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            squares = [gradient.float().square().sum() for gradient in gradients if gradient is not None]
            self._metrics["train"][f"grad_norm/{name}"].append(torch.stack(squares).sum().sqrt().item())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As TRL's, with seconds an optimizer step: `time/train` is what generation, scoring and items leave of it."""
        series = self._metrics["train"]
        if self.model.training and series.get("step_time"):
            steps = len(series["step_time"])
            parts = {part: sum(series[f"time/{part}"]) / steps for part in ("generate", "sync", "score", "items")}
            parts["generate"] -= parts["sync"]  # TRL gives vLLM the weights inside
            parts["train"] = sum(series["step_time"]) / steps - sum(parts.values())
            series.update({f"time/{part}": [seconds] for part, seconds in parts.items()})
        super().log(logs, start_time)
