"""The paper's "w/o reasoning" objective (M8): warm start for RecPO, and the baseline it must beat."""

from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftConfig, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments, set_seed
from trl.trainer.utils import add_fused_lm_head

from r2ec_trl.errors import UserError
from r2ec_trl.evaluation.comparison import compare_frames
from r2ec_trl.evaluation.users import first_rows, summarise_users
from r2ec_trl.items.encoding import make_encoder, make_table
from r2ec_trl.policy.adapters import base_of
from r2ec_trl.policy.answer_state import add_answer_state, pad_right
from r2ec_trl.policy.checks import check_start, switch_dropout_off
from r2ec_trl.policy.options import check_launch
from r2ec_trl.policy.prompts import Prompts
from r2ec_trl.policy.settings import RecommendationArguments
from r2ec_trl.training.greedy_evaluation import GreedyEvaluation
from r2ec_trl.training.guarded import GuardedTraining
from r2ec_trl.training.inputs import check_inputs, resolve_policy
from r2ec_trl.training.objective import contrastive_loss, mean_pairwise_cosine
from r2ec_trl.training.optimizer import AUTO, OPTIM_HELP, resolve_optimizer, settle_scheduler
from r2ec_trl.training.sampled_reasoning import SampledReasoning
from r2ec_trl.training.telemetry import Telemetry


@dataclass
class ContrastiveConfig(RecommendationArguments, TrainingArguments):
    """[`~transformers.TrainingArguments`] with the shared recommendation settings."""

    learning_rate: float = field(default=1e-4, metadata={"help": "Initial learning rate."})
    optim: str = field(default=AUTO, metadata={"help": OPTIM_HELP})
    per_device_train_batch_size: int = field(default=24, metadata={"help": "Users a step: each other's negatives."})
    reasoning: str = field(
        default="none",
        metadata={
            "help": "Answer states after 'none', or for a share of the users after their own 'sampled' reasoning.",
            "choices": ["none", "sampled"],
        },
    )
    reasoning_share: float = field(default=0.5, metadata={"help": "Share of a batch's users who reason, if sampled."})
    num_generations: int = field(default=2, metadata={"help": "G, sampled reasonings of each of them."})
    max_completion_length: int = field(default=64, metadata={"help": "Most tokens of a reasoning."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature."})
    top_k: int = field(default=200, metadata={"help": "Sampling top-k; 0 switches it off."})
    stop_coef: float = field(
        default=0.0,
        metadata={
            "help": "Weight of a language-model loss on each group's best reasoning, its marker included, where that "
            "had to be appended, so that the policy learns to stop by itself."
        },
    )
    taught_words: int = field(
        default=0,
        metadata={
            "help": "Instead of its own best reasoning, that loss teaches to name the next purchase: so many words of "
            "its title, then the marker. 0: its own."
        },
    )
    min_reward_spread: float = field(
        default=0.0,
        metadata={
            "help": "Leave groups out of the loss of stop_coef in which the target's probability has a smaller "
            "deviation than this; not with taught_words."
        },
    )
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Leave False: the collator needs them."})
    bf16: bool | None = field(default=None, metadata={"help": "By default on a GPU that supports it."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Let code that comes with the model run."})

    def __post_init__(self) -> None:
        self.optim = resolve_optimizer(self.optim, self.use_cpu)
        if self.bf16 is None:
            self.bf16 = not self.fp16 and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        if self.metric_for_best_model is None:
            self.metric_for_best_model, self.greater_is_better = self.selection_metric, True
        super().__post_init__()
        settle_scheduler(self)
        check_launch(self.device.type)
        if self.reasoning not in ("none", "sampled"):
            raise UserError(f"`reasoning` is {self.reasoning!r}; give none or sampled.")
        sampling = ("stop_coef", "min_reward_spread", "reasoning_share", "num_generations", "temperature", "top_k")
        unread = [name for name in sampling if getattr(self, name) != getattr(ContrastiveConfig, name)]
        if self.reasoning == "none" and unread:
            raise UserError(f"`{unread[0]}` is for sampled reasonings; add `--reasoning sampled`.")
        if self.taught_words and not self.stop_coef:
            raise UserError(
                "`taught_words` says what `stop_coef` teaches, and that is 0; raise it, or leave both out."
            )
        if self.taught_words and self.min_reward_spread:
            raise UserError(
                "`min_reward_spread` chooses among the policy's own reasonings; leave it out with `taught_words`."
            )
        if self.reasoning == "sampled" and not self.reasoning_share:
            raise UserError("`reasoning_share` is 0, so nobody would reason; raise it, or add `--reasoning none`.")


class ContrastiveTrainer(GuardedTraining, GreedyEvaluation, Trainer):
    """
    Pulls the answer state of a user prompt towards the target's row, away from the batch's other distinct targets;
    gradient flows to both sides of every score (M8). States without reasoning, or, for a share of the users, after the
    policy's own ([`~r2ec_trl.training.sampled_reasoning.SampledReasoning`]): such a run ends with `reasoning_report`,
    validation after full reasoning and after none.

    Args:
        model, item_dataset, args, train_dataset, eval_dataset, processing_class:
            As in [`~r2ec_trl.training.recpo_trainer.RecPOTrainer`].
        peft_config ([`~peft.PeftConfig`], *optional*):
            Trains an adapter instead of all weights.
        **kwargs:
            As in [`~transformers.Trainer`].
    """

    reasoning = "none"
    reasoning_report: dict[str, Any] | None = None
    _row_cosine: float | None = None

    def __init__(
        self,
        model: str | PreTrainedModel,
        item_dataset: Dataset,
        args: ContrastiveConfig,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ):
        items, train_dataset, eval_dataset = check_inputs(
            args, ContrastiveConfig, item_dataset, train_dataset, eval_dataset
        )
        set_seed(args.seed)
        if len(train_dataset) < args.per_device_train_batch_size * args.world_size:
            raise UserError(
                f"`train_dataset` has {len(train_dataset)} users, fewer than one batch of "
                f"{args.per_device_train_batch_size * args.world_size}; lower `per_device_train_batch_size`."
            )
        if args.per_device_train_batch_size * args.world_size < 2:
            raise UserError("A batch of one user has no negatives; raise `per_device_train_batch_size`.")
        model, processing_class, peft_config = resolve_policy(model, processing_class, peft_config, args, kwargs)
        self.prompts = Prompts(processing_class, args.prompt_config(), items)
        base = base_of(model)
        if args.reasoning == "sampled":
            self.reasoning = "full"
            add_fused_lm_head(base)
        add_answer_state(base)
        if peft_config is not None:
            model = get_peft_model(model, peft_config)
        switch_dropout_off(model)  # the adapter's as well, as RecPO does
        if args.gradient_checkpointing and hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()
        self.table = make_table(self.prompts, items, args.similarity, args.device)
        args.dataloader_drop_last = True  # a ragged last batch would have fewer negatives
        super().__init__(
            model=model,
            args=args,
            data_collator=self._collate,
            train_dataset=train_dataset.map(
                self._encode,
                desc="User prompts",
                load_from_cache_file=False,
                new_fingerprint=self.prompts.fingerprint(train_dataset),  # or datasets would hash the whole model
            ),
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        self.guard_training(Telemetry(self.accelerator, self.steps_taken))
        length = None if args.reasoning == "none" else args.max_completion_length
        check_start(self.model, self.prompts, self.table.token_ids, length, trains=True)
        if args.eval_strategy != "no" or length is not None:
            self.check_prompts(self.eval_dataset, args.max_eval_users)
        self.sampled = SampledReasoning(self.prompts, args, self.telemetry)
        self.model_accepts_loss_kwargs = False  # the mean over users: let Trainer divide by the accumulation steps

    def _encode(self, example: dict[str, Any]) -> dict[str, Any]:
        ids = self.prompts.user_ids(example) + self.prompts.marker_ids
        return {"sequence": ids, "target_row": self.table.row_indices([example["target"]])[0]}

    def _collate(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        pad_token_id = self.prompts.tokenizer.pad_token_id
        input_ids, attention_mask = pad_right([row["sequence"] for row in rows], pad_token_id, "cpu")
        targets = torch.tensor([row["target_row"] for row in rows])
        return {"input_ids": input_ids, "attention_mask": attention_mask, "targets": targets}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """M8 over the distinct targets of the batch, those of other processes included."""
        targets, outputs = inputs["targets"].tolist(), None
        if self.args.reasoning == "sampled":
            prompt_ids = self._prompt_ids(inputs)
            with self.frozen_policy() as policy, self.telemetry.timed("generate"):
                rollouts = self.sampled.roll_out(policy, prompt_ids)
        else:
            outputs = model(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], answer_state_only=True
            )
        candidates = sorted(set(gather_object(targets)))
        encoder = make_encoder(self.model, self.prompts, self.args.forward_token_budget)
        with self.accelerator.autocast():
            rows = self.table.project(encoder([self.table.token_ids[row] for row in candidates]))  # (C, d)
        place = {row: position for position, row in enumerate(candidates)}
        positions = torch.tensor([place[row] for row in targets], device=rows.device)
        if outputs is None:
            items = [self.table.item_ids[row] for row in targets]
            loss = self.sampled.loss(model, prompt_ids, rollouts, items, self.table.project, rows, positions)
        else:
            loss = contrastive_loss(
                self.table.project(outputs.answer_state), rows, positions, self.args.item_temperature
            )
        if self._row_cosine is None:  # the first since the newest log
            self._row_cosine = mean_pairwise_cosine(rows.detach()).item()
        self.guard.check_loss(loss, inputs)
        return (loss, outputs) if return_outputs else loss

    def _prompt_ids(self, inputs: dict[str, torch.Tensor]) -> list[list[int]]:
        lengths = inputs["attention_mask"].sum(dim=1) - len(self.prompts.marker_ids)
        return [row[:length] for row, length in zip(inputs["input_ids"].tolist(), lengths.tolist(), strict=True)]

    def train(self, *args: Any, **kwargs: Any):
        """As [`~transformers.Trainer`]'s; after sampled reasonings, validation full and none."""
        result = super().train(*args, **kwargs)
        if self.args.reasoning == "sampled" and isinstance(self.eval_dataset, Dataset):
            self.save_model()  # before the look at it: a run that is stopped there keeps what it learnt
            users = first_rows(self.eval_dataset, self.args.max_eval_users)
            none, full = (self.evaluate_frame(users, mode) for mode in ("none", "full"))
            change = compare_frames(none, full, seed=self.args.seed)
            shares = {name: summarise_users(full)[name] for name in ("missing_marker", "reasoning_tokens")}
            self.reasoning_report = {"none_to_full": change, **shares}
            ndcg = change["unmasked"]["ndcg@10"]
            figures = {"none": ndcg["before"], "full": ndcg["after"], "full_minus_none": ndcg["difference"], **shares}
            self.log({f"eval_reasoning/{name}": value for name, value in figures.items()})
        return result

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As [`~transformers.Trainer`]'s, with the mean pairwise cosine of the batch's rows and what was sampled."""
        if "loss" in logs and self._row_cosine is not None:
            logs["item/mean_pairwise_cosine"], self._row_cosine = self._row_cosine, None
            logs.update({name: sum(series) / len(series) for name, series in self.telemetry.series.items() if series})
            self.telemetry.series.clear()
        super().log(logs, start_time)
