"""What a launch cannot do, said before a step is taken."""

import logging
from typing import Any

import torch
from transformers.integrations import is_deepspeed_zero3_enabled

from r2ec_trl.errors import UserError
from r2ec_trl.policy.releases import set_checkpointing

logger = logging.getLogger(__name__)


def settle_checkpointing(args: Any, fits: bool | None = None) -> None:
    """
    Make `gradient_checkpointing="auto"` true or false in place, and say so once: it is off where the step `fits`
    without by the memory plan, or, without a plan, on a CPU alone.
    """
    if args.gradient_checkpointing != "auto":
        return
    set_checkpointing(args, not (fits if fits is not None else args.use_cpu or not torch.cuda.is_available()))
    if args.process_index == 0:
        why = "no memory plan was made" if fits is None else f"the step {'fits' if fits else 'does not fit'} without"
        logger.info("Gradient checkpointing is %s: %s.", "on" if args.gradient_checkpointing else "off", why)


def check_sharding(args: Any, trains_adapter: bool) -> None:
    """
    Refuse what DeepSpeed cannot do with our forwards; settles `gradient_checkpointing="auto"` first.

    Raises:
        [`UserError`]: under ZeRO-3, where rollouts and scores would gather weights layer by layer, or the candidates'
        encoding would meet reentrant checkpointing.
    """
    settle_checkpointing(args)
    if not is_deepspeed_zero3_enabled():
        return
    if not args.ds3_gather_for_generation:
        raise UserError(
            "`ds3_gather_for_generation=False` under ZeRO-3 breaks DeepSpeed's record of the order of layers, since "
            "scoring runs the backbone without the LM head; leave it on, or use ZeRO-2."
        )
    if trains_adapter and args.gradient_checkpointing and args.item_coef and args.item_gradient != "none":
        raise UserError(
            "ZeRO-3 with LoRA and gradient checkpointing cannot encode the candidates with gradient (TRL makes the "
            "checkpointing reentrant there); add `--gradient_checkpointing false`, or `--item_gradient none`, or "
            "launch with accelerate_configs/zero2.yaml."
        )
