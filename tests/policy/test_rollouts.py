"""Where a rollout ends: at the token that completes the marker, for sampling and greedy evaluation alike."""

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from r2ec_trl.policy.batching import length_sorted_batches
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


def end_by_scan(reader, ids):
    """The plain twin of `MarkerReader.end`."""
    for count in range(1, len(ids) + 1):
        if reader.marker in reader.text(ids[:count]):
            return count
    return None


class OverflowTokenizer:
    """Three tokens, one of which goes on after the marker: vocabularies with `>.` or `>\\n` do so."""

    pieces = ["buy <ans", "wer>. And", " more"]
    eos_token_id = pad_token_id = None

    def __call__(self, text, **kwargs):
        return {"input_ids": [0, 1]}

    def decode(self, ids, **kwargs):
        return "".join(self.pieces[i] for i in ids)


# ----------------------------------------------------------------------------------- finding
@settings(max_examples=150)
@given(data=st.data())
def test_end_equals_a_linear_scan(reader, data, chat_tokenizer):
    pieces = ["<", "answer", ">", "<answer", MARKER, "é", "日", " guitar", "<ans", "wer>", "\n"]
    tokens = [bytes_of(chat_tokenizer, piece) for piece in pieces] + [
        chat_tokenizer(piece, add_special_tokens=False)["input_ids"] for piece in pieces
    ]
    tokens += [[token] for token in range(4)] + [[chat_tokenizer("é")["input_ids"][0]]]  # special ones, half a letter
    ids = [i for piece in data.draw(st.lists(st.sampled_from(tokens), max_size=12)) for i in piece]
    assert reader.end(ids) == end_by_scan(reader, ids)


def test_marker_in_the_middle_at_the_start_and_absent(reader, ids_of, chat_tokenizer):
    end_ids = [chat_tokenizer.eos_token_id, chat_tokenizer.pad_token_id]
    words, marker, eos = ids_of("guitar strings"), ids_of(MARKER), [chat_tokenizer.eos_token_id]

    middle = reader.finish(words + marker + words, end_ids)
    assert (middle.ids, middle.trained) == (words + marker, [1] * len(words + marker))
    assert middle.has_marker and not middle.truncated and not middle.overflows

    first = reader.finish(marker + words + marker, end_ids)
    assert (first.ids, first.trained, first.has_marker) == (marker, [1] * len(marker), True)

    ended = reader.finish(words + eos + words, end_ids)
    assert (ended.ids, ended.trained) == (words + marker, [1] * len(words) + [0] * len(marker))
    assert not ended.has_marker and not ended.truncated

    cut = reader.finish(words, end_ids)
    assert cut.ids == words + marker and cut.truncated and not cut.has_marker

    nothing = reader.finish(eos, end_ids)
    assert (nothing.ids, nothing.trained) == (marker, [0] * len(marker))
    assert reader.finish([], end_ids).ids == marker


def test_the_marker_counts_however_it_is_cut_into_tokens(reader, ids_of, chat_tokenizer):
    spelled = bytes_of(chat_tokenizer, MARKER)
    assert len(spelled) > len(ids_of(MARKER)) > 1
    rollout = reader.finish(ids_of("a") + spelled + ids_of("b"), [])
    assert rollout.ids == ids_of("a") + spelled and rollout.has_marker  # sampled ids stay, never written anew


def test_marker_in_the_middle_of_a_token():
    reader = MarkerReader(OverflowTokenizer(), MARKER)
    rollout = reader.finish([2, 0, 1, 2, 2], [])
    assert rollout.ids == [2, 0, 1] and rollout.trained == [1, 1, 1] and rollout.overflows and rollout.has_marker


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 200))
def test_length_sorted_batches_hold_each_index_once_within_the_budget(lengths, budget):
    batches = length_sorted_batches(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = lengths[batch[0]]
        assert longest == max(lengths[i] for i in batch)
        assert len(batch) == 1 or longest * len(batch) <= budget
