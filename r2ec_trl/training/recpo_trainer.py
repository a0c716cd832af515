"""RecPO: GRPO with the recommendation as one more action (paper §3), as a thin subclass of TRL's trainer."""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl import GRPOTrainer

from r2ec_trl.errors import UserError
from r2ec_trl.items.encoding import make_encoder, make_table
from r2ec_trl.policy.adapters import base_of
from r2ec_trl.policy.answer_state import add_answer_state
from r2ec_trl.policy.checks import check_start, switch_dropout_off
from r2ec_trl.policy.generation import stop_generate_at_marker
from r2ec_trl.policy.prompts import Prompts
from r2ec_trl.policy.releases import set_checkpointing
from r2ec_trl.policy.rollouts import MarkerReader, Rollout
from r2ec_trl.training.generation_batch import GenerationBatch, whole_groups, without_rows
from r2ec_trl.training.greedy_evaluation import GreedyEvaluation
from r2ec_trl.training.guarded import GuardedTraining, stable_rollout_func
from r2ec_trl.training.inputs import as_given, check_batch, check_inputs, numbered, resolve_policy, resolve_rewards
from r2ec_trl.training.item_term import ItemTerm
from r2ec_trl.training.launch import check_sharding
from r2ec_trl.training.objective import reward_spread, rloo_factor, token_normalizer
from r2ec_trl.training.recpo_config import PAPER, RecPOConfig
from r2ec_trl.training.reward_pass import RewardPass, as_sampled
from r2ec_trl.training.telemetry import Telemetry
from r2ec_trl.vllm.sync import vllm_backend

logger = logging.getLogger(__name__)

OF_ROLL_OUT = ("_rollout", "_prompt_ids")
NUM_WATCHED_PROMPTS = 2  # a process, whose log-probs vLLM is compared on


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
      micro-batch held is kept as evidence of a loss or gradient that is no number; a resumed run counts on.
    - `_get_grad_norm`: a gradient that is no number stops the run before it reaches the weights.
    - `train`: out of memory and hung or lost processes stop the run with one sentence on every process; a resumed run
      sees the users that it would have seen, and its adapters are read as they were.
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
    _paper = PAPER

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
        items, train_dataset, eval_dataset = check_inputs(args, RecPOConfig, item_dataset, train_dataset, eval_dataset)
        check_batch(args, train_dataset)
        model, processing_class, peft_config = resolve_policy(model, processing_class, peft_config, args, kwargs)
        self.prompts = Prompts(processing_class, args.prompt_config(), items)
        self.reader = MarkerReader(processing_class, args.marker)
        if clash := [name for name in ("tools", "rollout_func", "environment_factory") if kwargs.get(name)]:
            raise UserError(
                f"RecPOTrainer takes no `{clash[0]}`: a rollout is the policy's own words; use GRPOTrainer."
            )
        check_sharding(args, peft_config is not None or hasattr(model, "peft_config"))
        # TRL tells truncation by a last end-of-sequence id, which no rollout of ours has: taken over in `roll_out`
        self._mask_truncated, args.mask_truncated_completions = args.mask_truncated_completions, False
        with vllm_backend(args, self._timed_sync, lambda: self.eos_token_ids), stable_rollout_func():
            super().__init__(
                model=model,
                reward_funcs=resolve_rewards(reward_funcs, args, train_dataset.column_names),
                args=args,
                train_dataset=self._with_prompts(train_dataset),
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                callbacks=callbacks,
                peft_config=peft_config,
                rollout_func=self.roll_out,
                **kwargs,
            )
        set_checkpointing(args, args.gradient_checkpointing)  # TRL may have set its kwargs, by the old name
        self.reward_func_names = numbered(self.reward_func_names)
        chat = self.prompts.chat  # TRL renders the prompts again: under the same clock
        self.chat_template, self.chat_template_kwargs = chat.template, chat.kwargs
        args.mask_truncated_completions = self._mask_truncated  # so that the saved settings say what was done
        base_model = base_of(self.model)
        add_answer_state(base_model, args.shared_prompt)
        if not self.use_vllm and not self.use_transformers_continuous_batching:
            stop_generate_at_marker(base_model, self.reader)
        slices = self.accelerator if args.slice_table else None
        self.table = make_table(self.prompts, items, args.similarity, self.accelerator.device, slices)
        if args.disable_dropout:
            switch_dropout_off(self.model)
        check_start(self.model, self.prompts, self.table.token_ids, args.max_completion_length, args.disable_dropout)
        if args.eval_strategy != "no":
            self.check_prompts(self.eval_dataset, args.max_eval_users)
        shown, series = args.num_completions_to_print or 1, self._metrics["train"]
        self.guard_training(Telemetry(self.accelerator, self.steps_taken, series, args.watch_steps, shown))
        self.reward_pass = RewardPass(self.table, self.prompts, args, self.accelerator, self.telemetry)
        self.item_term = ItemTerm(self.table, args, self._encode_with_gradient, self.is_deepspeed_enabled)

    # ------------------------------------------------------------------ set-up
    def _timed_sync(self) -> AbstractContextManager:
        return self.telemetry.timed("sync") if self.model.training else nullcontext()  # an evaluation's is no step's

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
            `dict`: what TRL trains on, and [`OF_ROLL_OUT`], which it puts into the rows of `_calculate_rewards`.
        """
        prompt_ids = [self.prompts.chat.ids(messages) for messages in prompts]
        with self.telemetry.timed("generate"):
            sampled, logprobs, *_ = self._generate_single_turn(prompt_ids, None, {}, self.num_generations)
        end_ids = {*self.eos_token_ids, self._tokenizer.pad_token_id}
        rollouts = [self.reader.finish(ids, end_ids) for ids in sampled]
        if logprobs is not None:
            pairs = zip(logprobs, rollouts, strict=True)
            logprobs = [row[: sum(r.trained)] + [0.0] * (len(r.ids) - sum(r.trained)) for row, r in pairs]
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": [r.ids for r in rollouts],
            "logprobs": logprobs,
            "env_mask": [[0] * len(r.ids) if self._is_masked(r) else r.trained for r in rollouts],
            **dict(zip(OF_ROLL_OUT, (rollouts, prompt_ids), strict=True)),
        }

    def _is_masked(self, rollout: Rollout) -> bool:
        return self._mask_truncated and rollout.truncated

    # -------------------------------------------------------- score and reward
    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rollouts, prompt_ids = ([row[name] for row in inputs] for name in OF_ROLL_OUT)
        rows = [{name: row[name] for name in row if name not in OF_ROLL_OUT} for row in map(as_given, inputs)]
        self.telemetry.rollouts(rollouts)
        with self.frozen_policy() as model:
            scored = self.reward_pass(model, rows, prompt_ids, rollouts)
            if self.telemetry.is_watched_step:
                self._watch_sampler(model, prompt_ids)
        rows = [{**row, **more, "num_items": len(self.table)} for row, more in zip(rows, scored.rows(), strict=True)]
        completions = [as_sampled(*pair, self._tokenizer) for pair in zip(completions, rollouts, strict=True)]
        texts = [completion[0]["content"] for completion in completions]
        self.telemetry.recommendations(self.prompts.titles, rows, texts, scored.scores)
        with self.guard.keeping(lambda: [{**row, "completion": text} for row, text in zip(rows, texts, strict=True)]):
            rewards = super()._calculate_rewards(rows, prompts, completions, completion_ids_list)
        self.batch = GenerationBatch(
            prompts=prompt_ids,
            rollouts=rollouts,
            targets=scored.targets,
            candidates=scored.candidates,
            states=scored.states,
            target_rows=self.table.take(scored.candidates),
            # an evaluation gives the table new rows: ratios compare like with like
            catalogue_rows=self.table.rows if self.args.item_negatives == "catalogue" else None,
            rewards=rewards,
        )
        return rewards

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
        groups = self.quiet_groups()
        self.telemetry.add(**{"rollout/no_signal": groups.float().mean().item()})
        output["quiet"] = quiet = groups.repeat_interleave(self.num_generations)[own]
        output["advantages"] = output["advantages"].masked_fill(quiet.to(output["advantages"].device), 0.0)
        advantages = self.accelerator.gather(output["advantages"])  # a group can straddle processes
        eligible = torch.tensor([not self._is_masked(r) for r in self.batch.rollouts], device=advantages.device)
        output["group"] = torch.arange(own.start, own.stop, device=advantages.device) // self.num_generations
        return output | self.item_term.prepare(self.batch, advantages, self.accelerator.gather(eligible), own)

    def quiet_groups(self) -> torch.Tensor:
        """
        Whether the rewards of each group deviate by no more than `min_reward_spread`, `(users of the batch,)`: their
        sum, or each of them where TRL normalises them apart.
        """
        rewards = self.batch.rewards * self.reward_weights.to(self.batch.rewards.device)
        summed = self.multi_objective_aggregation == "sum_then_normalize"
        return reward_spread(rewards, self.num_generations, summed) <= self.args.min_reward_spread

    def _prepare_inputs(self, inputs):
        buffered = self._buffered_inputs
        if buffered is None and self.keeper.resumed is not None:
            self._count_on()
        micro_batch = super()._prepare_inputs(inputs)
        if self._buffered_inputs is buffered:
            return micro_batch
        self._buffered_inputs = whole_groups(self._buffered_inputs)
        self.guard.micro_batch = self._buffered_inputs[self._step % self.args.steps_per_generation]
        return self.guard.micro_batch

    def _count_on(self) -> None:
        """TRL counts micro-batches from 0 in a resumed run too, and would then keep rollouts into the next batch."""
        batches = len(self.callback_handler.train_dataloader)
        epochs, rest = self.keeper.position(batches)
        self._step = epochs * batches + rest
        if self._step % (self.args.steps_per_generation * self.num_iterations):
            step = self.state.global_step
            logger.warning("Step %d lies within a generation batch: rollouts of its users are drawn anew.", step)

    # -------------------------------------------------------------------- loss
    def _compute_loss(self, model, inputs):
        if self.args.min_reward_spread:
            inputs = without_rows(inputs, inputs["quiet"])
        states: list[torch.Tensor] = []

        def keep_states(**model_inputs):
            outputs = model(**model_inputs)
            states.append(outputs.answer_state)
            return outputs

        loss = self.args.token_coef * super()._compute_loss(keep_states, inputs)
        if self.args.item_coef:
            normalizer = token_normalizer(
                self.loss_type,
                inputs["completion_mask"] * inputs["tool_mask"],
                inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes,
                self.max_completion_length,
                self.current_gradient_accumulation_steps,
                self.args.steps_per_generation,
            )
            item_loss, earlier, *figures = self.item_term.loss(
                torch.cat(states), inputs, self.batch, normalizer, self._is_last_micro_step
            )
            self.telemetry.item(item_loss * self.current_gradient_accumulation_steps, *figures)  # their mean is logged
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
