"""One side of the `generate` case, in a process of its own: rollouts of given prompts (public names alone)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch
from benchmarks.replayed import answer_lines, shop, tokenizer
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

LORA = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": "all-linear"}
SAMPLING = {"temperature": 1.5, "top_k": 200}
Ask = Callable[[bool], list[list[int]]]  # greedy or not -> completions


def load(args: dict[str, Any]) -> tuple[Any, Any]:
    """Model and tokenizer: of a folder, or random weights of SmolLM2-135M's shape."""
    if args["model"] is not None:
        model = AutoModelForCausalLM.from_pretrained(args["model"], dtype=torch.float32)
        return model, AutoTokenizer.from_pretrained(args["model"], padding_side="left")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).float(), tokenizer()


def prompts(args: dict[str, Any]) -> list[list[int]]:
    """Random ids, each user's G times in a row; lengths P - 10 to P + 5."""
    draw = torch.Generator().manual_seed(1)
    lengths = [args["prompt_tokens"] - 10 + 5 * (user % 4) for user in range(args["users"])]
    each = [torch.randint(300, 40_000, (length,), generator=draw).tolist() for length in lengths]
    return [ids for ids in each for _ in range(args["generations"])]


def adapter(policy: Any) -> Any:
    """Gives the policy's adapter an effect, the same for every side."""
    draw = torch.Generator().manual_seed(2)
    for name, weight in sorted(policy.named_parameters()):
        if "lora_" in name:
            weight.data = torch.randn(weight.shape, generator=draw) * (0.002 if "lora_B" in name else 0.02)
    return policy


def recpo(args: dict[str, Any], folder: str) -> Ask:
    """A RecPO trainer's rollouts, this checkout's or another's."""
    from r2ec_trl import RecPOConfig, RecPOTrainer

    model, words = load(args)
    items, users = shop({"item_tokens": 32, "num_items": 20, "prompt_tokens": 100, "users": 1})
    config = RecPOConfig(
        output_dir=folder,
        per_device_train_batch_size=args["generations"],
        num_generations=args["generations"],
        max_completion_length=args["new_tokens"],
        generation_kwargs={"min_new_tokens": args["new_tokens"]},
        user_template="{history}",
        item_template="{fields}",
        item_fields=["title"],
        bf16=False,
        use_cpu=True,
        report_to="none",
        **SAMPLING,
    )

    def reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        return [0.0] * len(completion_ids)

    trainer = RecPOTrainer(
        model, items, reward, config, users, None, words, peft_config=LoraConfig(**LORA)  # type: ignore[arg-type]
    )
    adapter(trainer.model)

    def ask(greedy: bool) -> list[list[int]]:
        trainer.generation_config.top_k = 1 if greedy else SAMPLING["top_k"]
        return trainer._generate_single_turn(prompts(args), None, {}, args["generations"])[0]

    return ask


def transformers(args: dict[str, Any], folder: str) -> Ask:
    """Transformers' own `generate`."""
    model, words = load(args)
    policy = adapter(get_peft_model(model, LoraConfig(**LORA))).eval()  # type: ignore[arg-type]
    rows, pad = prompts(args), words.pad_token_id
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])

    def ask(greedy: bool) -> list[list[int]]:
        settings = {**SAMPLING, **({"top_k": 1} if greedy else {}), "do_sample": True, "pad_token_id": pad}
        settings |= {"max_new_tokens": args["new_tokens"], "min_new_tokens": args["new_tokens"]}
        config = GenerationConfig(**settings, eos_token_id=words.eos_token_id)
        return policy.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, width:].tolist()

    return ask


def vllm(args: dict[str, Any], folder: str) -> Ask:
    """VLLM's CPU backend, the adapter hot-loaded."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # its CPU seconds are this process's
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    policy = adapter(get_peft_model(load(args)[0], LoraConfig(**LORA)))  # type: ignore[arg-type]
    policy.save_pretrained(folder)
    longest = args["prompt_tokens"] + args["new_tokens"] + 16
    llm = LLM(args["model"], dtype="float32", max_model_len=longest, enable_lora=True, max_lora_rank=8)
    request = LoRARequest("policy", 1, folder)
    given: Any = [{"prompt_token_ids": row} for row in prompts(args)]

    def ask(greedy: bool) -> list[list[int]]:
        llm.reset_prefix_cache()  # an update empties it
        length = {"max_tokens": args["new_tokens"], "ignore_eos": True}
        params = SamplingParams(temperature=0.0, **length) if greedy else SamplingParams(**SAMPLING, **length)
        outputs = llm.generate(given, sampling_params=params, lora_request=request, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return ask


def side(args: dict[str, Any], folder: str) -> Callable[[str], Any]:
    """What answers `greedy` and `step`."""
    ask = {"recpo": recpo, "older": recpo, "transformers": transformers, "vllm": vllm}[args["kind"]](args, folder)

    def answer(wanted: str) -> Any:
        if wanted == "greedy":
            return ask(True)
        start = time.process_time(), time.perf_counter()
        ask(False)
        took = time.process_time() - start[0], time.perf_counter() - start[1]
        return {"cpu": took[0], "wall": took[1], "peak_mib": 0.0}

    return answer


if __name__ == "__main__":
    answer_lines(side)
