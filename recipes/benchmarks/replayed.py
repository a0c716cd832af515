"""One side of the `step` case, in a process of its own: a trainer whose rollouts are given (public names alone)."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from r2ec_trl import RecPOConfig, RecPOTrainer

VOCABULARY = 2048  # 4.7 M parameters
TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}\n{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte: the length of a text is the length of its prompt."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<eos>", *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", chat_template=TEMPLATE, padding_side="left"
    )


def model() -> LlamaForCausalLM:
    """The same random Llama at every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).float()


def shop(args: dict[str, Any]) -> tuple[Dataset, Dataset]:
    """Items and users of random letters, as long as asked for; the title of one purchase fills the prompt."""
    draw = random.Random(0)

    def text(length: int) -> str:
        return "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=max(1, length)))

    length = args["item_tokens"] - len("Title: \n><answer>")
    items = [{"item_id": f"i{n}", "title": text(length)} for n in range(args["num_items"])]
    purchases = max(1, (args["prompt_tokens"] - 2) // (len("- []\n") + length))
    users = [
        {
            "user_id": f"u{n}",
            "history": [f"i{draw.randrange(args['num_items'])}" for _ in range(purchases)],
            "target": f"i{n}",
        }
        for n in range(args["users"])
    ]
    return Dataset.from_list(items), Dataset.from_list(users)


def sampled(prompt_ids: list[int], number: int, args: dict[str, Any], marker: list[int]) -> list[int]:
    """The number-th rollout of a prompt: random letters of seven eighths of R to R tokens, then the marker."""
    draw = random.Random(f"{prompt_ids[-40:]}{number}")
    length = args["completion_tokens"] - number % 4 * args["completion_tokens"] // 32 - len(marker)
    return [draw.randrange(40, 200) for _ in range(length)] + marker


def reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """Any fixed function of the rollout: both sides get the same advantages."""
    return [(sum(ids) * 37 + len(ids)) % 101 / 101 for ids in completion_ids]


class Watch(TrainerCallback):
    """CPU and wall seconds of the step, its peak memory, and the gradient before the optimizer sees it."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.gradient: list[float] = []
        self.cpu = self.wall = self.peak = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._before = _resident()
        self.peak, self._open = 0.0, True
        threading.Thread(target=self._look, daemon=True).start()
        self._start = time.process_time(), time.perf_counter()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = sorted((name, p) for name, p in self.trainer.model.named_parameters() if p.requires_grad)
        self.gradient = torch.cat([p.grad.flatten() for _, p in named]).tolist()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.cpu, self.wall = time.process_time() - self._start[0], time.perf_counter() - self._start[1]
        self._open = False

    def _look(self) -> None:
        while self._open:
            self.peak = max(self.peak, _resident() - self._before)
            time.sleep(0.005)


def _resident() -> float:
    """MiB of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def make_trainer(args: dict[str, Any], folder: str, watch: Watch, **settings: Any) -> Any:
    """The trainer of a side, on the replayed rollouts."""
    words = tokenizer()
    marker = words("<answer>", add_special_tokens=False)["input_ids"]

    def replay(self: Any, prompt_ids: list[list[int]], *rest: Any, **more: Any) -> tuple[list[list[int]], None]:
        numbers = [sum(other == ids for other in prompt_ids[:row]) for row, ids in enumerate(prompt_ids)]
        return [sampled(ids, n, args, marker) for ids, n in zip(prompt_ids, numbers, strict=True)], None

    GRPOTrainer._generate_single_turn = replay
    items, users = shop(args)
    common = {
        "output_dir": folder,
        "per_device_train_batch_size": args["micro_batch"],
        "gradient_accumulation_steps": args["users"] * args["generations"] // args["micro_batch"],
        "num_generations": args["generations"],
        "max_steps": 1,
        "max_completion_length": args["completion_tokens"],
        "learning_rate": 1e-9,
        "optim": "adamw_torch",
        "bf16": False,
        "use_cpu": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
    }
    torch.manual_seed(1)
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
    prompts = {
        "user_template": "{history}",
        "item_template": "{fields}",
        "item_fields": ["title"],
        "max_history_items": 10_000,
        "max_prompt_length": args["prompt_tokens"] + 200,
        "watch_steps": 0,
        "item_temperature": 0.5,
        "warmup_steps": 0,
    }
    if args["kind"] == "stock":
        twin = RecPOTrainer(
            model(), items, reward, RecPOConfig(**common, **prompts), users, None, words, peft_config=lora
        )
        with_prompts = twin.train_dataset
        torch.manual_seed(1)
        config = GRPOConfig(**common, temperature=twin.args.temperature, top_k=200, disable_dropout=True)
        trainer = GRPOTrainer(
            model(), reward, config, with_prompts, processing_class=words, peft_config=lora, callbacks=[watch]
        )
    else:
        known = {each.name for each in dataclasses.fields(RecPOConfig)}
        settings = {name: value for name, value in settings.items() if name in known}
        config = RecPOConfig(**common, **prompts, **settings)
        trainer = RecPOTrainer(model(), items, reward, config, users, None, words, peft_config=lora, callbacks=[watch])
        if settings.get("shared_prompt") is False:  # the twin encodes the candidates in every micro-step
            loss = trainer.item_term.loss
            trainer.item_term.loss = lambda *words, **more: loss(*words[:4], True)
    watch.trainer = trainer
    return trainer


def side(args: dict[str, Any], folder: str) -> Callable[[str], Any]:
    """What answers `step` and `gradient of …`."""
    watch = Watch()
    trainer = functools.cache(lambda: make_trainer(args, folder, watch, **args["settings"]))

    def answer(wanted: str) -> Any:
        if wanted.startswith("gradient"):
            off = {} if "both" in wanted or args["kind"] == "stock" else {"item_coef": 0.0}
            other = Watch()
            make_trainer(args, folder, other, **args["settings"], **off).train()
            return other.gradient
        trainer().train()
        return {"cpu": watch.cpu, "wall": watch.wall, "peak_mib": watch.peak}

    return answer


def answer_lines(make: Callable[[dict[str, Any], str], Callable[[str], Any]]) -> None:
    """Answer each line of the input with one line; `make` gets the process's settings and a folder of its own."""
    logging.basicConfig(level=logging.ERROR)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        answer = make(json.loads(sys.argv[1]), folder)
        for line in sys.stdin:
            print(json.dumps({"answer": answer(line.strip())}), flush=True)


if __name__ == "__main__":
    answer_lines(side)
