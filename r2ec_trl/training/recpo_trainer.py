"""RecPO: GRPO with the recommendation as one more action (paper §3), as a thin subclass of TRL's trainer."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl import GRPOTrainer

from r2ec_trl.errors import UserError
from r2ec_trl.items.encoding import make_encoder, make_table, share_encoding
from r2ec_trl.items.scoring import CatalogueScores, exclusion_matrix
from r2ec_trl.policy.answer_state import add_answer_state
from r2ec_trl.policy.generation import stop_generate_at_marker
from r2ec_trl.policy.prompts import Prompts
from r2ec_trl.policy.rollouts import MarkerReader
from r2ec_trl.rewards import checked_reward, load_reward
from r2ec_trl.training.checkpoints import WholeCheckpoints
from r2ec_trl.training.faults import FaultStops
from r2ec_trl.training.greedy_evaluation import GreedyEvaluation
from r2ec_trl.training.launch import check_sharding
from r2ec_trl.training.objective import candidate_logprobs, clipped_objective, item_credit_weights, rloo_factor
from r2ec_trl.training.recpo_config import RecPOConfig
from r2ec_trl.training.telemetry import RecPOMetrics
from r2ec_trl.vllm.sync import vllm_backend, watch_sampler

logger = logging.getLogger(__name__)

NUM_TOP_ITEMS = 10  # items a reward sees in `top_item_ids`


class RecPOTrainer(FaultStops, WholeCheckpoints, GreedyEvaluation, RecPOMetrics, GRPOTrainer):
    """
    Trains a policy to reason, then recommend (paper §3, M1–M7).

    Everything of [`~trl.GRPOTrainer`] stays, its losses, rewards and flags included. What is overridden, and why:

    - `_generate_single_turn`: a rollout ends at the marker, for every backend, before TRL counts and decodes it.
    - `_generate`: a missing marker is appended and masked out of the loss; TRL's truncation figures are set right.
    - `_calculate_rewards`: the table is refreshed, the batch's targets first; each row then carries `target_rank`,
      `target_prob`, `target_score`, `top_item_ids` and `num_items` for the reward functions.
    - `_generate_and_score_completions`: adds what the item term needs, and RLOO's factor n/(n-1).
    - `_get_per_token_logps_and_entropies`: keeps the answer states of the loss's own forward.
    - `_compute_loss`: adds the item term (M6, M7), normalised over the generation batch like one more token.
    - `train`, `training_step`, `_prepare_inputs` and `_get_grad_norm` (from [`FaultStops`]): out-of-memory, NaN and
      hung processes stop the run with one sentence on every rank.
    - `train`, `_save_checkpoint` and `_get_train_sampler` (from [`WholeCheckpoints`]): checkpoints are whole or not
      there, hold the table, and a resumed run sees the users that it would have seen.
    - `evaluate` (from [`GreedyEvaluation`]): TRL's samples G rollouts and averages batches; ours ranks greedily.
    - `log`: adds the time of the training part and averages of our own figures.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The policy: any causal language model.
        item_dataset ([`~datasets.Dataset`]):
            The catalogue: `item_id`, `title` and further text columns.
        reward_funcs (`Callable`, `str` or list of them, *optional*):
            TRL reward callables, or names for [`~r2ec_trl.rewards.load_reward`]. By default the fused reward (M3).
        args ([`RecPOConfig`], *optional*):
            Settings; the paper's by default.
        train_dataset, eval_dataset ([`~datasets.Dataset`]):
            Rows of `user_id`, `history`, `target` and optional columns; every column reaches the reward functions.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Trains an adapter instead of all weights.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer; loaded beside the model by default.
        callbacks, optimizers, quantization_config:
            As in TRL.

    Raises:
        [`UserError`]: for data, settings and rewards that cannot work, in one sentence.
    """

    _tag_names = ["trl", "recpo", "recommendation"]
    _name = "RecPO"
    _paper = {
        "title": "R²ec: Towards Large Recommender Models with Reasoning",
        "id": "2505.16994",
        "citation": (
            "@inproceedings{you2025r2ec,\n  title={R²ec: Towards Large Recommender Models with Reasoning},\n"
            "  author={You, Runyang and others},\n  booktitle={NeurIPS},\n  year={2025}\n}"
        ),
    }

    def __init__(
        self,
        model: str | PreTrainedModel,
        item_dataset: Dataset,
        reward_funcs: Callable | str | list[Callable | str] | None = None,
        args: RecPOConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        peft_config: Any = None,
        **kwargs,
    ):
        args = args if args is not None else RecPOConfig("recpo-output")
        if processing_class is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            processing_class = AutoTokenizer.from_pretrained(name, trust_remote_code=args.trust_remote_code)
        self.prompts = Prompts(processing_class, args.prompt_config(), item_dataset)
        self.reader = MarkerReader(processing_class, args.marker)
        self._check_data(args, train_dataset)
        if clash := [name for name in ("tools", "rollout_func", "environment_factory") if kwargs.get(name)]:
            raise UserError(
                f"RecPOTrainer takes no `{clash[0]}`: a rollout is the policy's own words; use GRPOTrainer."
            )
        check_sharding(args, peft_config is not None or hasattr(model, "peft_config"))
        # TRL tells truncation by a last end-of-sequence id, which no rollout of ours has: taken over in `_generate`
        self._mask_truncated, args.mask_truncated_completions = args.mask_truncated_completions, False
        with vllm_backend(self, args):
            super().__init__(
                model=model,
                reward_funcs=self._resolve_rewards(reward_funcs, args),
                args=args,
                train_dataset=self._with_prompts(train_dataset),
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                callbacks=callbacks,
                peft_config=peft_config,
                **kwargs,
            )
        self.chat_template_kwargs = self.prompts.chat.kwargs  # TRL renders the prompts again: under the same clock
        args.mask_truncated_completions = self._mask_truncated  # so that the saved settings say what was done
        base_model = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        add_answer_state(base_model, args.shared_prompt)
        if not self.use_vllm and not self.use_transformers_continuous_batching:
            stop_generate_at_marker(base_model, self.reader)
        slices = self.accelerator if args.slice_table else None
        self.table = make_table(self.prompts, item_dataset, args.similarity, self.accelerator.device, slices)
        self._answer_states = torch.empty(0)  # (rows, d), of the newest forward with gradient
        self.last_rollout_example: dict[str, Any] = {}

    # ------------------------------------------------------------------ set-up
    @staticmethod
    def _check_data(args: RecPOConfig, train_dataset: Dataset | None) -> None:
        if train_dataset is None or len(train_dataset) == 0:
            raise UserError("`train_dataset` is empty; give at least one generation batch of users.")
        users = args.generation_batch_size // args.num_generations
        if len(train_dataset) < users:
            raise UserError(
                f"`train_dataset` has {len(train_dataset)} users, fewer than the {users} of one generation batch "
                f"({args.generation_batch_size} rollouts / {args.num_generations} a user); lower the batch size."
            )
        if left := len(train_dataset) % users:
            logger.warning("%d of %d users do not fill a generation batch each epoch.", left, len(train_dataset))

    @staticmethod
    def _resolve_rewards(reward_funcs: Any, args: RecPOConfig) -> list[Callable]:
        specs = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs or "fused"]
        loaded = [load_reward(s, args.reward_mix, args.reward_cutoff) if isinstance(s, str) else s for s in specs]
        if args.reward_weights is not None and len(args.reward_weights) != len(loaded):
            raise UserError(f"{len(loaded)} reward functions, but {len(args.reward_weights)} `reward_weights`.")
        return [func if isinstance(func, torch.nn.Module) else checked_reward(func) for func in loaded]

    def _with_prompts(self, dataset: Dataset) -> Dataset:
        return dataset.map(
            lambda example: {"prompt": self.prompts.user_messages(example)},
            desc="User prompts",
            load_from_cache_file=False,
            new_fingerprint=self.prompts.fingerprint(dataset),  # or datasets would hash the whole model
        )

    # ---------------------------------------------------------------- rollouts
    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        with self._timed("generate"):
            completion_ids, logprobs, *rest = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        completion_ids = [self.reader.cut(ids) for ids in completion_ids]
        if logprobs is not None:
            logprobs = [row[: len(ids)] for row, ids in zip(logprobs, completion_ids, strict=True)]
        return completion_ids, logprobs, *rest

    def _generate(self, prompts: list):
        prompt_ids, sampled, tool_mask, completions, logprobs, *rest = super()._generate(prompts)
        end_ids = {*self.eos_token_ids, self._tokenizer.pad_token_id}
        rollouts = [self.reader.finish(ids, end_ids) for ids in sampled]
        tool_mask = [rollout.trained for rollout in rollouts]
        if self._mask_truncated:
            tool_mask = [[0] * len(r.ids) if r.truncated else r.trained for r in rollouts]
        if logprobs is not None:
            logprobs = [
                row[: sum(r.trained)] + [0.0] * (len(r.ids) - sum(r.trained))
                for row, r in zip(logprobs, rollouts, strict=True)
            ]
        self._rollouts, self._prompt_ids = rollouts, prompt_ids
        self._log_rollouts(rollouts)
        return prompt_ids, [r.ids for r in rollouts], tool_mask, completions, logprobs, *rest

    # ----------------------------------------------------------------- rewards
    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        sequences = [p + c for p, c in zip(self._prompt_ids, completion_ids_list, strict=True)]
        targets = self.table.row_indices(row["target"] for row in inputs)
        self._candidates = sorted(set(gather_object(targets)))  # the same on every process
        if len(self._candidates) < 2 and self.args.item_coef and self.args.item_negatives == "batch":
            raise UserError(
                "All users of a generation batch share one target, so the item term has nothing to compare it with; "
                "use more users a batch, `--item_negatives catalogue`, or `--item_coef 0`."
            )
        self._targets = torch.tensor(targets, device=self.table.device)
        excluded = None
        if self.args.mask_history:
            excluded = exclusion_matrix([self.table.row_indices(row["history"]) for row in inputs], self.table.device)

        def score(states: torch.Tensor) -> CatalogueScores:
            tau = self.args.item_temperature
            return self.table.rank(states, self._targets, temperature=tau, excluded=excluded)

        with self._frozen_policy() as model:
            encoder = make_encoder(model, self.prompts, self.args.forward_token_budget)
            with self._timed("score"):
                states = self.table.project(encoder(sequences, prompt_lengths=[*map(len, self._prompt_ids)])).to(
                    self.table.device
                )
            with self._timed("items"):
                encoder = share_encoding(encoder, self.accelerator, self.table)
                stale = self._refresh_table(encoder, sum(gather_object([sum(map(len, sequences))])))
            if self._is_watched_step():
                watch_sampler(self, model, self._prompt_ids)
        if self._is_watched_step():
            self._log_table(stale, score, states)
        # an evaluation gives the table new rows: ratios compare like with like
        self._batch_rows = self.table.rows if self.args.item_negatives == "catalogue" else None
        self._target_rows = self.table.take(self._candidates)
        with self._timed("score"):
            scores = score(states)
            best = self.table.best(states, NUM_TOP_ITEMS, excluded=excluded)[1].tolist()
        self._states = states
        extra = [
            {
                "target_rank": rank,
                "target_prob": prob,
                "target_score": value,
                "top_item_ids": [self.table.item_ids[i] for i in rows if i >= 0],
                "num_items": len(self.table),
            }
            for rank, prob, value, rows in zip(
                scores.rank.tolist(), scores.logprob.exp().tolist(), scores.score.tolist(), best, strict=True
            )
        ]
        self._log_recommendations(inputs, completions, scores, extra)
        rows = [{**row, **more} for row, more in zip(inputs, extra, strict=True)]
        self._rewards_per_func = super()._calculate_rewards(rows, prompts, completions, completion_ids_list)
        return self._rewards_per_func

    def _refresh_table(self, encoder: Callable, batch_tokens: int) -> torch.Tensor | None:
        """
        Re-encode as much as the budget allows, then the batch's targets; returns their rows as they were in between,
        `None` when every row is fresh.
        """
        budget = int(self.args.table_refresh_budget * batch_tokens)
        if self.table.is_empty or self.table.num_tokens <= budget:
            self.table.refresh(encoder)
            return None
        slice_ = [row for row in self.table.next_slice(budget) if row not in set(self._candidates)]
        self.table.refresh(encoder, slice_)
        stale = self.table.take(self._candidates)
        self.table.refresh(encoder, self._candidates)
        return stale

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        count, rank = len(inputs), self.accelerator.process_index
        local = slice(rank * count, (rank + 1) * count)
        if self.args.advantage == "rloo":
            scored = (~self._rewards_per_func.isnan().all(dim=1)).view(-1, self.num_generations).sum(dim=1)
            factor = rloo_factor(scored).repeat_interleave(self.num_generations)
            output["advantages"] = output["advantages"] * factor[local].to(output["advantages"])
        advantages = self.accelerator.gather(output["advantages"])  # a group can straddle processes
        eligible = [not (self._mask_truncated and r.truncated) for r in self._rollouts]
        eligible = self.accelerator.gather(torch.tensor(eligible, device=advantages.device))
        weights = item_credit_weights(advantages, self.num_generations, self.args.item_credit_count, eligible)
        output["item_weights"] = weights[local]
        positions = {row: position for position, row in enumerate(self._candidates)}
        output["item_positions"] = torch.tensor([positions[row] for row in self._targets.tolist()])
        output["item_positions"] = output["item_positions"].to(advantages.device)
        if self.args.gradient_accumulation_steps % (self.args.steps_per_generation * self.num_iterations) != 0:
            # an optimizer step lies between rollout and update: keep π_old of the item; elsewhere old = new, exactly
            output["old_item_logprobs"] = self._item_logprobs(
                self._states, self._target_rows, output["item_positions"]
            )
        return output

    # --------------------------------------------------------------- objective
    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        states: list[torch.Tensor] = []

        def keep_states(**model_inputs):
            outputs = model(**model_inputs)
            if torch.is_grad_enabled():
                states.append(outputs.answer_state)
            return outputs

        result = super()._get_per_token_logps_and_entropies(keep_states, *args, **kwargs)
        if states:
            self._answer_states = torch.cat(states)
        return result

    def _compute_loss(self, model, inputs):
        token_loss = self.args.token_coef * super()._compute_loss(model, inputs)
        if not self.args.item_coef:
            return token_loss
        item_loss = self.args.item_coef * self._item_loss(inputs)
        if self._is_watched_step() and inputs["item_weights"].any():
            self._log_gradient_norms(token_loss, item_loss)
        return token_loss + item_loss

    def _item_loss(self, inputs: dict[str, Any]) -> torch.Tensor:
        """-Σ δ ℓ(r_{T+1}, A) of M7 over this micro-batch, over the tokens of the generation batch (as TRL's dapo)."""
        carried = inputs["item_weights"].nonzero().squeeze(1)
        tokens = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        normalizer = tokens * self.current_gradient_accumulation_steps / self.args.steps_per_generation
        if len(carried) == 0 and not self.is_deepspeed_enabled:
            return self._answer_states.sum() * 0.0
        candidates = self._candidate_rows()
        states = self.table.project(self._answer_states[carried])
        logprobs = self._item_logprobs(states, candidates, inputs["item_positions"][carried])
        old = inputs["old_item_logprobs"][carried] if "old_item_logprobs" in inputs else logprobs.detach()
        terms = clipped_objective(
            logprobs, old, inputs["advantages"][carried], self.epsilon_low, self.epsilon_high
        )  # (carried rows,)
        loss = -terms.sum() / normalizer + candidates.sum() * 0.0
        self._metrics["train"]["item/loss"].append(loss.item())
        if len(carried):
            ratio = (logprobs.detach() - old).exp()
            clipped = (ratio < 1 - self.epsilon_low) | (ratio > 1 + self.epsilon_high)
            self._metrics["train"]["item/clip_ratio"].append(clipped.float().mean().item())
            self._metrics["train"]["item/logprob"].append(logprobs.mean().item())
        return loss

    def _candidate_rows(self) -> torch.Tensor:
        """Rows of the generation batch's distinct targets, `(C, d)`, encoded with gradient unless that is off."""
        if self.args.item_gradient == "none":
            return self._target_rows
        encoder = make_encoder(self.model, self.prompts, self.args.forward_token_budget)
        with self.accelerator.autocast():
            states = encoder([self.table.token_ids[row] for row in self._candidates])
        return self.table.project(states)

    def _item_logprobs(self, states: torch.Tensor, candidates: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        if self._batch_rows is None:
            return candidate_logprobs(states, candidates, positions, self.args.item_temperature)
        chosen = torch.tensor(self._candidates, device=candidates.device)
        rows = self._batch_rows.index_copy(0, chosen, candidates.to(self._batch_rows.dtype))
        return candidate_logprobs(states, rows, chosen[positions], self.args.item_temperature)
