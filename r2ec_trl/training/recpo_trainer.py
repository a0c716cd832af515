"""RecPO: GRPO with the recommendation as one more action (paper §3), as a thin subclass of TRL's trainer."""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl import GRPOTrainer

from r2ec_trl.errors import UserError
from r2ec_trl.items.encoding import make_encoder, make_table, share_encoding
from r2ec_trl.items.scoring import exclusion_matrix
from r2ec_trl.policy.answer_state import add_answer_state
from r2ec_trl.policy.checks import check_start, fit_adapter, switch_dropout_off
from r2ec_trl.policy.generation import stop_generate_at_marker
from r2ec_trl.policy.loading import PolicyArguments, load_policy
from r2ec_trl.policy.prompts import Prompts
from r2ec_trl.policy.rollouts import MarkerReader, Rollout
from r2ec_trl.rewards import checked_reward, load_reward
from r2ec_trl.training.generation_batch import GenerationBatch, whole_groups
from r2ec_trl.training.greedy_evaluation import GreedyEvaluation
from r2ec_trl.training.guarded import GuardedTraining
from r2ec_trl.training.item_term import ItemTerm
from r2ec_trl.training.launch import check_sharding
from r2ec_trl.training.objective import rloo_factor
from r2ec_trl.training.recpo_config import RecPOConfig
from r2ec_trl.training.telemetry import Telemetry
from r2ec_trl.vllm.sync import vllm_backend

logger = logging.getLogger(__name__)

NUM_TOP_ITEMS = 10  # items a reward sees in `top_item_ids`
NUM_WATCHED_PROMPTS = 2  # a process, whose log-probs vLLM is compared on


@contextmanager
def _stable_rollout_func() -> Iterator[None]:
    """TRL calls `rollout_func` experimental at each start; setup.cfg admits one minor release, whose tests pin it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You are using 'rollout_func'")
        yield


class RecPOTrainer(GuardedTraining, GreedyEvaluation, GRPOTrainer):
    """
    Trains a policy to reason, then recommend (paper §3, M1–M7).

    Everything of [`~trl.GRPOTrainer`] stays, its losses, rewards and flags included. What is overridden, and why:

    - `_calculate_rewards`: the table is refreshed, the batch's targets first; each row then carries `target_rank`,
      `target_prob`, `target_score`, `top_item_ids` and `num_items` for the reward functions.
    - `_generate_and_score_completions`: adds what the item term needs, and RLOO's factor n/(n-1).
    - `_compute_loss`: adds the item term (M6, M7), which weighs an item like one more token; it reads the answer
      states of TRL's own forward.
    - `_prepare_inputs`: TRL's shuffle keeps the rollouts of a user together, so that they share a forward; what a
      micro-batch held is kept as evidence of a loss or gradient that is no number.
    - `_get_grad_norm`: a gradient that is no number stops the run before it reaches the weights.
    - `train`: out of memory and hung or lost processes stop the run with one sentence on every process; a resumed run
      sees the users that it would have seen.
    - `_save_checkpoint`: checkpoints are whole or not there, and hold the item table.
    - `evaluate`: TRL's samples G rollouts and averages batches; ours reasons greedily and ranks the whole catalogue.

    Rollouts go through TRL's public `rollout_func` ([`~RecPOTrainer.roll_out`]), figures through callbacks.

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

    batch: GenerationBatch  # the newest: the trainer owns one at a time

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
        if isinstance(model, str):
            bits = kwargs.pop("quantization_config", None)
            model, tokenizer = load_policy(PolicyArguments(model), True, args.trust_remote_code, quantization=bits)
            processing_class = processing_class or tokenizer
        peft_config = fit_adapter(peft_config, model)
        if processing_class is None:
            name = model.config._name_or_path
            processing_class = AutoTokenizer.from_pretrained(name, trust_remote_code=args.trust_remote_code)
        self.prompts = Prompts(processing_class, args.prompt_config(), item_dataset)
        self.reader = MarkerReader(processing_class, args.marker)
        self._check_data(args, train_dataset)
        if clash := [name for name in ("tools", "rollout_func", "environment_factory") if kwargs.get(name)]:
            raise UserError(
                f"RecPOTrainer takes no `{clash[0]}`: a rollout is the policy's own words; use GRPOTrainer."
            )
        check_sharding(args, peft_config is not None or hasattr(model, "peft_config"))
        # TRL tells truncation by a last end-of-sequence id, which no rollout of ours has: taken over in `roll_out`
        self._mask_truncated, args.mask_truncated_completions = args.mask_truncated_completions, False
        with vllm_backend(args, self._timed_sync, lambda: self.eos_token_ids), _stable_rollout_func():
            super().__init__(
                model=model,
                reward_funcs=self._resolve_rewards(reward_funcs, args),
                args=args,
                train_dataset=self._with_prompts(train_dataset),
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                callbacks=callbacks,
                peft_config=peft_config,
                rollout_func=self.roll_out,
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
        if args.disable_dropout:
            switch_dropout_off(self.model)
        check_start(
            self.model, self.prompts, self.table.token_ids, args.max_completion_length, trains=args.disable_dropout
        )
        self.guard_training(Telemetry(self.accelerator, self.steps_taken, self._metrics["train"], args.watch_steps))
        self.item_term = ItemTerm(self.table, args, self._encode_with_gradient, self.is_deepspeed_enabled)

    @property
    def last_rollout_example(self) -> dict[str, Any]:
        """One rollout of the newest step with its user, rank and top items, for display."""
        return self.telemetry.last_rollout

    # ------------------------------------------------------------------ set-up
    def _timed_sync(self) -> AbstractContextManager:
        return self.telemetry.timed("sync") if self.model.training else nullcontext()  # an evaluation's is no step's

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

    # --------------------------------------------------------- one step: roll out
    def roll_out(self, prompts: list, trainer: Any = None) -> dict[str, list | None]:
        """
        TRL's `rollout_func`: a rollout ends at the marker, for every backend; where it is missing, the marker is
        appended and masked out of the loss.

        Args:
            prompts (`list`):
                Chat messages, each user's G times in a row.
            trainer ([`~trl.GRPOTrainer`], *optional*):
                This one; TRL passes it.

        Returns:
            `dict`: what TRL trains on, and `rollout` and `prompt_tokens`, which it puts into the rows that the
            rewards see.
        """
        prompt_ids = [self.prompts.chat.ids(messages) for messages in prompts]
        with self.telemetry.timed("generate"):
            sampled, logprobs, *_ = self._generate_single_turn(prompt_ids, None, {}, self.num_generations)
        end_ids = {*self.eos_token_ids, self._tokenizer.pad_token_id}
        rollouts = [self.reader.finish(ids, end_ids) for ids in sampled]
        if logprobs is not None:
            logprobs = [
                row[: sum(r.trained)] + [0.0] * (len(r.ids) - sum(r.trained))
                for row, r in zip(logprobs, rollouts, strict=True)
            ]
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": [r.ids for r in rollouts],
            "logprobs": logprobs,
            "env_mask": [[0] * len(r.ids) if self._is_masked(r) else r.trained for r in rollouts],
            "rollout": rollouts,
            "prompt_tokens": prompt_ids,
        }

    def _is_masked(self, rollout: Rollout) -> bool:
        return self._mask_truncated and rollout.truncated

    # -------------------------------------------------------- score and reward
    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rollouts, prompt_ids = ([row[name] for row in inputs] for name in ("rollout", "prompt_tokens"))
        sequences = [prompt + rollout.ids for prompt, rollout in zip(prompt_ids, rollouts, strict=True)]
        targets = torch.tensor(self.table.row_indices(row["target"] for row in inputs), device=self.table.device)
        candidates = self._distinct_targets(targets)
        excluded = None
        if self.args.mask_history:
            excluded = exclusion_matrix([self.table.row_indices(row["history"]) for row in inputs], self.table.device)
        score = partial(self.table.rank, targets=targets, temperature=self.args.item_temperature, excluded=excluded)
        watched, stale, stale_rank = self.telemetry.is_watched_step, None, None
        self.telemetry.rollouts(rollouts)
        with self.frozen_policy() as model:
            encoder = make_encoder(model, self.prompts, self.args.forward_token_budget)
            with self.telemetry.timed("score"):
                states = self.table.project(encoder(sequences, prompt_lengths=[*map(len, prompt_ids)]))
                states = states.to(self.table.device)
            with self.telemetry.timed("items"):
                encoder = share_encoding(encoder, self.accelerator, self.table)
                if not self._refresh_table(encoder, candidates, sum(gather_object([sum(map(len, sequences))]))):
                    stale = self.table.take(candidates)
                    stale_rank = score(states).rank if watched else None
                    self.table.refresh(encoder, candidates)
            if watched:
                self._watch_sampler(model, prompt_ids)
        with self.telemetry.timed("score"):
            scores = score(states)
            best = self.table.best(states, NUM_TOP_ITEMS, excluded=excluded)[1].tolist()
        if watched:
            self.telemetry.table(self.table, candidates, stale, stale_rank, scores.rank)
        columns = [*map(torch.Tensor.tolist, (scores.rank, scores.logprob.exp(), scores.score)), best]
        rows = [
            {
                **{name: value for name, value in row.items() if name not in ("rollout", "prompt_tokens")},
                "target_rank": rank,
                "target_prob": prob,
                "target_score": value,
                "top_item_ids": [self.table.item_ids[i] for i in indices if i >= 0],
                "num_items": len(self.table),
            }
            for row, rank, prob, value, indices in zip(inputs, *columns, strict=True)
        ]
        completions = [self._as_sampled(each, rollout) for each, rollout in zip(completions, rollouts, strict=True)]
        texts = [completion[0]["content"] for completion in completions]
        self.telemetry.recommendations(self.prompts.titles, rows, texts, scores)
        with self.guard.keeping(lambda: [{**row, "completion": text} for row, text in zip(rows, texts, strict=True)]):
            rewards = super()._calculate_rewards(rows, prompts, completions, completion_ids_list)
        self.batch = GenerationBatch(
            prompts=prompt_ids,
            rollouts=rollouts,
            targets=targets,
            candidates=candidates,
            states=states,
            target_rows=self.table.take(candidates),
            # an evaluation gives the table new rows: ratios compare like with like
            catalogue_rows=self.table.rows if self.args.item_negatives == "catalogue" else None,
            rewards=rewards,
        )
        return rewards

    def _distinct_targets(self, targets: torch.Tensor) -> list[int]:
        """The distinct targets of all processes, ascending."""
        candidates = sorted(set(gather_object(targets.tolist())))
        if len(candidates) < 2 and self.args.item_coef and self.args.item_negatives == "batch":
            raise UserError(
                "All users of a generation batch share one target, so the item term has nothing to compare it with; "
                "use more users a batch, `--item_negatives catalogue`, or `--item_coef 0`."
            )
        return candidates

    def _refresh_table(self, encoder: Callable, candidates: list[int], batch_tokens: int) -> bool:
        """Re-encode as much as the budget allows besides the candidates; says whether that was the whole table."""
        budget = int(self.args.table_refresh_budget * batch_tokens)
        if self.table.is_empty or self.table.num_tokens <= budget:
            self.table.refresh(encoder)
            return True
        self.table.refresh(encoder, [row for row in self.table.next_slice(budget) if row not in set(candidates)])
        return False

    def _as_sampled(self, completion: list[dict[str, str]], rollout: Rollout) -> list[dict[str, str]]:
        """The message without a marker that the policy did not write."""
        if rollout.has_marker:
            return completion
        text = self._tokenizer.decode(rollout.ids[: sum(rollout.trained)], skip_special_tokens=True)
        return [{**completion[0], "content": text}]

    def _watch_sampler(self, model: Any, prompt_ids: list[list[int]]) -> None:
        """Log how far vLLM's log-probs are from the policy's, where TRL does not: truncated sampling."""
        if not self.use_vllm or self.vllm_importance_sampling_correction or self.args.vllm_enable_sleep_mode:
            return
        difference = self.vllm_generation.difference(model, prompt_ids[:NUM_WATCHED_PROMPTS])
        mean = self.accelerator.gather(torch.tensor(difference, device=self.accelerator.device)).mean().item()
        self.telemetry.add(**{"sampling/sampling_logp_difference/mean": mean})

    # ------------------------------------------------------------------ credit
    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        own = slice(*(len(inputs) * (self.accelerator.process_index + i) for i in (0, 1)))
        if self.args.advantage == "rloo":
            scored = (~self.batch.rewards.isnan().all(dim=1)).view(-1, self.num_generations).sum(dim=1)
            factor = rloo_factor(scored).repeat_interleave(self.num_generations)
            output["advantages"] = output["advantages"] * factor[own].to(output["advantages"])
        advantages = self.accelerator.gather(output["advantages"])  # a group can straddle processes
        eligible = torch.tensor([not self._is_masked(r) for r in self.batch.rollouts], device=advantages.device)
        output["group"] = torch.arange(own.start, own.stop, device=advantages.device) // self.num_generations
        return output | self.item_term.prepare(self.batch, advantages, self.accelerator.gather(eligible), own)

    def _prepare_inputs(self, inputs):
        buffered = self._buffered_inputs
        micro_batch = super()._prepare_inputs(inputs)
        if self._buffered_inputs is buffered:
            return micro_batch
        self._buffered_inputs = whole_groups(self._buffered_inputs)
        self.guard.micro_batch = self._buffered_inputs[self._step % self.args.steps_per_generation]
        return self.guard.micro_batch

    # -------------------------------------------------------------------- loss
    def _compute_loss(self, model, inputs):
        states: list[torch.Tensor] = []

        def keep_states(**model_inputs):
            outputs = model(**model_inputs)
            states.append(outputs.answer_state)
            return outputs

        loss = self.args.token_coef * super()._compute_loss(keep_states, inputs)
        if self.args.item_coef:
            tokens = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
            normalizer = tokens * self.current_gradient_accumulation_steps / self.args.steps_per_generation
            item_loss, earlier, *figures = self.item_term.loss(
                torch.cat(states), inputs, self.batch, normalizer, self._is_last_micro_step
            )
            self.telemetry.item(item_loss, *figures)
            item_loss = self.args.item_coef * item_loss
            watched = self.telemetry.is_watched_step and self._is_last_micro_step and self._allows_two_backwards
            if watched and inputs["item_weights"].any():
                self.telemetry.gradient_norms(self.model.parameters(), token=loss, item=item_loss)
            loss = loss + item_loss + self.args.item_coef * earlier
        return self.guard.check_loss(loss, inputs)

    @property
    def _is_last_micro_step(self) -> bool:
        """Whether an optimizer step or new rollouts follow: the candidates' rows are then encoded with gradient."""
        reused = self.args.steps_per_generation * self.num_iterations
        return self.accelerator.sync_gradients or (self._step + 1) % reused == 0

    @property
    def _allows_two_backwards(self) -> bool:
        """Whether hooks let each term's gradient be taken apart: not DeepSpeed's, nor reentrant checkpointing's."""
        reentrant = (self.args.gradient_checkpointing_kwargs or {}).get("use_reentrant", False)
        return not (self.is_deepspeed_enabled or (self.args.gradient_checkpointing and reentrant))

    def _encode_with_gradient(self, sequences: Sequence[Sequence[int]]) -> torch.Tensor:
        with self.accelerator.autocast():
            return make_encoder(self.model, self.prompts, self.args.forward_token_budget)(sequences)
