"""The policy as every recipe loads it: base model, tokenizer, saved adapter."""

import copy
import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import PartialState
from peft import LoraConfig, PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import is_flash_attn_2_available
from trl import ModelConfig, get_quantization_config

from r2ec_trl.data.demo import DEMO_POLICY
from r2ec_trl.errors import UserError
from r2ec_trl.policy.adapters import attach_adapter, read_adapter_config, reason_of
from r2ec_trl.policy.checks import PROJECTIONS, check_no_hub_code
from r2ec_trl.policy.options import check_options
from r2ec_trl.policy.ranges import check_ranges

logger = logging.getLogger(__name__)

DEMO = "demo"  # as a dataset or model name: the generated shop and the policy that ships with the package
NEW_ADAPTER = ("lora_", "use_peft", "use_rslora", "use_dora")  # how the settings of one begin


@dataclass
class PolicyArguments(ModelConfig):
    """[`~trl.ModelConfig`] with the paper's LoRA as defaults, and a saved adapter to start from."""

    adapter: str | None = field(
        default=None, metadata={"help": "Folder or hub id of a saved LoRA adapter: trained on, or evaluated."}
    )
    use_peft: bool = field(default=True, metadata={"help": "Train a LoRA adapter; false trains all weights."})
    lora_r: int = field(default=4, metadata={"help": "LoRA rank (paper: 4)."})
    lora_alpha: int = field(default=128, metadata={"help": "LoRA α (reference code: 128)."})
    lora_target_modules: list[str] | None = field(
        default_factory=lambda: list(PROJECTIONS),
        metadata={"help": "Modules with an adapter (reference code: all seven projections)."},
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        check_options(self)
        if self.adapter is not None and not self.use_peft:
            raise UserError(
                "`use_peft` false trains all weights, `adapter` those of the adapter; leave one of them out."
            )
        super().__post_init__()


def peft_config(args: PolicyArguments) -> LoraConfig | None:
    """The LoRA configuration to train, `None` for all weights or when an adapter is trained on."""
    if not args.use_peft or args.adapter is not None:
        return None
    parameters = [args.lora_target_parameters] * isinstance(args.lora_target_parameters, str)
    parameters = parameters or args.lora_target_parameters
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=0.0 if parameters else args.lora_dropout,  # PEFT has none for parameters
        target_modules=lora_targets(args),
        target_parameters=parameters,
        modules_to_save=args.lora_modules_to_save,
        use_rslora=args.use_rslora,
        use_dora=args.use_dora,
    )


def lora_targets(args: PolicyArguments) -> list[str] | str | None:
    """`lora_target_modules`, of which TRL makes a text, a regular expression to PEFT, where it names one module."""
    targets: Any = args.lora_target_modules
    is_name = isinstance(targets, str) and targets.isidentifier()
    return [targets] if is_name else targets


def load_policy(
    args: PolicyArguments,
    trainable: bool = False,
    trust_remote_code: bool = False,
    tokenizer_path: str | None = None,
    quantization: Any = None,
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """
    Base model with its tokenizer, and the saved adapter on it if one is named.

    Args:
        args ([`PolicyArguments`]):
            `model_name_or_path` wins over the base that the adapter records, which may be a private path.
        trainable (`bool`, *optional*, defaults to `False`):
            Whether the adapter is trained on.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether code that comes with the model may run.
        tokenizer_path (`str`, *optional*):
            Where the tokenizer is, if not beside the base model.
        quantization (`BitsAndBytesConfig`, *optional*):
            In place of the one that `args` names.

    Raises:
        [`UserError`]: for a model or adapter that cannot be read, or do not fit each other.
    """
    adapter_config = read_adapter_config(args.adapter) if args.adapter is not None else None
    if trainable and adapter_config:
        usual = vars(PolicyArguments())
        if given := [one for one, value in vars(args).items() if one.startswith(NEW_ADAPTER) and value != usual[one]]:
            logger.warning("`%s` is of a new adapter: %s is trained on as it was saved.", given[0], args.adapter)
    name = args.model_name_or_path or (adapter_config and adapter_config.base_model_name_or_path)
    if adapter_config and adapter_config.revision and not args.model_name_or_path:
        args = copy.copy(args)
        args.model_revision = adapter_config.revision
    if not name:
        raise UserError("No model given; add `--model_name_or_path NAME_OR_FOLDER`.")
    name = str(DEMO_POLICY) if name == DEMO else name
    quantization = quantization or get_quantization_config(args)
    if quantization is not None and is_deepspeed_zero3_enabled():
        raise UserError(
            "ZeRO-3 cannot share out quantised weights; launch with accelerate_configs/zero2.yaml, or leave "
            "`--load_in_4bit` and `--load_in_8bit` out."
        )
    model, tokenizer = _from_pretrained(args, name, quantization, trust_remote_code, tokenizer_path or name)
    if getattr(model.config, "attn_logit_softcapping", None) and model.config._attn_implementation == "sdpa":
        logger.warning("sdpa leaves out this model's attention soft cap: using `attn_implementation` eager instead.")
        model.set_attn_implementation("eager")
    if args.adapter is None or adapter_config is None:
        return model, tokenizer
    return attach_adapter(model, args.adapter, adapter_config, trainable), tokenizer


def _from_pretrained(
    args: PolicyArguments, name: str, quantization: Any, trust_remote_code: bool, tokenizer_path: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer; whatever is wrong with the files is one sentence, except for a lack of memory."""
    shared: dict[str, Any] = {"revision": args.model_revision, "trust_remote_code": trust_remote_code}
    device = {"": PartialState().local_process_index if torch.cuda.is_available() else "cpu"}
    try:
        check_no_hub_code(
            PreTrainedConfig.get_config_dict(name, **shared)[0], args.attn_implementation, trust_remote_code
        )
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_path, **shared)
        model, info = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=args.dtype if args.dtype in ("auto", None) else getattr(torch, args.dtype),
            attn_implementation=args.attn_implementation,
            quantization_config=quantization,
            device_map=device if quantization else None,
            use_safetensors=True,
            output_loading_info=True,
            **shared,
        )
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a folder can be wrong in any way
        if "allocate memory" in str(error):
            raise
        wants_code = "trust_remote_code" in str(error)
        reason = reason_of(error) + (" Add `--trust_remote_code` if you trust it." if wants_code else "")
        recorded = (
            ""
            if args.model_name_or_path
            else " (the base recorded in the adapter; name yours with --model_name_or_path)"
        )
        raise UserError(f"The model {name!r}{recorded} cannot be loaded: {reason}") from error
    lacking = sorted(map(str, info["missing_keys"])) + sorted(str(key[0]) for key in info["mismatched_keys"])
    if lacking:
        raise UserError(
            f"The model {name!r} lacks {len(lacking)} weights that its config.json asks for, such as "
            f"{lacking[0]}; they would be random, so give a whole checkpoint of a causal language model."
        )
    return model, tokenizer


def quantization_of(model: PreTrainedModel) -> dict[str, Any]:
    """bitsandbytes' settings by the names of [`PolicyArguments`]; empty for a model loaded as its checkpoint is."""
    config: Any = getattr(model.config, "quantization_config", None)
    if getattr(config, "load_in_8bit", False):
        return {"load_in_8bit": True}
    if getattr(config, "load_in_4bit", False):
        nested = config.bnb_4bit_use_double_quant
        return {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": config.bnb_4bit_quant_type,
            "use_bnb_nested_quant": nested,
            "bnb_4bit_quant_storage": dtype_name(config.bnb_4bit_quant_storage),
        }
    return {}


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype by the name that [`PolicyArguments`] takes."""
    return str(dtype).removeprefix("torch.")


def available_attention(recorded: str | None) -> str | None:
    """The attention implementation a model was used with, where this machine has it; never code from the hub."""
    if recorded in (None, "eager", "sdpa") or (recorded == "flash_attention_2" and is_flash_attn_2_available()):
        return recorded
    logger.warning("The model was used with %s attention, which is not here: the last digits may differ.", recorded)
    return None


def checked_device(name: str | None = None) -> torch.device:
    """A device by its name, the GPU if there is one by default; [`UserError`] where this machine has none such."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise UserError(f"The device {name!r} is not there; give 'cpu', or one that this machine has.") from error
