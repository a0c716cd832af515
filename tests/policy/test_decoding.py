"""Our decoding against transformers' `generate`: the same tokens when greedy, the same distribution when sampled."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessorList, MixtralConfig
from transformers.generation import logits_process as theirs

from r2ec_trl.policy import decoding
from r2ec_trl.policy.decoding import decode, next_tokens, settings
from r2ec_trl.policy.rollouts import MarkerReader

LENGTHS = (5, 30, 11, 30, 18, 5)


@pytest.fixture(scope="module")
def reader(chat_tokenizer):
    return MarkerReader(chat_tokenizer, "<answer>")


def ragged(lengths=LENGTHS, copies=2):
    torch.manual_seed(1)
    return [ids for length in lengths for ids in [torch.randint(10, 300, (length,)).tolist()] * copies]


def left_padded(prompts):
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    return ids, torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])


def config_of(**options):
    return GenerationConfig(**{"max_new_tokens": 12, "pad_token_id": 0, "do_sample": False, **options})


def run(model, reader, prompts, config):
    """Tokens of ours and of transformers, both without the padding behind an end."""
    ids, mask = left_padded(prompts)
    output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, ids.shape[1] :].tolist()
    return decode(model, reader, prompts, settings(model, config)), output


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.7}, {"min_new_tokens": 6}])
def test_greedy_tokens_are_transformers(tiny_model, model_family, reader, attention, options):
    """
    Ragged left-padded prompts, each twice; Gemma-2's window is smaller than the longest. The penalty without padding,
    where older transformers take the pad token for written.
    """
    prompts = ragged([30] * 6 if "repetition_penalty" in options else LENGTHS)
    window = {"sliding_window": 8} if model_family == "gemma2" else {}
    model = tiny_model(model_family, attn_implementation=attention, **window)
    greedy = decode(model, reader, prompts, settings(model, config_of()))
    end = greedy[2][4]  # a token that some rows write and others do not
    config = config_of(eos_token_id=[end, 301], **options)
    ours, expected = run(model, reader, prompts, config)
    assert [ids + [0] * (len(expected[0]) - len(ids)) for ids in ours] == expected
    assert len({len(ids) for ids in ours}) > 1 or options  # rows end at different steps and leave the batch


def test_a_penalty_counts_no_padding(tiny_model, reader):
    """Each row as if it were alone, though the pad token would be among its best."""
    model, config = tiny_model("qwen2"), config_of(repetition_penalty=1.7)
    together = decode(model, reader, ragged(copies=1), settings(model, config))
    assert together == [decode(model, reader, [ids], settings(model, config))[0] for ids in ragged(copies=1)]
    assert 0 in together[0]


def test_an_adapter_is_decoded_with(tiny_model, reader):
    base = tiny_model("llama")
    plain = decode(base, reader, ragged(), settings(base, config_of()))
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False))
    ours, expected = run(model.get_base_model(), reader, ragged(), config_of())
    assert ours == expected != plain


def test_distinct_prompts_are_run_once_and_ended_rows_leave(tiny_model, reader, monkeypatch):
    model = tiny_model("llama")
    expected = decode(model, reader, ragged(copies=1), settings(model, config_of()))
    shapes = []
    handle = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    config = config_of(eos_token_id=[ids[2] for ids in expected[:3]])
    repeated = decode(model, reader, ragged(copies=4), settings(model, config))
    handle.remove()
    assert shapes[0] == (len(LENGTHS), 30)  # not 24 rows
    assert shapes[1] == (24, 1) and shapes[-1][0] < 24
    for number, ids in enumerate(expected):
        assert all(row == ids[: len(row)] for row in repeated[4 * number : 4 * number + 4])


def test_prompts_are_run_in_batches_of_similar_length(tiny_model, reader, monkeypatch):
    model = tiny_model("llama")
    together = decode(model, reader, ragged(), settings(model, config_of()))
    monkeypatch.setattr(decoding, "PREFILL_TOKENS", 30)
    assert decode(model, reader, ragged(), settings(model, config_of())) == together


def test_the_marker_ends_a_row_and_a_watch_may(tiny_model, reader, chat_tokenizer, monkeypatch):
    model = tiny_model("llama")
    script = chat_tokenizer("drum<answer>drum", add_special_tokens=False)["input_ids"]
    end = len(chat_tokenizer("drum<answer>", add_special_tokens=False)["input_ids"])
    monkeypatch.setattr(
        decoding, "next_tokens", lambda logits, h, c, step, s: torch.full((len(logits),), script[step])
    )
    config = settings(model, config_of(max_new_tokens=len(script)))
    assert decode(model, reader, ragged(), config) == [script[:end]] * 12
    seen = []

    def watch(number, ids):
        seen.append(number)
        return number == 3 and len(ids) == 2

    assert [len(ids) for ids in decode(model, reader, ragged(), config, watch)] == [end, end, end, 2, *[end] * 8]
    assert seen.count(3) == 2 and seen.count(0) == end


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 7},
        {"top_k": 0},
        {"top_k": 40, "top_p": 0.8},
        {"top_k": 0, "top_p": 0.6},
        {"top_k": 0, "min_p": 0.1},
        {"top_k": 30, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.4},
    ],
)
def test_the_distribution_is_transformers(options):
    """20,000 draws of each of two rows against the probabilities that transformers' processors give."""
    torch.manual_seed(0)
    logits = 2 * torch.randn(2, 60)
    history = torch.randint(60, (2, 9))
    kinds = {
        "repetition_penalty": theirs.RepetitionPenaltyLogitsProcessor,
        "top_k": theirs.TopKLogitsWarper,
        "top_p": theirs.TopPLogitsWarper,
        "min_p": theirs.MinPLogitsWarper,
    }
    chain = [kinds[name](options[name]) for name in kinds if options.get(name)]
    chain.insert("repetition_penalty" in options, theirs.TemperatureLogitsWarper(1.3))
    expected = LogitsProcessorList(chain)(history, logits.clone()).softmax(dim=1)  # (2, 60)
    draws = 20_000
    config = GenerationConfig(do_sample=True, temperature=1.3, **{"top_p": 1.0, **options})
    tokens = next_tokens(logits.repeat(draws, 1), history.repeat(draws, 1), config, 0, set()).view(draws, 2)
    counts = torch.stack([tokens[:, row].bincount(minlength=60) for row in range(2)]) / draws
    assert torch.equal(counts > 0, counts * (expected > 0) > 0)  # nothing that is filtered out
    assert (counts - expected).abs().max() < 5 * (0.25 / draws) ** 0.5


def test_what_is_not_covered_is_left_to_transformers_and_said_once(tiny_model, caplog):
    model = tiny_model("llama")
    decoding._said.clear()
    for _ in range(2):
        assert settings(model, config_of(num_beams=3, no_repeat_ngram_size=2)) is None
    assert [record.getMessage() for record in caplog.records] == [
        "Rollouts are written by transformers' own, slower `generate`: no_repeat_ngram_size, num_beams is set."
    ]
    model.train()
    model.gradient_checkpointing_enable()
    assert settings(model, config_of()) is None
    model.gradient_checkpointing_disable()
    assert settings(model, config_of()) is not None


def test_settings_of_the_checkpoint_fill_what_is_not_said(tiny_model):
    model = copy.deepcopy(tiny_model("llama"))
    model.generation_config.update(top_k=3, temperature=0.5)
    merged = settings(model, GenerationConfig(max_new_tokens=4, temperature=0.7, do_sample=True))
    assert (merged.top_k, merged.temperature) == (3, 0.7)


def test_only_a_token_that_may_end_the_marker_is_read(reader, chat_tokenizer, monkeypatch):
    spelled = [t for c in "drum <answer>" for t in chat_tokenizer(c, add_special_tokens=False)["input_ids"]]
    decoded = []
    text = reader.text
    monkeypatch.setattr(reader, "text", lambda ids: decoded.append(len(ids)) or text(ids))
    for _ in range(2):
        assert [reader.completes(spelled[:count]) for count in range(len(spelled) + 1)] == [False] * len(spelled) + [
            True
        ]
    assert sum(count > 1 for count in decoded) <= 4  # `>` and the space, twice


def test_a_penalty_makes_what_was_written_less_likely_whatever_its_sign():
    """-1 times 1.4 is below -1.2, and 1 over 1.4 is below .8: the other token is next."""
    for logits in ([-1.0, -1.2], [1.0, 0.8]):
        config = config_of(repetition_penalty=1.4)
        assert next_tokens(torch.tensor([logits]), torch.tensor([[0]]), config, 0, set()).tolist() == [1]


@pytest.mark.parametrize("softcap", [None, 0.5])
def test_attention_of_one_query_by_hand(softcap):
    """Two heads on one key head, keys 1 and -1 of size one, the third not seen: weights of (q, -q), capped or not."""
    query = torch.tensor([2.0, -0.5]).view(1, 2, 1, 1)
    key, value = torch.tensor([1.0, -1.0, 9.0]).view(1, 1, 3, 1), torch.tensor([10.0, 20.0, 99.0]).view(1, 1, 3, 1)
    mask = torch.tensor([True, True, False]).view(1, 1, 1, 3)
    output, _ = decoding.grouped_attention(None, query, key, value, mask, scaling=0.5, softcap=softcap)
    scores = [torch.tensor([q, -q]) for q in (1.0, -0.25)]
    scores = [softcap * torch.tanh(one / softcap) if softcap else one for one in scores]
    expected = [(one.softmax(0) @ torch.tensor([10.0, 20.0])).item() for one in scores]
    assert output.shape == (1, 1, 2, 1) and output.flatten().tolist() == pytest.approx(expected)


def test_experts_that_are_balanced_in_training_are_not_while_decoding(reader, chat_tokenizer):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MixtralConfig(vocab_size=len(chat_tokenizer), **sizes, num_key_value_heads=1, num_local_experts=4)
    model = AutoModelForCausalLM.from_config(config).eval()
    expected = decode(model, reader, ragged(), settings(model, config_of()))
    model.config.output_router_logits = True
    assert decode(model, reader, ragged(), settings(model, config_of())) == expected
