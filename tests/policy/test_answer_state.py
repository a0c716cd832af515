"""The answer state: read at one place, in every call, for every family."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from trl.trainer.utils import add_fused_lm_head

from r2ec_trl.policy.answer_state import (
    add_answer_state,
    answer_position,
    encode_states,
    pad_left,
    pad_right,
    select_answer_state,
)
from r2ec_trl.policy.shared_prompt import shares_prompts


def test_position_is_the_last_attended_one_on_either_side_of_padding():
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1], [1, 0, 0, 0], [0, 1, 1, 0]])
    assert answer_position(mask).tolist() == [2, 3, 0, 2]
    assert answer_position(mask.bool()).tolist() == [2, 3, 0, 2]
    hidden = torch.arange(16.0).view(4, 4, 1)
    assert select_answer_state(hidden, mask).flatten().tolist() == [2, 7, 8, 14]


def test_padding_on_either_side():
    ids, mask = pad_right([[5], [6, 7, 8]], 9, "cpu")
    assert ids.tolist() == [[5, 9, 9], [6, 7, 8]] and mask.tolist() == [[1, 0, 0], [1, 1, 1]]
    ids, mask = pad_left([[5], [6, 7, 8]], 9, "cpu")
    assert ids.tolist() == [[9, 9, 5], [6, 7, 8]] and mask.tolist() == [[0, 0, 1], [1, 1, 1]]


@pytest.fixture
def batch():
    """Three rows of a loss pass: prompts left-padded, completions right-padded, as TRL lays them out."""
    torch.manual_seed(0)
    lengths = [(9, 4), (4, 7), (12, 1)]
    prompts = [torch.randint(4, 300, (p,)).tolist() for p, _ in lengths]
    completions = [torch.randint(4, 300, (c,)).tolist() for _, c in lengths]
    ids = torch.zeros(3, 12 + 7, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        span = slice(12 - len(prompt), 12 + len(completion))
        ids[row, span], mask[row, span] = torch.tensor(prompt + completion), 1
    return [p + c for p, c in zip(prompts, completions, strict=True)], ids, mask


def test_loss_pass_and_reward_pass_agree(tiny_model, model_family, batch):
    sequences, ids, mask = batch
    model = tiny_model(model_family)
    add_fused_lm_head(model)
    add_answer_state(model)
    with torch.no_grad():
        rewarded = encode_states(model, sequences, pad_token_id=0)
        loss_pass = model(input_ids=ids, attention_mask=mask, labels=ids, fused_lm_head=True).answer_state
        alone = torch.cat([encode_states(model, [sequence], pad_token_id=0) for sequence in sequences])
    assert (rewarded - loss_pass).abs().max() < 1e-5
    assert (rewarded - alone).abs().max() < 1e-5
    assert (rewarded[0] - rewarded[1]).abs().max() > 0.1


def test_a_model_that_another_trainer_patches_later_still_hands_out_its_states(tiny_model, batch):
    """The warm start and then RecPO on the same model object: TRL's patch goes over ours."""
    sequences, ids, mask = batch
    model = tiny_model("llama")
    add_answer_state(model)
    expected = encode_states(model, sequences, pad_token_id=0).detach()
    for _ in range(2):
        add_fused_lm_head(model)
        add_answer_state(model)
        states = model(input_ids=ids, attention_mask=mask, labels=ids, fused_lm_head=True).answer_state
        assert (states - expected).abs().max() < 1e-5
        assert torch.equal(encode_states(model, sequences, pad_token_id=0), expected)
    forward = model.forward
    add_answer_state(model)
    assert model.forward == forward


def test_padding_and_batches_leave_no_trace_in_the_gradient(tiny_model, batch):
    sequences, _, _ = batch
    gradients = []
    for budget in (10_000, 1):
        model = tiny_model("llama")
        add_answer_state(model)
        encode_states(model, sequences, pad_token_id=0, token_budget=budget).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.model.parameters()]))
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[0].norm() and gradients[0].norm() > 0


def test_states_come_back_in_order_as_fp32(tiny_model):
    model = tiny_model("llama").bfloat16()
    add_answer_state(model)
    sequences = [[5] * 3, [6] * 30, [7], [8] * 11]
    with torch.no_grad():
        states = encode_states(model, sequences, pad_token_id=0, token_budget=40)
        assert states.dtype == torch.float32
        for row, sequence in enumerate(sequences):
            one = encode_states(model, [sequence], pad_token_id=0)[0]
            assert torch.cosine_similarity(states[row], one, dim=0) > 0.999


def test_the_lm_head_is_not_run_and_the_cache_is_off(tiny_model):
    model = tiny_model("llama")
    add_answer_state(model)
    calls = []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    ids = torch.tensor([[5, 6, 7]])
    output = model(input_ids=ids, attention_mask=torch.ones_like(ids), answer_state_only=True)
    assert not calls and output.answer_state.shape == (1, 64) and output.loss is None
    model(input_ids=ids)
    assert calls


def test_works_through_an_adapter_patched_before_or_after(tiny_model):
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear", init_lora_weights=False)
    states = []
    for first in (True, False):
        base = tiny_model("llama")
        if first:
            add_answer_state(base)
        torch.manual_seed(0)
        model = get_peft_model(base, lora)
        if not first:
            add_answer_state(base)
        with torch.no_grad():
            states.append(encode_states(model, [[5, 6, 7]], pad_token_id=0))
            with model.disable_adapter():
                states.append(encode_states(model, [[5, 6, 7]], pad_token_id=0))
    assert torch.equal(states[0], states[2]) and torch.equal(states[1], states[3])
    assert not torch.allclose(states[0], states[1])


def test_generation_is_unchanged(tiny_model, model_family):
    ids = torch.tensor([[20, 30, 40, 50]])
    model, plain = tiny_model(model_family), tiny_model(model_family)
    add_fused_lm_head(model)
    add_answer_state(model)
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(model.generate(ids, **settings), plain.generate(ids, **settings))


def test_gradient_checkpointing_gives_the_same_state_and_gradient(tiny_model, batch):
    _, ids, mask = batch
    results = []
    for checkpoints in (False, True):
        model = tiny_model("qwen2").train()
        add_fused_lm_head(model)
        add_answer_state(model)
        if checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        state = model(input_ids=ids, attention_mask=mask, labels=ids, fused_lm_head=True).answer_state
        state.square().sum().backward()
        results.append((state.detach(), model.model.layers[0].mlp.up_proj.weight.grad))
    assert torch.allclose(results[0][0], results[1][0], atol=1e-6)
    assert torch.allclose(results[0][1], results[1][1], atol=1e-5)


@pytest.mark.parametrize("window", [None, 8])
def test_what_all_sequences_start_with_is_computed_once(tiny_model, model_family, window):
    """20 tokens that 6 sequences share: 20 + the rest are forwarded, and the states are those of each by itself."""
    torch.manual_seed(0)
    options = {"sliding_window": window} if window and model_family == "gemma2" else {}
    model = tiny_model(model_family, **options)
    add_answer_state(model)
    start = torch.randint(4, 300, (20,)).tolist()
    sequences = [start + torch.randint(4, 300, (length,)).tolist() for length in (9, 3, 14, 14, 1, 7)]
    assert shares_prompts(model)  # tries it once
    shapes = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    with torch.no_grad():
        states = encode_states(model, sequences, 0)
        assert shapes == [(1, 20), (6, 14)]
        alone = torch.cat([encode_states(model, [sequence], 0) for sequence in sequences])
        batched = encode_states(model, sequences, 0, token_budget=28)  # each batch goes on from the start as it was
        same = encode_states(model, [start] * 4, 0)  # one token of each is left to read
    assert (6, 14) in shapes and (2, 14) in shapes and (batched - alone).abs().max() < 1e-5
    assert (states - alone).abs().max() < 1e-5
    assert shapes[-2:] == [(1, 19), (4, 1)] and (same[0] - same[3]).abs().max() < 1e-5
    shapes.clear()
    encode_states(model, sequences, 0)  # with gradient: every process takes one forward
    assert shapes == [(6, 34)]
    model.train()
    model.gradient_checkpointing_enable()
    with torch.no_grad():
        checkpointed = encode_states(model, sequences, 0)
    assert shapes[1:] == [(6, 34)] and (checkpointed - alone).abs().max() < 1e-5


def test_a_second_call_can_only_switch_sharing_off(tiny_model):
    model = tiny_model("llama")
    for wanted, shares in ((True, True), (False, False), (True, False)):
        add_answer_state(model, shared_prompt=wanted)
        assert shares_prompts(model) == shares
