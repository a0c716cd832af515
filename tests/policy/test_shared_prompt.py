"""One forward a group: packed rows give what plain rows give, value and gradient, for every family that takes them."""

import logging

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from trl.trainer.utils import add_fused_lm_head

from r2ec_trl.policy.answer_state import add_answer_state, encode_states
from r2ec_trl.policy.shared_prompt import pack_rows, shared_batches, shares_prompts

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
    "initializer_range": 0.3,
}
WINDOW = {"sliding_window": 4, "initializer_range": 0.1, "query_pre_attn_scalar": 16}  # shorter than the prompts
MIXED = {"layer_types": ["sliding_attention", "full_attention"]}
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 4},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen3": {},
    "gemma2": WINDOW | MIXED | {"attn_logit_softcapping": 5.0},
    "gemma3_text": WINDOW | MIXED,
}


def build(family: str, shared_prompt: bool, **overrides):
    """A patched model in training mode; the same weights at every call."""
    torch.manual_seed(0)
    sizes = (
        SIZES
        if family != "falcon"
        else {k: v for k, v in SIZES.items() if k not in ("head_dim", "num_key_value_heads")}
    )
    config = transformers.AutoConfig.for_model(family, **(sizes | FAMILIES.get(family, {}) | overrides))
    eager = {"attn_implementation": "eager"} if family == "gemma2" else {}
    model = transformers.AutoModelForCausalLM.from_config(config, **eager).float().train()
    add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy"))
    add_answer_state(model, shared_prompt)
    return model


def padded(rows: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    """(prompt, completion) rows as TRL hands them over: prompts padded on the left, completions on the right."""
    left, right = max(len(p) for p, _ in rows), max(len(c) for _, c in rows)
    ids = torch.zeros(len(rows), left + right, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (prompt, completion) in enumerate(rows):
        span = slice(left - len(prompt), left + len(completion))
        ids[row, span], mask[row, span] = torch.tensor(prompt + completion), 1
        labels[row, left : left + len(completion)] = torch.tensor(completion, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def everything(model, rows, **kwargs) -> dict[str, torch.Tensor]:
    """Log-probabilities, entropies, answer states, and the gradient of all three in each trained parameter."""
    model.zero_grad()
    output = model(**padded(rows), fused_lm_head=True, **kwargs)
    torch.manual_seed(1)
    parts = {name: getattr(output, name) for name in ("log_probs", "entropy", "answer_state")}
    sum((part * torch.randn_like(part)).sum() for part in parts.values()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {name: part.detach() for name, part in parts.items()} | {k: g.clone() for k, g in gradients.items()}


def same(one: dict, other: dict) -> None:
    """Equal to 1e-5 of the largest entry."""
    assert one.keys() == other.keys()
    for name in one:
        assert torch.allclose(one[name], other[name], rtol=0, atol=1e-5 * max(1.0, one[name].abs().max())), name


def ragged(seed: int, sizes=(4, 1, 3)) -> list[tuple[list[int], list[int]]]:
    draw = torch.Generator().manual_seed(seed)

    def tokens(low, high):
        return torch.randint(2, 64, (int(torch.randint(low, high, (), generator=draw)),), generator=draw).tolist()

    prompts = [tokens(6, 14) for _ in sizes]
    return [(prompt, tokens(1, 7)) for prompt, size in zip(prompts, sizes, strict=True) for _ in range(size)]


@pytest.fixture(scope="module", params=FAMILIES)
def twins(request):
    return build(request.param, True), build(request.param, False)


def test_packed_rows_equal_plain_ones_in_value_and_gradient(twins):
    shared, flat = twins
    calls = []
    handle = shared.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True
    )
    assert shares_prompts(shared) and not shares_prompts(flat)
    calls.clear()
    rows = ragged(0)
    same(everything(shared, rows), everything(flat, rows))
    handle.remove()
    groups = rows[:4], rows[4:5], rows[5:]
    width = max(len(group[0][0]) - 1 + sum(len(c) + 1 for _, c in group) for group in groups)
    assert len(calls) == 1 and calls[0]["input_ids"].shape == (3, width)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_any_groups(data):
    """Ragged groups, alone or repeated, one token long, without completion tokens, in any order of rows."""
    shared, flat = _llamas
    tokens = st.lists(st.integers(2, 63), min_size=1, max_size=9)
    prompts = data.draw(st.lists(tokens, min_size=1, max_size=3))
    rows = [(p, data.draw(tokens)) for p in prompts for _ in range(data.draw(st.integers(1, 4)))]
    rows = data.draw(st.permutations(rows))
    same(everything(shared, rows), everything(flat, rows))
    with torch.no_grad():
        sequences, lengths = [p + c for p, c in rows], [len(p) for p, _ in rows]
        budget = data.draw(st.integers(1, 60))
        states = encode_states(shared, sequences, 0, budget, lengths)
        assert torch.allclose(states, encode_states(flat, sequences, 0), atol=1e-5)


_llamas = build("llama", True), build("llama", False)


def test_an_adapter_checkpointing_and_frozen_completions():
    """LoRA's own parameters, with layers recomputed in the backward, and rows whose labels are all masked."""
    results, forwarded = [], []
    for shared_prompt in (True, False):
        model = build("qwen3", shared_prompt)
        model.base_model.register_forward_pre_hook(
            lambda module, args, kwargs: forwarded.append(kwargs["input_ids"].numel()), with_kwargs=True
        )
        lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear", init_lora_weights=False)
        torch.manual_seed(2)
        model = get_peft_model(model, lora)
        model.gradient_checkpointing_enable({"use_reentrant": shared_prompt})
        model.enable_input_require_grads()
        rows = ragged(3)
        rows[1] = (rows[0][0], [])
        results.append(everything(model, rows))
        with torch.no_grad():
            results[-1]["encoded"] = encode_states(
                model, [p + c for p, c in rows], 0, 10_000, [len(p) for p, _ in rows]
            )
    same(*results)
    *_, shared, flat_loss, flat = forwarded  # the reward pass packs through the adapter too
    assert shared < flat == flat_loss


def test_no_label_at_all_still_has_a_gradient():
    results = [everything(model, [([5, 6, 7], []), ([5, 6, 7], []), ([9], [])]) for model in _llamas]
    same(*results)


def test_a_prompt_is_forwarded_once_and_a_large_group_takes_several_rows():
    rows = [(list(range(2, 52)), [2, 3, 4]) for _ in range(4)]
    sequences, lengths = [p + c for p, c in rows], [50] * 4
    packed = pack_rows(sequences, lengths, 0, "cpu", hidden_size=64)
    assert packed.input_ids.shape == (1, 49 + 4 * 4) and packed.shared
    plain = pack_rows(sequences, lengths, 0, "cpu")
    assert plain.input_ids.shape == (4, 53) and not plain.shared
    long = [[2] * 10 + [3] * 200] * 8  # little to share, much attention: never one dense row
    assert pack_rows(long, [10] * 8, 0, "cpu", hidden_size=32).input_ids.shape == (8, 210)
    assert pack_rows([[5, 6], [7, 8]], [1, 1], 0, "cpu", hidden_size=64).shared is False


def test_batches_keep_groups_whole_and_the_budget():
    sequences = [[1] * 10 + [2] * 5] * 3 + [[3] * 4 + [4]] * 2
    batches = shared_batches(sequences, [10] * 3 + [4] * 2, token_budget=27)
    assert batches == [[0, 1, 2], [3, 4]]
    assert shared_batches(sequences, [10] * 3 + [4] * 2, token_budget=21) == [[0, 1], [2], [3, 4]]


@pytest.mark.parametrize(
    "family, overrides, reason",
    [
        ("mamba", {}, "positions"),
        ("bloom", {"n_layer": 2, "n_head": 2}, "positions"),
        ("falcon", {"alibi": True, "multi_query": True}, "positions"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "layers of another kind"),
        ("gpt_neo", {"attention_types": [[["global", "local"], 1]], "window_size": 16}, "layers of another kind"),
    ],
)
def test_models_that_cannot_fall_back_and_say_so_once(family, overrides, reason, caplog):
    shared, flat = build(family, True, **overrides), build(family, False, **overrides)
    rows = ragged(4)
    with caplog.at_level(logging.WARNING, logger="r2ec_trl"):
        results = [everything(shared, rows) for _ in range(2)]
    same(results[1], everything(flat, rows))
    said = [record.getMessage() for record in caplog.records if "shared_prompt" in record.getMessage()]
    assert len(said) == 1 and reason in said[0]


def test_a_model_that_takes_the_arguments_and_ignores_them_is_found_out():
    model = build("llama", True)
    inner = type(model.base_model).forward

    def ignores_positions(self, *args, position_ids=None, **kwargs):
        return inner(self, *args, **kwargs)

    model.base_model.forward = ignores_positions.__get__(model.base_model)
    assert not shares_prompts(model)


def test_experts_that_are_balanced_see_rows_one_by_one():
    """The balance is counted over a two-dimensional mask, so no prompt is shared; by setting or by argument."""
    rows = [(list(range(2, 12)), [2, 3, 4])] * 3
    for by_setting in (True, False):
        model = build("mixtral", True, num_local_experts=4, output_router_logits=by_setting)
        shapes = []
        model.base_model.register_forward_pre_hook(
            lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
        )
        options = {} if by_setting else {"output_router_logits": True}
        model(**padded(rows), fused_lm_head=True, **options)
        model(**padded(rows), fused_lm_head=True, **{"output_router_logits": False})
        assert shapes[0] == (3, 13) and (1, 9 + 3 * 4) in shapes[1:], by_setting


def test_a_label_on_padding_is_none():
    rows = ragged(3)
    batch, model = padded(rows), _llamas[0]
    labelled = {**batch, "labels": batch["labels"].masked_fill(batch["attention_mask"] == 0, 0)}
    with torch.no_grad():
        plain, other = (model(**one, fused_lm_head=True) for one in (batch, labelled))
    assert torch.equal(plain.log_probs, other.log_probs) and torch.equal(plain.answer_state, other.answer_state)


def test_trying_it_leaves_every_module_in_its_mode():
    model = build("llama", True)
    model.base_model.norm.eval()
    modes = [module.training for module in model.modules()]
    assert shares_prompts(model)
    assert [module.training for module in model.modules()] == modes and True in modes and False in modes
