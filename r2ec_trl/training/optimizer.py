"""Which optimizer trains where none is named."""

import functools
import importlib.util
import logging
from typing import Any

import torch

logger = logging.getLogger(__name__)

AUTO = "auto"
QUANTISED = "paged_adamw_8bit"
PLAIN = "adamw_torch"
OPTIM_HELP = (
    "Optimizer. 'auto': paged 8-bit AdamW of bitsandbytes on a GPU (the paper's), plain AdamW where there is none."
)


def resolve_optimizer(name: str, use_cpu: bool) -> str:
    """The name transformers knows for `"auto"`, any other as it is. Plain AdamW for the paper's is said once."""
    if name != AUTO:
        return name
    if use_cpu or not torch.cuda.is_available():
        _say("No GPU: plain AdamW instead of the paper's paged 8-bit one (--optim names another).")
        return PLAIN
    if importlib.util.find_spec("bitsandbytes") is None:
        _say("bitsandbytes is not installed: plain AdamW instead of the paper's paged 8-bit one.")
        return PLAIN
    return QUANTISED


def settle_scheduler(args: Any) -> None:
    """
    A scheduler that watches validation takes for better what the choice of the best checkpoint does: by default
    transformers' would lower the learning rate for as long as NDCG rises.

    Args:
        args ([`~transformers.TrainingArguments`]):
            Settings; `mode` is added to `lr_scheduler_kwargs` where it is not given.
    """
    if args.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):
        mode = {"mode": "max" if args.greater_is_better else "min"}
        args.lr_scheduler_kwargs = mode | (args.lr_scheduler_kwargs or {})


@functools.cache
def _say(sentence: str) -> None:
    logger.warning(sentence)
