"""Greedy reasoning with transformers ends where sampling does, and says nothing after the marker."""

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList

from r2ec_trl.policy.generation import MarkerCriteria, generate_reasoning, stop_generate_at_marker
from r2ec_trl.policy.rollouts import MarkerReader

MARKER = "<answer>"


@pytest.fixture(scope="module")
def reader(chat_tokenizer):
    return MarkerReader(chat_tokenizer, MARKER)


@pytest.fixture(scope="module")
def ids_of(chat_tokenizer):
    return lambda text: chat_tokenizer(text, add_special_tokens=False)["input_ids"]


def bytes_of(tokenizer, text) -> list[int]:
    """One token a byte: never what the tokenizer itself would write."""
    return [token for character in text for token in tokenizer(character, add_special_tokens=False)["input_ids"]]


@pytest.mark.parametrize("marker", [MARKER, "【推荐答案】", "Final answer:"])
def test_criteria_see_the_newest_marker_only_behind_the_prompt(chat_tokenizer, ids_of, marker):
    """The longest spelling, a token a byte, must fit into the window that is read at each step."""
    reader = MarkerReader(chat_tokenizer, marker)
    spelled = [t for c in marker for t in chat_tokenizer(c, add_special_tokens=False)["input_ids"]]
    prompt, words = ids_of(f"Write {marker} at the end."), ids_of("guitar")
    rows = [prompt + words * 30 + spelled, prompt + words * 30 + spelled[:-1] + words]
    length = max(map(len, rows))
    criteria = MarkerCriteria(reader, len(prompt))
    batch = torch.tensor([words[:1] * (length - len(row)) + row for row in rows])
    assert criteria(batch, None).tolist() == [True, False]
    assert MarkerCriteria(reader, len(prompt))(torch.tensor([prompt]), None).tolist() == [False]
    again = torch.tensor([ids_of(f"Write {marker}") + ids_of(marker[-1])])  # only the prompt has it, close by
    assert MarkerCriteria(reader, again.shape[1] - 1)(again, None).tolist() == [False]


class Forced:
    """A logits processor that spells a script a row, whatever the model would say: real `generate`, chosen tokens."""

    def __init__(self, prompt_length, scripts):
        self.prompt_length, self.scripts, self.steps = prompt_length, scripts, 0

    def __call__(self, input_ids, scores):
        self.steps += 1
        at = input_ids.shape[1] - self.prompt_length
        forced = torch.full_like(scores, -torch.inf)
        for row, script in enumerate(self.scripts):
            forced[row, script[at % len(script)]] = 0.0
        return forced


def force(monkeypatch, model, scripts):
    """Make `model.generate` write the scripts, and count its steps."""
    inner, forced = model.generate, []

    def generate(*args, **kwargs):
        forced.append(Forced(kwargs["input_ids"].shape[1], scripts))
        return inner(*args, logits_processor=LogitsProcessorList([forced[-1]]), **kwargs)

    monkeypatch.setattr(model, "generate", generate)
    return forced


def test_generate_stops_each_row_at_the_marker(tiny_model, reader, ids_of, chat_tokenizer, monkeypatch):
    model, words, marker, eos = tiny_model("llama"), ids_of("drum"), ids_of(MARKER), chat_tokenizer.eos_token_id
    scripts = [words + marker + words * 20, words + [eos] + words * 20, marker + words * 20]
    forced = force(monkeypatch, model, scripts)
    stop_generate_at_marker(model, reader)
    prompt = torch.tensor([ids_of(f"Write {MARKER}")] * 3)
    output = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        generation_config=GenerationConfig(max_new_tokens=40, do_sample=False, eos_token_id=eos, pad_token_id=0),
    )[:, prompt.shape[1] :].tolist()
    assert forced[0].steps == len(words + marker)  # the slowest row; nothing runs on to the limit
    assert output[0] == words + marker
    assert output[1][: len(words) + 1] == words + [eos] and set(output[1][len(words) + 1 :]) <= {0}
    assert output[2][: len(marker)] == marker and set(output[2][len(marker) :]) <= {0}


def test_own_stopping_criteria_still_count(tiny_model, reader, ids_of, monkeypatch):
    model, words = tiny_model("llama"), ids_of("drum")
    force(monkeypatch, model, [words])
    stop_generate_at_marker(model, reader)
    prompt = torch.tensor([words])
    stop = [lambda ids, scores, **kwargs: torch.tensor([ids.shape[1] >= prompt.shape[1] + 2])]
    output = model.generate(inputs=None, input_ids=prompt, max_new_tokens=9, stopping_criteria=stop, pad_token_id=0)
    assert output.shape[1] == prompt.shape[1] + 2


def test_greedy_reasoning_ends_where_sampling_does(
    make_trainer, tiny_model, reader, ids_of, chat_tokenizer, monkeypatch
):
    """The same tokens, written once by TRL's sampler in the trainer and once by the greedy evaluator."""
    trainer = make_trainer(peft=False, num_generations=4, per_device_train_batch_size=4, max_completion_length=12)
    words, marker, eos, pad = ids_of("drum"), ids_of(MARKER), chat_tokenizer.eos_token_id, chat_tokenizer.pad_token_id
    spelled = bytes_of(chat_tokenizer, MARKER)
    scripts = [words + spelled + words * 9, words + [eos] + words * 9, words * 12, words + [pad] + marker + words]
    messages = [[{"role": "user", "content": "drum"}]] * 4
    force(monkeypatch, trainer.model, scripts)
    trainer.model.train()
    rolled = trainer.roll_out(messages)
    ids, sampled, prompt_ids = rolled["completion_ids"], rolled["_rollout"], rolled["prompt_ids"]
    greedy = generate_reasoning(trainer.model, reader, prompt_ids, max_new_tokens=12)
    assert [rollout.ids for rollout in greedy] == ids == [rollout.ids for rollout in sampled]
    assert greedy == sampled
    assert [rollout.has_marker for rollout in greedy] == [True, False, False, True]
    assert [rollout.truncated for rollout in greedy] == [False, False, True, False]


def test_greedy_reasoning_does_not_depend_on_the_batch(tiny_model, reader, model_family):
    """Left padding, batching by length and the order of the prompts change nothing."""
    torch.manual_seed(1)
    model = tiny_model(model_family)
    prompts = [torch.randint(10, 300, (length,)).tolist() for length in (5, 30, 11, 18)]
    together = generate_reasoning(model, reader, prompts, max_new_tokens=6)
    alone = [generate_reasoning(model, reader, [ids], max_new_tokens=6)[0] for ids in prompts]
    assert together == alone == generate_reasoning(model, reader, prompts, max_new_tokens=6, batch_tokens=40)


@pytest.mark.parametrize("ours", [True, False])
def test_a_watch_is_told_whose_tokens_it_sees(tiny_model, reader, monkeypatch, ours):
    """Each prompt in a batch of its own, longest first: the numbers are those of the prompts."""
    model = tiny_model("llama")
    if not ours:
        monkeypatch.setattr("r2ec_trl.policy.generation.settings", lambda *_: None)
    torch.manual_seed(1)
    prompts = [torch.randint(10, 300, (length,)).tolist() for length in (5, 30, 11, 18)]
    plain = generate_reasoning(model, reader, prompts, max_new_tokens=6)
    seen: dict[int, list[int]] = {}
    watch = lambda number, ids: seen.update({number: ids}) or (number == 2 and len(ids) == 3)  # noqa: E731
    watched = generate_reasoning(model, reader, prompts, max_new_tokens=6, batch_tokens=10, watch=watch)
    assert [seen[number] for number in range(4)] == [one.ids[: 3 if n == 2 else 6] for n, one in enumerate(plain)]
    assert watched[2].ids == plain[2].ids[:3] + reader.marker_ids and watched[3] == plain[3]


def test_greedy_reasoning_ignores_the_checkpoints_sampling_settings(tiny_model, reader):
    model = tiny_model("llama")
    plain = generate_reasoning(model, reader, [[20, 30, 40]], max_new_tokens=8)
    model.generation_config.update(do_sample=True, temperature=3.0, repetition_penalty=5.0, top_k=3)
    assert generate_reasoning(model, reader, [[20, 30, 40]], max_new_tokens=8) == plain


def test_sampling_says_all_of_its_distribution(tiny_model, reader):
    """What the checkpoint recommends (here, next to greedy) fills nothing that `sampling` leaves out."""
    model = tiny_model("llama")
    for name, value in (("top_p", 1e-6), ("top_k", 1), ("temperature", 1e-6)):
        setattr(model.generation_config, name, value)
        torch.manual_seed(0)
        drawn = generate_reasoning(model, reader, [[20, 30, 40]] * 8, 8, sampling={"do_sample": True})
        assert len({tuple(rollout.ids) for rollout in drawn}) > 1, name


def test_the_old_name_is_the_same_function():
    from r2ec_trl.rollouts import generate_reasoning as old

    assert old is generate_reasoning


def test_a_second_wrapper_takes_the_place_of_the_first(tiny_model, chat_tokenizer):
    """Two trainers on one model: the second's marker holds, and the decoding loop still serves."""
    model = tiny_model("llama")
    for marker in ("<one>", "<two>"):
        stop_generate_at_marker(model, MarkerReader(chat_tokenizer, marker))
        assert model.generate.by_decoding
    assert not hasattr(model.generate.inner, "inner")
    kept = model.generate.inner
    model.generate = lambda *args, **kwargs: kept(*args, **kwargs)
    stop_generate_at_marker(model, MarkerReader(chat_tokenizer, "<three>"))
    assert not model.generate.by_decoding  # someone else's goes first
