"""What a launch cannot do, said before anything is loaded."""

from typing import Any

from transformers.integrations import is_deepspeed_zero3_enabled

from r2ec_trl.errors import UserError


def check_sharding(args: Any, trains_adapter: bool) -> None:
    """
    Refuse what DeepSpeed cannot do with our forwards.

    Args:
        args ([`~r2ec_trl.training.recpo_config.RecPOConfig`]):
            Settings.
        trains_adapter (`bool`):
            Whether a LoRA adapter is trained.

    Raises:
        [`UserError`]: under ZeRO-3, where rollouts and scores would gather weights layer by layer, or the candidates'
        encoding would meet reentrant checkpointing.
    """
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
