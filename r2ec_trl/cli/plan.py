"""`recipes/recpo.py --plan`: what a run would take, and the problems that can be seen before it starts."""

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, requires
from typing import Any

import torch
from datasets import DatasetDict
from packaging.requirements import Requirement
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from transformers import AutoConfig, AutoTokenizer

from r2ec_trl.cli.doctor import installed, known_bad_pairs
from r2ec_trl.cli.memory import (
    GIB,
    STAYS,
    ModelShape,
    Precision,
    Workload,
    empty_model,
    memory_plan,
    model_shape,
    optimizer_steps,
)
from r2ec_trl.data.demo import DEMO_POLICY
from r2ec_trl.errors import UserError
from r2ec_trl.policy.adapters import read_adapter_config
from r2ec_trl.policy.batching import positions_of
from r2ec_trl.policy.checks import check_no_hub_code, fit_targets
from r2ec_trl.policy.loading import DEMO, PolicyArguments, lora_targets
from r2ec_trl.policy.prompts import Prompts
from r2ec_trl.training.launch import check_sharding, settle_checkpointing
from r2ec_trl.training.recpo_config import RecPOConfig

NUM_SAMPLED = 200  # users and items whose prompts are measured
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "deepspeed", "bitsandbytes", "vllm")
PHASES = {
    "generate": "lower --max_completion_length, users a step or --vllm_gpu_memory_utilization, or add --use_vllm",
    "score": "lower --forward_token_budget",
    "train": "lower --per_device_train_batch_size (raise --gradient_accumulation_steps), or add --load_in_4bit",
}
SMALL_MODEL, LARGE_MODEL = 1e9, 5e8  # parameters: what rambles at temperature 1.5, and what a CPU does not train
ROOM = 0.9  # of a device's memory; the rest goes to the CUDA context and to fragments


@dataclass
class Plan:
    """
    What [`make_plan`] found.

    Args:
        model (`str`):
            Name or folder.
        shape ([`~r2ec_trl.cli.memory.ModelShape`]), workload ([`~r2ec_trl.cli.memory.Workload`]):
            Sizes of the model, and of a step on one process.
        memory (`dict[str, float]`):
            Bytes by part and phase, of [`~r2ec_trl.cli.memory.memory_plan`].
        device_bytes (`float`, *optional*):
            Memory of the GPU; `None` without one.
        steps (`dict[str, float]`):
            Of [`~r2ec_trl.cli.memory.optimizer_steps`].
        versions (`dict[str, str]`):
            Installed packages.
        problems (`list[str]`):
            One sentence each.
    """

    model: str
    shape: ModelShape
    workload: Workload
    memory: dict[str, float]
    device_bytes: float | None
    steps: dict[str, float]
    versions: dict[str, str]
    problems: list[str]

    def render(self) -> RenderableType:
        """Tables for the terminal."""
        trained = self.shape.adapter or self.shape.parameters
        facts = _table("plan", f"{escape(self.model)}")
        facts.add_row("parameters", f"{self.shape.parameters:,}")
        facts.add_row("trained", f"{trained:,} ({trained / self.shape.parameters:.2%})")
        facts.add_row("user prompt, at most", f"{self.workload.prompt_tokens:,} tokens")
        facts.add_row("item prompt, on average", f"{self.workload.item_tokens:,} tokens")
        for name, count in self.steps.items():
            facts.add_row(name.replace("_", " "), f"{count:,}")
        memory = _table("memory of one process", "GiB")
        for name, used in self.memory.items():
            if used or name == "peak":
                adds = name not in STAYS and name != "peak"
                memory.add_row(f"+ while it does '{name}'" if adds else name, f"{used / GIB:,.2f}")
        if self.device_bytes is not None:
            memory.add_row("the device has", f"{self.device_bytes / GIB:,.2f}")
        versions = _table("package", "installed")
        for pair in self.versions.items():
            versions.add_row(*pair)
        problems = [f"[bold yellow]problem[/] {escape(sentence)}" for sentence in self.problems]
        return Group(facts, memory, versions, *(problems or ["[green]no problem seen[/]"]))


def make_plan(args: RecPOConfig, policy: PolicyArguments, dataset: DatasetDict) -> Plan:
    """
    Count, measure some prompts and check the settings; only config and tokenizer are loaded. Settles
    `gradient_checkpointing="auto"`. [`UserError`] for a model or adapter whose config cannot be read.
    """
    name, rank, modules = _model_and_adapter(policy)
    shared = {"revision": policy.model_revision, "trust_remote_code": args.trust_remote_code}
    try:
        config, tokenizer = AutoConfig.from_pretrained(name, **shared), AutoTokenizer.from_pretrained(name, **shared)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise UserError(f"The model {name!r} cannot be read: {(str(error) or repr(error)).splitlines()[0]}") from error
    check_no_hub_code(config, policy.attn_implementation, args.trust_remote_code)
    targets = None
    if rank and policy.adapter is None:
        found, targets = fit_targets(modules, empty_model(config, None, args.trust_remote_code))
        modules = found if isinstance(found, str) else list(found)
    shape = model_shape(config, policy.attn_implementation, rank, modules, args.trust_remote_code)
    on_gpu = torch.cuda.is_available() and not args.use_cpu
    device_bytes = float(torch.cuda.get_device_properties(0).total_memory) if on_gpu else None
    workload = _workload(args, Prompts(tokenizer, args.prompt_config(), dataset["items"]), dataset)
    precision = _precision(args, policy, config, device_bytes)
    if args.gradient_checkpointing == "auto":
        without = memory_plan(shape, workload, replace(precision, checkpointing=False))["peak"]
        settle_checkpointing(args, fits=without <= ROOM * (device_bytes or _host_bytes()))
        precision = replace(precision, checkpointing=bool(args.gradient_checkpointing))
    memory = memory_plan(shape, workload, precision)
    steps = optimizer_steps(len(dataset["train"]), args)
    plan = Plan(name, shape, workload, memory, device_bytes, steps, installed_versions(), [])
    plan.problems = [*_memory_problems(plan, precision), *_config_problems(plan, args, policy, config)]
    plan.problems += [*filter(None, [targets]), *version_problems(plan.versions), *known_bad_pairs()]
    return plan


def _host_bytes() -> float:
    """This process's share of the machine's memory."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")) / processes


def _model_and_adapter(policy: PolicyArguments) -> tuple[str, int, str | list[str] | None]:
    name, rank = policy.model_name_or_path, policy.lora_r if policy.use_peft else 0
    modules: Any = lora_targets(policy)
    if policy.adapter is not None:
        saved: Any = read_adapter_config(policy.adapter)
        name = name or saved.base_model_name_or_path
        rank, modules = saved.r, saved.target_modules
    if not name:
        raise UserError("No model given; add `--model_name_or_path NAME_OR_FOLDER`.")
    return (
        str(DEMO_POLICY) if name == DEMO else name,
        rank,
        modules if isinstance(modules, str) else list(modules or []),
    )


def _workload(args: RecPOConfig, prompts: Prompts, dataset: DatasetDict) -> Workload:
    users, items = (dataset[name].select(range(min(NUM_SAMPLED, len(dataset[name])))) for name in ("train", "items"))
    item_tokens = [len(prompts.item_ids(item)) for item in items]
    return Workload(
        prompt_tokens=max(len(prompts.user_ids(user)) for user in users),
        completion_tokens=args.max_completion_length + len(prompts.marker_ids),
        item_tokens=round(sum(item_tokens) / len(item_tokens)),
        rows=args.per_device_train_batch_size,
        generation_rows=args.per_device_train_batch_size * args.steps_per_generation,
        candidates=(
            args.generation_batch_size // args.num_generations
            if args.item_coef and args.item_gradient != "none"
            else 0
        ),
        num_items=len(dataset["items"]),
        forward_tokens=args.forward_token_budget,
    )


def _precision(args: RecPOConfig, policy: PolicyArguments, config: Any, device_bytes: float | None) -> Precision:
    dtype = getattr(config, "dtype", None) if policy.dtype == "auto" else getattr(torch, policy.dtype or "float32")
    quantised = "nf4_double" if policy.use_bnb_nested_quant else "nf4"
    deepspeed = args.deepspeed_plugin  # of `--deepspeed` and of the launcher
    colocated = args.use_vllm and args.vllm_mode == "colocate" and device_bytes is not None
    return Precision(
        weight_bytes=4 if dtype in (None, torch.float32) else 2,
        quantised=quantised if policy.load_in_4bit else "int8" if policy.load_in_8bit else None,
        half=args.bf16 or args.fp16,
        checkpointing=bool(args.gradient_checkpointing),
        optimizer=str(getattr(args.optim, "value", args.optim)),
        processes=args.world_size,
        zero_stage=0 if deepspeed is None else deepspeed.zero_stage,
        vllm_bytes=args.vllm_gpu_memory_utilization * (device_bytes or 0.0) if colocated else 0.0,
        vllm_sleeps=args.vllm_enable_sleep_mode,
        own_rollouts=not args.use_vllm,
        table_slices=args.world_size if args.slice_table else 1,
    )


def _memory_problems(plan: Plan, precision: Precision) -> list[str]:
    problems = []
    if plan.device_bytes is not None and plan.memory["peak"] > ROOM * plan.device_bytes:
        phase = max(PHASES, key=lambda name: plan.memory[name])
        problems.append(
            f"The peak of {plan.memory['peak'] / GIB:.1f} GiB leaves too little of the device's "
            f"{plan.device_bytes / GIB:.1f} GiB; the most is added by '{phase}': {PHASES[phase]}."
        )
    if precision.half and precision.weight_bytes == 4 and plan.shape.adapter and not precision.quantised:
        problems.append(
            f"The frozen base is held in fp32 ({plan.memory['weights'] / GIB:.1f} GiB) though training computes in 16 "
            "bits; --dtype bfloat16 halves it."
        )
    if plan.device_bytes is None and plan.shape.parameters > LARGE_MODEL:
        problems.append(f"{plan.shape.parameters / 1e9:.1f} billion parameters on a CPU: expect days; use a GPU.")
    return problems


def _config_problems(plan: Plan, args: RecPOConfig, policy: PolicyArguments, config: Any) -> list[str]:
    problems = []
    text = config.get_text_config()
    length, limit = plan.workload.prompt_tokens + plan.workload.completion_tokens, positions_of(config)
    if limit is not None and length > limit:
        problems.append(
            f"Prompt and completion take up to {length:,} tokens, the model reads {limit:,}; lower "
            "--max_prompt_length or --max_completion_length."
        )
    caps = getattr(text, "attn_logit_softcapping", None) and not plan.shape.eager
    if caps and policy.attn_implementation in (None, "sdpa"):
        problems.append(
            "This model caps its attention scores, which PyTorch's own attention leaves out in silence; add "
            "--attn_implementation eager (or flash_attention_2)."
        )
    if plan.steps["batches_an_epoch"] == 0:
        problems.append(
            f"The training split fills no batch of {plan.steps['users_a_batch']} users; lower "
            "--per_device_train_batch_size or --gradient_accumulation_steps."
        )
    if args.warmup_steps >= plan.steps["steps"] > 0:
        problems.append(f"All {plan.steps['steps']} steps are warm-up; lower --warmup_steps ({args.warmup_steps:g}).")
    if args.temperature > 1.2 and plan.shape.parameters < SMALL_MODEL:
        problems.append(f"A model this small rambles at --temperature {args.temperature:g}; 1.0 suits it.")
    if str(args.save_strategy.value) == "no":
        problems.append(
            "Nothing is saved before the end: a crash costs the whole run; set --save_strategy steps and --save_steps."
        )
    elif args.save_only_model:
        problems.append("--save_only_model keeps no optimizer: a resumed run starts it anew.")
    if policy.load_in_4bit and plan.shape.adapter == 0:
        problems.append("4-bit weights cannot be trained themselves; leave --use_peft on.")
    if torch.cuda.device_count() > 1 and args.world_size == 1:
        problems.append(
            f"One process, though {torch.cuda.device_count()} GPUs are there; launch with accelerate_configs/multi_gpu"
            ".yaml or zero2.yaml."
        )
    try:
        check_sharding(args, plan.shape.adapter > 0)
    except UserError as error:
        problems.append(str(error))
    return problems


def installed_versions() -> dict[str, str]:
    """Version of each package that matters, "-" where it is not installed."""
    return {"python": platform.python_version(), **{name: installed(name) or "-" for name in PACKAGES}}


def version_problems(versions: Mapping[str, str], requirements: list[str] | None = None) -> list[str]:
    """Sentences for [`installed_versions`] outside `requirements`, by default the ranges this library declares."""
    if requirements is None:
        try:
            requirements = requires("r2ec_trl") or []
        except PackageNotFoundError:
            requirements = []
    problems = []
    for line in requirements:
        needed = Requirement(line)
        found = versions.get(needed.name, "-")
        if found != "-" and not needed.specifier.contains(found, prereleases=True):
            problems.append(
                f"{needed.name} {found} is outside {needed.specifier}, the tested range; `pip install "
                f"'{needed.name}{needed.specifier}'`."
            )
    return problems


def _table(left: str, right: str) -> Table:
    table = Table()
    table.add_column(left)
    table.add_column(right, justify="right")
    return table
