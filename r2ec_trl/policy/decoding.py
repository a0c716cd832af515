"""Decoding without what transformers' `generate` does again at every step: the same tokens, the same distribution."""

import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_managed_module
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from r2ec_trl.policy.answer_state import pad_left
from r2ec_trl.policy.batching import length_sorted_batches
from r2ec_trl.policy.packed_layers import packed_layers
from r2ec_trl.policy.releases import cache_name, is_checkpointing
from r2ec_trl.policy.rollouts import MarkerReader, Watch

logger = logging.getLogger(__name__)

PREFILL_TOKENS = 16_384  # of prompts at once, padding included
GROUPED = "r2ec_grouped"
# whose attention is softmax(q k * scaling, capped) v and nothing else; others keep their own
GROUPED_MODELS = {"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "smollm3", "phi3", "granite", "olmo2"}
COVERED = {
    *("max_new_tokens", "min_new_tokens", "max_length", "min_length", "do_sample", "temperature", "top_k", "top_p"),
    *("min_p", "repetition_penalty", "pad_token_id", "bos_token_id", "eos_token_id", "use_cache", "disable_compile"),
    *("transformers_version", "_from_model_config", "decoder_start_token_id", "is_assistant"),
}
_said: set[str] = set()


def why_not(model: PreTrainedModel) -> str | None:
    """What keeps [`decode`] from serving a model; `None` where it can."""
    config = model.config
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    taken = inspect.signature(type(model).forward).parameters
    if config.is_encoder_decoder or model._is_stateful or not model._supports_default_dynamic_cache():
        return f"{config.model_type} keeps another kind of cache"
    if layers - {"full_attention", "sliding_attention"} or hasattr(config, "vision_config"):
        return f"{config.model_type} has other layers than attention over tokens"
    if missing := {"position_ids", cache_name(model), "logits_to_keep"} - set(taken):
        return f"{config.model_type} takes no {', '.join(sorted(missing))}"
    if is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model):
        return "the weights are sharded"
    if model.training and is_checkpointing(model):
        return "gradient checkpointing is on"
    return None


def settings(model: PreTrainedModel, generation_config: GenerationConfig | None) -> GenerationConfig | None:
    """The settings in force, as `generate` puts them together, if [`decode`] covers the model and them; said once."""
    reason = why_not(model)
    config: Any = None
    if reason is None:
        config, _ = model._prepare_generation_config(generation_config)
        plain = GenerationConfig(**model.generation_config._get_default_generation_params()).to_dict()
        said = {name: value for name, value in config.to_dict().items() if value not in (None, False)}
        other = [name for name, value in said.items() if value != plain.get(name) and name not in COVERED]
        reason = f"{', '.join(sorted(other))} is set" if other else None
        if config.max_new_tokens is None:
            reason = "max_new_tokens is not set"
    if reason is not None:
        if reason not in _said:
            _said.add(reason)
            logger.warning("Rollouts are written by transformers' own, slower `generate`: %s.", reason)
        return None
    return config


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    reader: MarkerReader,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    watch: Watch | None = None,
) -> list[list[int]]:
    """
    Completions of prompts, each up to the token that completes the marker, ends the sequence or is the last allowed.

    A distinct prompt is run once and its cache repeated; the LM head is a 2-D product (a batch of one-token rows makes
    PyTorch copy the weight); of one query a row, attention does not repeat the key heads of its groups; sampling draws
    among the top-k alone; only a token that may end the marker has its row decoded to text; rows that have ended are
    taken out of the batch.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A base model (an adapter's layers in it), for which [`settings`] gave a configuration.
        reader ([`~r2ec_trl.policy.rollouts.MarkerReader`]):
            Knows the marker.
        prompts (`Sequence[Sequence[int]]`):
            Token ids, any lengths.
        config ([`~transformers.GenerationConfig`]):
            From [`settings`].
        watch (`Callable`, *optional*):
            As in [`~r2ec_trl.policy.generation.generate_reasoning`].

    Returns:
        `list[list[int]]`: sampled ids, in the order of the prompts.
    """
    eos = config.eos_token_id
    stop_ids = set(eos if isinstance(eos, list) else [] if eos is None else [eos])
    done: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # whose place in the batch it is
    device = next(model.parameters()).device
    with _two_dimensional_head(model), packed_layers(model, len(prompts), config.max_new_tokens):
        logits, cache, mask = _prefill(model, prompts, config.max_new_tokens)
        width = mask.shape[1] - config.max_new_tokens
        history = torch.zeros_like(mask)
        for row, prompt in enumerate(prompts):
            history[row, width - len(prompt) : width] = torch.tensor(prompt, device=device)
            history[row, : width - len(prompt)] = prompt[0]  # not the pad token, which nobody wrote
        positions = mask.sum(dim=1)  # of the next token
        alive = [True] * len(rows)
        held = _held(model, cache)
        for step in range(config.max_new_tokens):
            tokens = next_tokens(logits, history[:, : width + step], config, step, stop_ids)
            for place, token in enumerate(tokens.tolist()):
                if alive[place]:
                    ids = done[rows[place]]
                    ids.append(token)
                    stopped = watch is not None and bool(watch(rows[place], list(ids)))
                    alive[place] = not (stopped or token in stop_ids or reader.completes(ids))
            if step + 1 == config.max_new_tokens or not any(alive):
                return done
            history[:, width + step], mask[:, width + step] = tokens, 1
            if alive.count(False) * 4 >= len(alive):
                kept = torch.tensor([place for place, lives in enumerate(alive) if lives], device=device)
                cache.batch_select_indices(kept)
                history, mask, positions, tokens = (part[kept] for part in (history, mask, positions, tokens))
                rows = [rows[place] for place in kept.tolist()]
                alive = [True] * len(rows)
            with _grouped_attention(model):
                output = model(
                    input_ids=tokens[:, None],
                    attention_mask=mask[:, : width + step + 1],
                    position_ids=positions[:, None] + step,
                    logits_to_keep=1,
                    **held,
                )
            logits = output.logits[:, -1].float()
    return done


def next_tokens(
    logits: torch.Tensor, history: torch.Tensor, config: GenerationConfig, step: int, stop_ids: set[int]
) -> torch.Tensor:
    """
    One token a row, as transformers' processors and sampling would give it.

    Args:
        logits (`torch.Tensor` of shape `(rows, V)`, float32):
            Of the next token.
        history (`torch.Tensor` of shape `(rows, T)`):
            Ids so far, before a shorter row its first; what the repetition penalty counts.
        config ([`~transformers.GenerationConfig`]):
            do_sample, temperature, top_k, top_p, min_p, repetition_penalty, min_new_tokens.
        step (`int`):
            Tokens sampled before.
        stop_ids (`set[int]`):
            Barred until `min_new_tokens` are written.
    """
    if config.repetition_penalty not in (None, 1.0):
        seen = logits.gather(1, history)
        penalty = config.repetition_penalty
        logits = logits.scatter(1, history, torch.where(seen < 0, seen * penalty, seen / penalty))
    if stop_ids and step < (config.min_new_tokens or 0):
        logits = logits.index_fill(1, torch.tensor(sorted(stop_ids), device=logits.device), -torch.inf)
    if not config.do_sample:
        return logits.argmax(dim=-1)
    top_p, min_p = config.top_p or 1.0, config.min_p or 0.0
    index = None
    if config.top_k or top_p < 1 or min_p > 0:  # best first
        logits, index = logits.topk(min(config.top_k or logits.shape[1], logits.shape[1]), dim=1)
    probabilities = (logits / (config.temperature or 1.0)).softmax(dim=1)
    if top_p < 1:
        before = probabilities.cumsum(dim=1) - probabilities
        probabilities = probabilities.masked_fill(
            (before >= top_p).index_fill(1, before.new_zeros(1).long(), False), 0
        )
    if min_p > 0:
        probabilities = probabilities.masked_fill(probabilities < min_p * probabilities[:, :1], 0)
    drawn = torch.multinomial(probabilities, 1)
    return (drawn if index is None else index.gather(1, drawn))[:, 0]


def _held(model: PreTrainedModel, cache: Cache) -> dict[str, Any]:
    """What every forward gets besides its tokens; experts are not balanced here, over masks that hold the prompt."""
    balanced = {"output_router_logits": False} if getattr(model.config, "output_router_logits", False) else {}
    return {cache_name(model): cache, "use_cache": True, **balanced}


class _Room(DynamicLayer):
    """Keys and values of a layer, `(rows, heads, length, d)`, in memory for all the tokens to come."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, length: int):
        super().__init__()
        self.room, self.length = (keys, values), length
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self._show()

    def _show(self) -> None:
        self.keys, self.values = (room[:, :, : self.length] for room in self.room)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Write behind what is there."""
        end = self.length + key_states.shape[-2]
        for room, states in zip(self.room, (key_states, value_states), strict=True):
            room[:, :, self.length : end] = states
        self.length = end
        self._show()
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some rows."""
        self.room = (self.room[0][indices], self.room[1][indices])
        self._show()


def _prefill(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], more: int
) -> tuple[torch.Tensor, Cache, torch.Tensor]:
    """
    Logits of each prompt's next token `(rows, V)`, a cache with room for `more` tokens, and the mask `(rows, width +
    more)` of what is in it: prompts end at `width`. Distinct prompts alone are run, by length.
    """
    device = next(model.parameters()).device
    distinct = list(dict.fromkeys(tuple(prompt) for prompt in prompts))
    number = {prompt: place for place, prompt in enumerate(distinct)}
    whose = torch.tensor([number[tuple(prompt)] for prompt in prompts], device=device)  # (rows,)
    width = max(map(len, distinct))
    mask = torch.zeros(len(prompts), width + more, dtype=torch.long, device=device)
    for row, prompt in enumerate(prompts):
        mask[row, width - len(prompt) : width] = 1
    rooms: list[Any] = []
    logits: Any = None
    for batch in length_sorted_batches([len(prompt) for prompt in distinct], PREFILL_TOKENS):
        longest = len(distinct[batch[0]])
        ids, seen = pad_left([distinct[which] for which in batch], 0, device)
        cache: Any = Cache(layers=[DynamicLayer() for _ in range(model.config.get_text_config().num_hidden_layers)])
        held = _held(model, cache)
        output = model(
            input_ids=ids,
            attention_mask=seen,
            position_ids=(seen.cumsum(dim=1) - 1).clamp(min=0),
            logits_to_keep=1,
            **held,
        )
        newest = output.logits[:, -1].float()
        place_of = torch.full((len(distinct),), -1, device=device)
        place_of[torch.tensor(batch, device=device)] = torch.arange(len(batch), device=device)
        rows = (place_of[whose] >= 0).nonzero()[:, 0]
        places = place_of[whose[rows]]
        if logits is None:
            logits = newest.new_empty(len(prompts), newest.shape[1])
            for layer in cache.layers:
                shape = (len(prompts), layer.keys.shape[1], width + more)
                rooms.append(tuple(part.new_zeros(*shape, part.shape[-1]) for part in (layer.keys, layer.values)))
        logits[rows] = newest[places]
        for room, layer in zip(rooms, cache.layers, strict=True):
            room[0][rows, :, width - longest : width] = layer.keys[places]
            room[1][rows, :, width - longest : width] = layer.values[places]
    return logits, Cache(layers=[_Room(keys, values, width) for keys, values in rooms]), mask


@contextmanager
def _two_dimensional_head(model: PreTrainedModel) -> Iterator[None]:
    """The LM head sees `(rows, d)` where it would be given `(rows, 1, d)`."""
    head = model.get_output_embeddings()
    flat = head.register_forward_pre_hook(lambda module, args: (args[0].flatten(0, 1), *args[1:]))
    back = head.register_forward_hook(lambda module, args, logits: logits[:, None])
    try:
        yield
    finally:
        flat.remove()
        back.remove()


@contextmanager
def _grouped_attention(model: PreTrainedModel) -> Iterator[None]:
    """[`grouped_attention`] in place of the model's own, for forwards of one query a row."""
    config = model.config
    kept = config._attn_implementation
    if kept not in ("sdpa", "eager") or config.model_type not in GROUPED_MODELS:
        yield
        return
    setattr(config, "_attn_implementation", GROUPED)  # transformers' name, not one of this module's
    try:
        yield
    finally:
        setattr(config, "_attn_implementation", kept)


def grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """
    Attention of one query a row, `(rows, heads, 1, d)`, over `(rows, key heads, T, d)`: the heads of a group are the
    queries of one product, so that nothing is repeated. The mask is boolean, `(rows, 1, 1, T)`.
    """
    rows, heads, _, size = query.shape
    grouped = query.view(rows, key.shape[1], -1, size)  # (rows, key heads, heads of a group, d)
    scores = torch.matmul(grouped, key.transpose(2, 3)).float() * (size**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1).to(value.dtype)
    return torch.matmul(weights, value).reshape(rows, 1, heads, -1), None


AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, sdpa_mask)
