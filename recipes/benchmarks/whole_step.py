"""
Time and memory of whole RecPO steps on a randomly initialised model of a real one's shape; nothing is downloaded.

    python recipes/benchmark.py --case step --shape qwen2.5-3b                                     # LoRA in bf16
    python recipes/benchmark.py --case step --shape gemma-2-2b --attn_implementation eager --load_in_4bit    # QLoRA
    python recipes/benchmark.py --case step --shape qwen2.5-3b --use_vllm [--vllm_lora_sync] [--vllm_enable_sleep_mode]
    python recipes/benchmark.py --case step --shape toy --use_cpu --users 2 --completion_tokens 16 --num_items 20

The last line is one JSON object: seconds of each step by part, tokens, peak memory by phase, and what
[`~r2ec_trl.cli.memory.memory_plan`] predicts beside it. Hardware: one GPU of 24 GB or more for the large shapes; the
toy runs on a CPU, where memory is not measured.

Measured on an H100 (24 rollouts a step, P = 500, R = 512, transformers' own generation, second step): qwen2.5-3b LoRA
52.0 s and 8.20 GiB (plan 8.15), QLoRA 49.5 s and 3.80 GiB (plan 3.92); gemma-2-2b with eager attention LoRA 44.8 s and
7.88 GiB (plan 7.80), QLoRA 57.6 s and 4.97 GiB (plan 5.00). The plan's .3 GiB of workspace come from the first three
runs. 84-91 % of the time is generation: with vLLM the step of qwen2.5-3b takes 9.1 s. Memory under vLLM is not
compared: torch counts what a sleeping engine has given back.
"""

import logging
import random
import tempfile
import time
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmarks.replayed import tokenizer as byte_tokenizer
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from r2ec_trl.cli.memory import GIB, Precision, Workload, memory_plan, model_shape
from r2ec_trl.cli.parsing import parse
from r2ec_trl.errors import UserError
from r2ec_trl.policy.loading import PolicyArguments, load_policy, peft_config
from r2ec_trl.training.recpo_config import RecPOConfig
from r2ec_trl.training.recpo_trainer import RecPOTrainer

SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-3b": {
        "model_type": "qwen2",
        "vocab_size": 151_936,
        "hidden_size": 2048,
        "intermediate_size": 11_008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "qwen2.5-0.5b": {
        "model_type": "qwen2",
        "vocab_size": 151_936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "gemma-2-2b": {
        "model_type": "gemma2",
        "vocab_size": 256_000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "tie_word_embeddings": True,
    },
    "toy": {
        "model_type": "llama",
        "vocab_size": 1000,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "tie_word_embeddings": True,
    },
}
PARTS = ("generate", "sync", "score", "items", "train")


@dataclass
class StepArguments:
    """What a step is made of."""

    shape: str = field(default="qwen2.5-0.5b", metadata={"help": "Which model's sizes.", "choices": sorted(SHAPES)})
    users: int = field(default=6, metadata={"help": "Users a step; with G = 4, four times as many rollouts."})
    prompt_tokens: int = field(default=500, metadata={"help": "P, tokens of a user prompt (about)."})
    completion_tokens: int = field(default=512, metadata={"help": "R, tokens of every rollout."})
    item_tokens: int = field(default=32, metadata={"help": "Tokens of an item prompt (about)."})
    num_items: int = field(default=2000, metadata={"help": "N, size of the catalogue."})
    micro_batch: int = field(default=4, metadata={"help": "Rollouts a forward and backward pass."})
    steps: int = field(default=3, metadata={"help": "Optimizer steps; the first one warms up."})
    optimizer: str | None = field(default=None, metadata={"help": "TRL's `optim`; by default RecPO's own default."})
    checkpointing: bool = field(default=True, metadata={"help": "Gradient checkpointing."})
    use_cpu: bool = field(default=False, metadata={"help": "Run on the CPU."})
    use_vllm: bool = field(default=False, metadata={"help": "Generate with a colocated vLLM engine."})
    vllm_lora_sync: bool = field(default=False, metadata={"help": "Send it the adapter, not merged weights."})
    vllm_enable_sleep_mode: bool = field(
        default=False, metadata={"help": "Free the engine's memory while the policy trains."}
    )
    vllm_gpu_memory_utilization: float = field(
        default=0.3, metadata={"help": "Share of the GPU that the engine takes."}
    )


def save_random_model(shape: str, folder: Path, tokenizer: PreTrainedTokenizerFast, device: str) -> None:
    """Write a random model of this shape, in bf16 on a GPU and fp32 on a CPU, with the tokenizer beside it."""
    settings = dict(SHAPES[shape])
    config = AutoConfig.for_model(
        settings.pop("model_type"),
        **settings,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_shop(args: StepArguments) -> tuple[Dataset, Dataset]:
    """Items and users of random letters, as long as asked for."""
    draw = random.Random(0)

    def text(length: int) -> str:
        return "".join(draw.choices("abcdefghijklmnopqrstuvwxyz ", k=max(1, length)))

    title_length = max(4, args.item_tokens - len("Title: \n\n><answer>"))
    items = [{"item_id": f"i{number}", "title": text(title_length)} for number in range(args.num_items)]
    purchases = max(1, (args.prompt_tokens - 2) // (title_length + len("- []\n")))
    users = [
        {
            "user_id": f"u{number}",
            "history": [f"i{draw.randrange(args.num_items)}" for _ in range(purchases)],
            "target": f"i{number % args.num_items}",
        }
        for number in range(args.users * args.steps)
    ]
    return Dataset.from_list(items), Dataset.from_list(users)


class MeasuredTrainer(RecPOTrainer):
    """[`RecPOTrainer`] that notes the peak memory of each phase; training is what lies between the others."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.peaks: dict[str, list[float]] = defaultdict(list)
        self.telemetry.timed = partial(self._measured, self.telemetry.timed)

    def note_peak(self, phase: str) -> None:
        """The peak since the last note belongs to `phase`."""
        if self.accelerator.device.type == "cuda":
            self.wait()
            self.peaks[phase].append(torch.cuda.max_memory_allocated() / GIB)
            torch.cuda.reset_peak_memory_stats()

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()

    @contextmanager
    def _measured(self, timed, part):
        self.note_peak("train")
        with timed(part):
            yield
            self.wait()
        self.note_peak(part)


class StepTimes(TrainerCallback):
    """Wall time of each optimizer step."""

    def __init__(self):
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self._start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._start)


def make_trainer(args: StepArguments, policy: PolicyArguments, folder: Path, times: StepTimes) -> MeasuredTrainer:
    """A trainer whose every rollout has `completion_tokens` tokens."""
    tokenizer = byte_tokenizer()
    device = "cuda" if torch.cuda.is_available() and not args.use_cpu else "cpu"
    save_random_model(args.shape, folder / "model", tokenizer, device)
    policy.model_name_or_path = str(folder / "model")
    policy.dtype = "bfloat16" if device == "cuda" else "float32"
    model, tokenizer = load_policy(policy, trainable=True)
    items, users = make_shop(args)
    settings: dict[str, Any] = {} if args.optimizer is None else {"optim": args.optimizer}
    config = RecPOConfig(
        output_dir=str(folder / "run"),
        per_device_train_batch_size=args.micro_batch,
        gradient_accumulation_steps=4 * args.users // args.micro_batch,
        num_generations=4,
        max_steps=args.steps,
        max_completion_length=args.completion_tokens,
        generation_kwargs={"min_tokens" if args.use_vllm else "min_new_tokens": args.completion_tokens},
        use_vllm=args.use_vllm,
        vllm_lora_sync=args.vllm_lora_sync,
        vllm_enable_sleep_mode=args.vllm_enable_sleep_mode,
        vllm_gpu_memory_utilization=args.vllm_gpu_memory_utilization,
        vllm_max_model_length=args.prompt_tokens + args.completion_tokens + 256,
        gradient_checkpointing=args.checkpointing,
        user_template="{history}",
        item_template="{fields}",
        item_fields=["title"],
        max_history_items=10_000,
        max_prompt_length=args.prompt_tokens + 200,
        warmup_steps=0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=args.use_cpu,
        disable_tqdm=True,
        **settings,
    )
    return MeasuredTrainer(
        model, items, None, config, users, None, tokenizer, peft_config=peft_config(policy), callbacks=[times]
    )


def predict(args: StepArguments, policy: PolicyArguments, trainer: MeasuredTrainer) -> dict[str, float]:
    """The plan's figures for what the trainer really was given, in GiB."""
    adapter = {"lora_rank": policy.lora_r, "lora_modules": policy.lora_target_modules} if policy.use_peft else {}
    config = AutoConfig.from_pretrained(policy.model_name_or_path)
    shape = model_shape(config, trainer.model.config._attn_implementation, **adapter)
    prompts = [len(trainer.prompts.user_ids(row)) for row in trainer.train_dataset]
    workload = Workload(
        prompt_tokens=max(prompts),
        completion_tokens=args.completion_tokens + len(trainer.prompts.marker_ids),
        item_tokens=round(trainer.table.num_tokens / len(trainer.table)),
        rows=args.micro_batch,
        generation_rows=4 * args.users,
        candidates=args.users,
        num_items=args.num_items,
        forward_tokens=trainer.args.forward_token_budget,
    )
    quantised = "nf4_double" if policy.use_bnb_nested_quant else "nf4"
    precision = Precision(
        weight_bytes=4 if policy.dtype == "float32" else 2,
        quantised=quantised if policy.load_in_4bit else "int8" if policy.load_in_8bit else None,
        half=trainer.args.bf16,
        checkpointing=args.checkpointing,
        optimizer=str(trainer.args.optim.value),
    )
    return {name: round(value / GIB, 3) for name, value in memory_plan(shape, workload, precision).items()}


def measure(args: StepArguments, policy: PolicyArguments) -> dict[str, Any]:
    """Run the steps; the JSON line's content."""
    if 4 * args.users % args.micro_batch:
        raise UserError(f"4 x {args.users} rollouts do not split into micro-batches of {args.micro_batch}.")
    times = StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(args, policy, Path(folder), times)
        on_gpu = torch.cuda.is_available() and not args.use_cpu
        loaded = torch.cuda.memory_allocated() / GIB if on_gpu else None
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
        trainer.note_peak("train")
        plan = predict(args, policy, trainer)
        rows = [row for row in trainer.state.log_history if "time/train" in row]
        peaks = {phase: round(max(values), 3) for phase, values in trainer.peaks.items() if values}
        peak = max(peaks.values()) if peaks else None
        engine = "hot-loaded" if args.vllm_lora_sync else "merged weights"
        result = {
            "shape": args.shape,
            "generation": (
                f"vllm, {engine}{', sleeps' * args.vllm_enable_sleep_mode}" if args.use_vllm else "transformers"
            ),
            "adapter": "none" if not policy.use_peft else "qlora" if policy.load_in_4bit else "lora",
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
            "attention": trainer.model.config._attn_implementation,
            "optimizer": str(trainer.args.optim.value),
            "checkpointing": args.checkpointing,
            "rollouts": 4 * args.users,
            "prompt_tokens": args.prompt_tokens,
            "completion_tokens": args.completion_tokens,
            "num_items": args.num_items,
            "step_seconds": [round(value, 2) for value in times.seconds],
            "seconds_by_part": [{p: round(row.get(f"time/{p}", 0.0), 2) for p in PARTS} for row in rows],
            "mean_completion": [row["completions/mean_length"] for row in rows],
            "rollout_tokens_a_second": round(
                4 * args.users * args.completion_tokens / max(1e-9, rows[-1]["time/generate"]), 1
            ),
            "loaded_gib": None if loaded is None else round(loaded, 3),
            "peak_gib_by_phase": peaks,
            "peak_gib": peak,
            "plan_gib": plan,
            "measured_over_plan": None if peak is None or args.use_vllm else round(peak / plan["peak"], 3),
        }
        if args.use_vllm:
            trainer.vllm_generation.close()
        return result


def run(words: list[str]) -> dict[str, Any]:
    """The case, from its command line."""
    args, policy = parse((StepArguments, PolicyArguments), words, description=__doc__)
    logging.basicConfig(level=logging.WARNING)
    return measure(args, policy)
