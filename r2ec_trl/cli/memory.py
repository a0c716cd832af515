"""What a run will need, before anything big is loaded: parameters, memory by part, steps."""

import re
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

GIB = 2**30
# Of the matrix libraries, masks and sampling: what three H100 runs took beyond the formulas
WORKSPACE_BYTES = 0.3 * GIB
LOG_PROB_TILE = 4096 * 32_768  # logits that TRL's fused head holds at once
NF4_BYTES, NF4_DOUBLE_BYTES = 0.5 + 4 / 64, 0.5 + 1 / 64 + 4 / (64 * 256)  # a weight with its share of block scales
STAYS = ("weights", "adapter", "optimizer", "table", "vllm", "workspace")
OPTIMIZER_BYTES = {  # a trained parameter, besides the parameter: None is twice the parameter's own type
    "sgd": 0.0,
    "adafactor": 0.1,
    "adamw_8bit": 2.0,
    "adamw_bnb_8bit": 2.0,
    "paged_adamw_8bit": 2.0,
}


@dataclass(frozen=True)
class ModelShape:
    """
    Sizes of a model, counted on one without storage.

    Args:
        parameters, linear (`int`):
            All parameters; those of linear layers but the LM head, which is what quantisation shrinks.
        adapter (`int`):
            LoRA parameters.
        adapter_inputs (`int`):
            Sum over one layer's adapted modules of their input sizes.
        layers, hidden, intermediate, heads, head_dim, key_value_heads, norms (`int`):
            Layers, d, size of the MLP, attention heads and their size, and norms a layer.
        vocabulary (`int`):
            V.
        eager (`bool`):
            Whether attention builds its matrix of scores.
    """

    parameters: int
    linear: int
    adapter: int
    adapter_inputs: int
    layers: int
    hidden: int
    intermediate: int
    heads: int
    head_dim: int
    key_value_heads: int
    norms: int
    vocabulary: int
    eager: bool


@dataclass(frozen=True)
class Workload:
    """
    What one process does in a step.

    Args:
        prompt_tokens, completion_tokens, item_tokens (`int`):
            Longest user prompt (what a batch is padded to), longest completion, mean item prompt.
        rows, generation_rows (`int`):
            Rollouts of a micro-batch, and generated at once.
        candidates (`int`):
            Item prompts encoded with gradient beside each micro-batch.
        num_items (`int`):
            N.
        forward_tokens (`int`):
            Tokens of one forward without gradient.
    """

    prompt_tokens: int
    completion_tokens: int
    item_tokens: int
    rows: int
    generation_rows: int
    candidates: int
    num_items: int
    forward_tokens: int


@dataclass(frozen=True)
class Precision:
    """
    How weights, adapters and optimizer are held.

    Args:
        weight_bytes (`int`):
            Bytes of a weight as it was loaded.
        quantised (`str`, *optional*):
            `"nf4"`, `"nf4_double"`, `"int8"` or `None`.
        half (`bool`):
            Whether training computes in 16 bits.
        checkpointing (`bool`):
            Gradient checkpointing.
        optimizer (`str`):
            TRL's `optim`.
        processes, zero_stage (`int`):
            Processes, and ZeRO's stage (0: none).
        vllm_bytes (`float`):
            What a colocated vLLM takes for itself.
        vllm_sleeps (`bool`):
            Whether it gives that back while the policy scores and trains.
        own_rollouts (`bool`):
            Whether the policy writes the rollouts itself, which takes a cache; vLLM's, here or on a server, take none.
        table_slices (`int`):
            Processes that share the item table out.
    """

    weight_bytes: int
    quantised: str | None
    half: bool
    checkpointing: bool
    optimizer: str
    processes: int = 1
    zero_stage: int = 0
    vllm_bytes: float = 0.0
    vllm_sleeps: bool = False
    own_rollouts: bool = True
    table_slices: int = 1

    @property
    def compute_bytes(self) -> int:
        """Bytes of an activation."""
        return 2 if self.half or self.weight_bytes == 2 else 4

    @property
    def adapter_bytes(self) -> int:
        """Bytes of a LoRA weight: PEFT keeps them in fp32, but TRL casts those on a quantised base to bf16."""
        return 2 if self.quantised else 4


def empty_model(
    config: PreTrainedConfig, attn_implementation: str | None = None, trust_remote_code: bool = False
) -> Any:
    """A model without storage, to count its parameters and to see its modules."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config, attn_implementation=attn_implementation, trust_remote_code=trust_remote_code
        )


def model_shape(
    config: PreTrainedConfig,
    attn_implementation: str | None = None,
    lora_rank: int = 0,
    lora_modules: str | list[str] | None = None,
    trust_remote_code: bool = False,
) -> ModelShape:
    """
    Count a model's parameters from its config; nothing is allocated. Rank 0 trains all weights; `lora_modules` are
    names of adapted modules, whole or their ends, or PEFT's text: `"all-linear"` or a regular expression.
    """
    model = empty_model(config, attn_implementation, trust_remote_code)
    text = config.get_text_config()
    head = model.get_output_embeddings()
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not head
    }

    def is_adapted(name: str) -> bool:
        if isinstance(lora_modules, str):
            return lora_modules == "all-linear" or re.fullmatch(lora_modules, name) is not None
        return any(f".{name}".endswith(f".{one}") for one in lora_modules or ())

    adapted = [module for name, module in linears.items() if is_adapted(name)]
    inputs = sum(module.weight.shape[0 if isinstance(module, Conv1D) else 1] for module in adapted)
    heads = getattr(text, "num_attention_heads", None) or 1
    norms = sum("norm" in type(module).__name__.lower() for module in model.modules()) // text.num_hidden_layers
    return ModelShape(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        linear=sum(module.weight.numel() for module in linears.values()),
        adapter=lora_rank * sum(sum(module.weight.shape) for module in adapted),
        adapter_inputs=inputs // text.num_hidden_layers,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        heads=heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        key_value_heads=getattr(text, "num_key_value_heads", None) or heads,
        norms=norms,
        vocabulary=text.vocab_size,
        eager=model.config._attn_implementation == "eager",
    )


def layer_activations(shape: ModelShape, precision: Precision, length: int) -> float:
    """
    Bytes a token that one layer keeps for its backward pass.

    Norms keep their fp32 input (and what they scale, where their weight is trained); linear layers theirs (fp32
    adapters under autocast a copy each); attention keeps queries, keys, values and output, each as wide as the
    queries; the gated MLP keeps gate, its activation and up.
    """
    size, width = precision.compute_bytes, shape.heads * shape.head_dim
    norms = 4 * shape.norms * shape.hidden * (1 if shape.adapter else 2)
    inputs = size * (2 * shape.hidden + shape.intermediate)
    if shape.adapter and precision.adapter_bytes > size:
        inputs = size * shape.adapter_inputs
    attention = size * (4 * width + length)
    if shape.eager:  # scores after the soft cap, their softmax in fp32 and in the type of the values
        attention = size * 3 * width + shape.heads * length * (2 * size + 4)
    return norms + inputs + attention + 3 * size * shape.intermediate


def forward_activations(shape: ModelShape, precision: Precision, length: int, autocast: bool) -> float:
    """
    Bytes a token that a forward without gradient holds at its widest point: in the MLP, between gate and up, with the
    adapter's own output beside the base's (in fp32 where nothing casts it down), or in eager attention.
    """
    size = precision.compute_bytes
    wide = 3 * size
    if shape.adapter:
        adapter = size if autocast or precision.adapter_bytes < size else precision.adapter_bytes
        wide = 2 * size + 2 * adapter
    attention = shape.heads * length * (2 * size + 4) if shape.eager else size * length
    return 3 * size * shape.hidden + max(wide * shape.intermediate, attention)


def memory_plan(shape: ModelShape, workload: Workload, precision: Precision) -> dict[str, float]:
    """
    Bytes on one device by part: what stays (`STAYS`), what each phase adds (`generate`, `score`, `train`), and `peak`,
    what stays plus the largest phase.
    """
    size = precision.compute_bytes
    shards = [1 if precision.zero_stage < stage else precision.processes for stage in (1, 2, 3)]
    quantised = {"nf4": NF4_BYTES, "nf4_double": NF4_DOUBLE_BYTES, "int8": 1.0, None: precision.weight_bytes}
    weights = float(
        shape.linear * quantised[precision.quantised] + (shape.parameters - shape.linear) * precision.weight_bytes
    )
    trained = shape.adapter or shape.parameters
    trained_bytes = precision.adapter_bytes if shape.adapter else precision.weight_bytes
    state = OPTIMIZER_BYTES.get(precision.optimizer, 2.0 * trained_bytes)
    buckets = 2 if precision.processes > 1 and precision.zero_stage == 0 else 1  # DDP's
    gradients = buckets * trained * trained_bytes / shards[1]
    casts = 2.0 * shape.parameters if not shape.adapter and precision.half and precision.weight_bytes == 4 else 0.0
    length = workload.prompt_tokens + workload.completion_tokens
    tokens = workload.rows * length
    item_tokens = workload.candidates * workload.item_tokens
    layer = layer_activations(shape, precision, length)
    backward = 4 * size * shape.intermediate  # gradients of the MLP's wide parts
    if precision.checkpointing:
        kept = float(shape.layers * size * shape.hidden * (tokens + item_tokens))
        working = (layer + backward) * max(tokens, item_tokens)
    else:
        kept = shape.layers * layer * (tokens + item_tokens)
        working = backward * max(tokens, item_tokens)
    forward_tokens = min(
        workload.forward_tokens,
        max(workload.generation_rows * length, workload.num_items * workload.item_tokens),
    )
    head = size * min(LOG_PROB_TILE, tokens * shape.vocabulary) + 4 * shape.hidden * tokens
    asleep = precision.vllm_bytes if precision.vllm_sleeps else 0.0
    parts = {
        "weights": weights / shards[2],
        "adapter": shape.adapter * precision.adapter_bytes / shards[2],
        "optimizer": trained * state / shards[0],
        "table": 4.0 * workload.num_items * shape.hidden / precision.table_slices,
        "vllm": precision.vllm_bytes - asleep,
        "workspace": WORKSPACE_BYTES,
        "generate": _generation_bytes(shape, workload, precision) if precision.own_rollouts else asleep,
        "score": forward_tokens * forward_activations(shape, precision, length, precision.half),
        "train": kept + max(working, head) + gradients + casts,
    }
    stays = sum(parts[name] for name in STAYS)
    return {**parts, "peak": stays + max(parts[name] for name in ("generate", "score", "train"))}


def _generation_bytes(shape: ModelShape, workload: Workload, precision: Precision) -> float:
    """Key-value cache of all rollouts at once, plus the wider of reading the prompts and drawing a token."""
    size = precision.compute_bytes
    cache_token = 2 * size * shape.layers * shape.key_value_heads * shape.head_dim
    rows, prompt = workload.generation_rows, workload.prompt_tokens
    cache = rows * (prompt + workload.completion_tokens) * cache_token
    reading = rows * prompt * (cache_token + forward_activations(shape, precision, prompt, autocast=False))
    drawing = cache + rows * shape.vocabulary * 4 * 4
    return max(reading, drawing)


def optimizer_steps(users: int, args: Any) -> dict[str, float]:
    """
    Users of a generation batch, batches and optimizer steps an epoch, users left over, and steps in all, for so many
    rows of the training split.
    """
    batch_users = args.generation_batch_size // args.num_generations
    batches = users // batch_users
    micro_batches = batches * args.steps_per_generation * args.num_iterations
    an_epoch = -(-micro_batches // args.gradient_accumulation_steps)
    total = args.max_steps if args.max_steps > 0 else int(-(-args.num_train_epochs * an_epoch // 1))
    return {
        "users_a_batch": batch_users,
        "batches_an_epoch": batches,
        "steps_an_epoch": an_epoch,
        "users_left_out": users - batches * batch_users,
        "steps": total,
    }
