"""What both trainers share: the frozen policy and greedy evaluation over the whole catalogue."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import polars as pl
import torch
from datasets import Dataset
from trl.models.utils import unwrap_model_for_generation

from r2ec_trl.errors import UserError
from r2ec_trl.evaluation.users import evaluate_users, first_rows, gather_rows, own_rows, summarise_users
from r2ec_trl.items.encoding import make_encoder, share_encoding
from r2ec_trl.items.table import ItemTable
from r2ec_trl.policy.batching import check_length
from r2ec_trl.policy.prompts import Prompts
from r2ec_trl.policy.rollouts import Rollout
from r2ec_trl.training.inputs import check_eval_users
from r2ec_trl.training.telemetry import Telemetry

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


class GreedyEvaluation(_Base):
    """
    Mixin for a [`~transformers.Trainer`] with `prompts`, `table` and our shared arguments: `evaluate` reasons greedily
    and ranks the whole catalogue, so `eval_strategy`, `load_best_model_at_end`, `metric_for_best_model` and early
    stopping work unchanged on `recommendation/ndcg@10`.
    """

    prompts: Prompts
    table: ItemTable
    telemetry: Telemetry
    reasoning = "full"

    @contextmanager
    def frozen_policy(self) -> Iterator[Any]:
        """The policy for generation and scoring: unwrapped, whole (ZeRO-3), without gradient or checkpointing."""
        with (
            torch.no_grad(),
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=getattr(self.args, "ds3_gather_for_generation", True),
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as model,
            self.accelerator.autocast(),
        ):
            yield model

    def evaluate_frame(self, dataset: Dataset, reasoning: str | None = None) -> pl.DataFrame:
        """
        One row a user, see [`~r2ec_trl.evaluation.users.evaluate_users`]; the table is re-encoded with the current
        weights first, and users are shared out over the processes.
        """
        was_training = self.model.training
        self.model.eval()
        reasoning = reasoning or self.reasoning
        dataset = dataset.with_format(None)
        mine, rollouts = self.own_users(dataset, reasoning)
        with self.frozen_policy() as model:
            self.refresh_whole_table(model)
            frame = evaluate_users(
                model,
                self.prompts,
                self.table,
                mine,
                max_new_tokens=getattr(self.args, "max_completion_length", 1),
                temperature=self.args.item_temperature,
                reasoning=reasoning,
                token_budget=self.args.forward_token_budget,
                rollouts=rollouts,
            )
        self.model.train(was_training)
        return gather_rows(frame, len(dataset))

    def check_prompts(self, users: Dataset | dict[str, Dataset] | None, most: int | None = None) -> None:
        """
        Make the user prompts of a later evaluation once, the first `most` of each set: one that is too long, for
        `max_prompt_length` or the model, is refused before anything is trained.
        """
        for part in users.values() if isinstance(users, dict) else [users] if users is not None else []:
            for user in first_rows(part, most):
                self.prompts.user_ids(user)
        completion = 0 if self.reasoning == "none" else self.args.max_completion_length
        longest = self.prompts.longest_user + len(self.prompts.marker_ids) + completion
        cures = "`max_prompt_length` or `max_completion_length`"
        check_length(self.model.config, longest, "A user prompt of an evaluation and its reasoning", cures)

    def own_users(self, dataset: Dataset, reasoning: str) -> tuple[Dataset, list[Rollout] | None]:
        """This process's share of the users, never empty, and their greedy rollouts where vLLM makes them."""
        users = own_rows(dataset, self.accelerator)
        if reasoning == "none" or not getattr(self, "use_vllm", False):
            return users, None
        prompt_ids = [self.prompts.user_ids(user) for user in users]
        return users, self.vllm_generation.greedy(self.reader, prompt_ids, self.args.max_completion_length)

    def refresh_whole_table(self, model: Any) -> None:
        """Re-encode every row with `model`, the work shared out over the processes."""
        encoder = make_encoder(model, self.prompts, self.args.forward_token_budget)
        self.table.refresh(share_encoding(encoder, self.accelerator, self.table))

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """
        Greedy reasoning and full-catalogue metrics of the validation users (at most `max_eval_users`).

        Returns:
            `dict`: `eval_recommendation/ndcg@10` and the other figures of
            [`~r2ec_trl.evaluation.users.summarise_users`].
        """
        dataset = self.eval_dataset
        if isinstance(eval_dataset, str):
            dataset = dataset.get(eval_dataset) if isinstance(dataset, dict) else None
        elif eval_dataset is not None:
            dataset = check_eval_users(eval_dataset, self.table.item_ids)
        if isinstance(dataset, dict):
            parts = [self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}") for name, part in dataset.items()]
            return {name: value for part in parts for name, value in part.items()}
        if dataset is None or len(dataset) == 0:
            raise UserError("`evaluate` has no users; give the trainer an `eval_dataset` with at least one.")
        self.telemetry.come_to("evaluate")
        figures = summarise_users(self.evaluate_frame(first_rows(dataset, self.args.max_eval_users)))
        metrics = {f"{metric_key_prefix}_recommendation/{name}": value for name, value in figures.items()}
        if gains := self.telemetry.train_ndcg:  # of sampled rollouts: what it has over validation is memory, mostly
            same = "masked_ndcg@10" if getattr(self.args, "mask_history", False) else "ndcg@10"  # mask as in training
            gap = sum(gains) / len(gains) - figures[same]
            metrics[f"{metric_key_prefix}_recommendation/train_gap"] = gap
            gains.clear()
        was_training = self.model.training
        self.model.eval()  # TRL's `log` tells training from evaluation figures by it
        self.log(metrics)
        self.model.train(was_training)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.telemetry.come_to("train")
        return metrics
