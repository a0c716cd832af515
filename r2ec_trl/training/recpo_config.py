"""RecPO's settings on top of TRL's GRPO."""

from dataclasses import dataclass, field
from typing import Any

import torch
from trl import GRPOConfig

from r2ec_trl.errors import UserError
from r2ec_trl.policy.options import check_launch
from r2ec_trl.policy.ranges import check_ranges
from r2ec_trl.policy.releases import set_checkpointing
from r2ec_trl.policy.settings import RecommendationArguments
from r2ec_trl.training.optimizer import AUTO, OPTIM_HELP, resolve_optimizer, settle_scheduler

PAPER = {  # for the model card, as TRL writes it
    "title": "R²ec: Towards Large Recommender Models with Reasoning",
    "id": "2505.16994",
    "citation": (
        "@inproceedings{you2025r2ec,\n  title={R²ec: Towards Large Recommender Models with Reasoning},\n"
        "  author={You, Runyang and others},\n  booktitle={NeurIPS},\n  year={2025}\n}"
    ),
}


@dataclass
class RecPOConfig(RecommendationArguments, GRPOConfig):
    """
    [`~trl.GRPOConfig`] with RecPO's fields and the paper's defaults (M1–M8 in docs/method.md).

    TRL's own knobs keep their meaning: `beta` is the KL coefficient and stays 0, `temperature` and `top_k` are
    sampling. Paper defaults that differ from TRL's: `learning_rate` 1e-5, `num_generations` 4, `temperature` 1.5,
    `top_k` 200, `warmup_steps` 32, `num_train_epochs` 3, `disable_dropout`.
    """

    learning_rate: float = field(default=1e-5, metadata={"help": "Initial learning rate (paper: 1e-5)."})
    optim: str = field(default=AUTO, metadata={"help": OPTIM_HELP})
    num_train_epochs: float = field(default=3.0, metadata={"help": "Epochs at most (paper: 3, with early stopping)."})
    warmup_steps: float = field(default=32, metadata={"help": "Linear warm-up steps (paper: 32)."})
    num_generations: int | None = field(default=4, metadata={"help": "G, rollouts a user (paper: 4)."})
    num_generations_eval: int | None = field(default=1, metadata={"help": "Evaluation is greedy: one rollout."})
    temperature: float = field(default=1.5, metadata={"help": "Sampling temperature (paper: 1.5)."})
    top_k: int = field(default=200, metadata={"help": "Sampling top-k (paper: 200); 0 switches it off."})
    disable_dropout: bool = field(default=True, metadata={"help": "No dropout: old and new log-probs must agree."})
    vllm_importance_sampling_correction: bool | None = field(
        default=None,
        metadata={
            "help": "TRL's correction for vLLM's log-probs. Off by default under top-k, top-p or min-p sampling, "
            "where the ratio measures the truncated mass and would silence the gradient; on otherwise."
        },
    )
    vllm_importance_sampling_mode: str = field(
        default="token_truncate", metadata={"help": "TRL's mode of that correction, per token here."}
    )
    vllm_lora_sync: bool = field(
        default=False,
        metadata={
            "help": "Send vLLM the LoRA adapter alone after each update instead of all weights, merged. For servers "
            "(no NCCL) and where pushing whole weights is slow; not for full fine-tuning."
        },
    )
    vllm_lora_folder: str | None = field(
        default=None,
        metadata={
            "help": "Folder for the adapter on its way to vLLM; one that a server on another machine sees too. By "
            "default in memory (/dev/shm)."
        },
    )

    reward_mix: float = field(default=0.05, metadata={"help": "β of the fused reward: R = β R_c + (1-β) R_d (M3)."})
    reward_cutoff: int = field(default=1000, metadata={"help": "k of NDCG@k and Hit@k in the rewards (M1)."})
    soft_punish_cache: int = field(
        default=16, metadata={"help": "Tokens before the limit over which the reward soft_overlong falls to -1."}
    )
    min_reward_spread: float = field(
        default=0.0,
        metadata={
            "help": "Skip users whose rollouts' rewards deviate by no more than this from each other: no gradient, "
            "and no forward where a micro-batch has others. Needs loss_type dapo, cispo or vespo, beta 0 and "
            "entropy_coef 0."
        },
    )
    advantage: str = field(
        default="grpo",
        metadata={
            "help": "'grpo': (R - mean) / std; 'rloo': R_i - mean of the others, with scale_rewards='none' (M4).",
            "choices": ["grpo", "rloo"],
        },
    )
    token_coef: float = field(default=1.0, metadata={"help": "Weight of the token term; M7 has 1."})
    item_coef: float = field(
        default=1.0,
        metadata={"help": "Weight of the item term; 1 weighs an item like one more token, the literal M7."},
    )
    item_credit: str = field(
        default="best",
        metadata={"help": "Rollouts that carry the item term: 'best' of the group (δ of M7), a number m, or 'all'."},
    )
    item_negatives: str = field(
        default="batch",
        metadata={
            "help": "Candidates of the item ratio (M6): the distinct targets of the generation 'batch' (the paper) or "
            "the whole 'catalogue' (ours).",
            "choices": ["batch", "catalogue"],
        },
    )
    item_gradient: str = field(
        default="candidates",
        metadata={
            "help": "'candidates': the item term's gradient also flows into the encodings of the batch's targets; "
            "'none': rows are constants.",
            "choices": ["candidates", "none"],
        },
    )
    mask_history: bool = field(
        default=False,
        metadata={"help": "Leave history items out of rank and softmax in training (never the target itself)."},
    )
    table_refresh_budget: float = field(
        default=0.25,
        metadata={
            "help": "Before each reward pass re-encode the whole table if it costs at most this share of the "
            "generation batch's tokens, else a round-robin slice of that size. The batch's targets always."
        },
    )
    table_refresh_steps: int | None = field(
        default=None,
        metadata={
            "help": "Re-encode the whole table every so many optimizer steps, whatever it costs (the paper's "
            "T_refresh). In between, and by default, `table_refresh_budget` decides."
        },
    )
    slice_table: bool = field(
        default=False,
        metadata={
            "help": "Each process holds only its slice of the item table, for catalogues of a million items and more; "
            "it is not saved with checkpoints. The bundle gets it whole, through the main process's memory."
        },
    )
    gradient_checkpointing: str = field(
        default="auto",
        metadata={
            "help": "Recompute layers in the backward pass: less memory for a fourth of the step. 'auto': where the "
            "memory plan says that the step does not fit without; true; false.",
            "nargs": "?",
            "const": "true",
        },
    )
    shared_prompt: bool = field(
        default=True,
        metadata={
            "help": "Compute the prompt of a group's rollouts once a forward; the same figures in fewer tokens. False "
            "gives every rollout a row of its own, as models without position ids or attention masks get anyway."
        },
    )
    watch_steps: int = field(
        default=10,
        metadata={
            "help": "Every so many steps measure gradient norms of both terms (not under DeepSpeed or reentrant "
            "checkpointing), row cosines, fresh-rank gain; 0: never."
        },
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        self.optim = resolve_optimizer(self.optim, self.use_cpu)
        words: dict[str, Any] = {"auto": "auto", "true": True, "false": False}
        given = getattr(self, "activation_checkpointing", None)  # its newer name
        given = self.gradient_checkpointing if given is None else given
        if str(given).lower() not in words:
            raise UserError(f"`gradient_checkpointing` is {given!r}; give auto, true or false.")
        set_checkpointing(self, words[str(given).lower()])
        if self.bf16 is None:  # TRL's default is True, which a CPU refuses
            self.bf16 = not self.fp16 and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        if self.vllm_importance_sampling_correction is None:
            truncates = self.top_k > 0 or self.top_p < 1 or bool(self.min_p)
            self.vllm_importance_sampling_correction = not truncates
        if self.metric_for_best_model is None:
            self.metric_for_best_model, self.greater_is_better = self.selection_metric, True
        super().__post_init__()
        settle_scheduler(self)
        check_launch(self.device.type)
        self._check_recpo()

    @property
    def item_credit_count(self) -> int | None:
        """Rollouts a group that carry the item term; `None` for all."""
        return None if self.item_credit == "all" else 1 if self.item_credit == "best" else int(self.item_credit)

    def _check_recpo(self) -> None:
        for name, choices in {
            "advantage": ("grpo", "rloo"),
            "item_negatives": ("batch", "catalogue"),
            "item_gradient": ("candidates", "none"),
        }.items():
            if getattr(self, name) not in choices:
                raise UserError(f"`{name}` is {getattr(self, name)!r}; give one of {', '.join(choices)}.")
        self.item_credit = str(self.item_credit)
        if self.item_credit not in ("best", "all") and not (self.item_credit.isdigit() and int(self.item_credit) > 0):
            raise UserError(f"`item_credit` is {self.item_credit!r}; give 'best', 'all' or a number from 1 up.")
        if self.advantage == "rloo" and self.scale_rewards != "none":
            raise UserError(
                "`advantage='rloo'` with `scale_rewards="
                f"{self.scale_rewards!r}` would divide RLOO by the standard deviation; add `--scale_rewards none`."
            )
        if self.advantage == "rloo" and self.multi_objective_aggregation != "sum_then_normalize":
            raise UserError(
                f"`advantage='rloo'` with `multi_objective_aggregation={self.multi_objective_aggregation!r}` would "
                "divide each reward by its standard deviation; leave that flag out."
            )
        plain = self.loss_type in ("dapo", "cispo", "vespo") and not self.beta and not self.entropy_coef
        plain = plain and not self.use_adaptive_entropy and self.top_entropy_quantile == 1
        if self.min_reward_spread and not plain:
            raise UserError(
                "`min_reward_spread` leaves rows out, which only `--loss_type dapo`, cispo or vespo without KL and "
                "entropy terms weigh as before; take those, or leave it at 0."
            )
        if self.off_policy_mask_threshold is not None and self.item_coef and self.item_credit != "best":
            raise UserError(
                "`off_policy_mask_threshold` drops rollouts of negative advantage, but not their item terms; leave "
                "`item_credit` at 'best', whose rollouts it keeps."
            )
        if self.slice_table and self.item_negatives == "catalogue":
            raise UserError("`slice_table` leaves no process with the whole catalogue; add `--item_negatives batch`.")
        if self.use_transformers_continuous_batching and (self.bf16 or self.fp16):
            raise UserError(
                "`use_transformers_continuous_batching` under mixed precision casts the training weights for good; "
                "use `--use_vllm`, or `--bf16 false --fp16 false`."
            )
