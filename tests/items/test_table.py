"""The item table: rows are encodings, whichever are refreshed; saved and loaded for the same catalogue only."""

import json

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import save

from r2ec_trl.errors import UserError
from r2ec_trl.items.encoding import make_encoder, make_table
from r2ec_trl.items.table import ItemTable
from r2ec_trl.policy.answer_state import add_answer_state
from r2ec_trl.policy.prompts import PromptConfig, Prompts


def counting_encoder(version: float):
    """Row of a prompt = (first token, version): shows which weights a row was encoded with."""

    def encode(sequences):
        encode.calls.append(len(sequences))
        return torch.tensor([[float(ids[0]), version] for ids in sequences])

    encode.calls = []
    return encode


@pytest.fixture
def small() -> ItemTable:
    return ItemTable(["a", "b", "c", "d"], [[1], [2, 2], [3, 3, 3], [4]], similarity="dot")


def test_refresh_of_all_some_and_none(small):
    with pytest.raises(UserError, match="empty"):
        small.rows
    assert small.is_empty and small.num_tokens == 7
    small.refresh(counting_encoder(0.0), [1])
    assert not small.is_empty and small.rows.tolist() == [[1, 0], [2, 0], [3, 0], [4, 0]]  # the first time: everything
    encoder = counting_encoder(1.0)
    small.refresh(encoder, [3, 1])
    assert small.rows.tolist() == [[1, 0], [2, 1], [3, 0], [4, 1]] and encoder.calls == [2]
    small.refresh(encoder, [])
    assert encoder.calls == [2]
    small.refresh(counting_encoder(2.0))
    assert small.rows[:, 1].tolist() == [2, 2, 2, 2]


def test_rows_kept_by_the_trainer_outlive_a_full_refresh(small):
    small.refresh(counting_encoder(0.0))
    kept = small.rows
    small.refresh(counting_encoder(1.0))
    assert kept[:, 1].tolist() == [0, 0, 0, 0]


def test_cosine_rows_have_length_one_and_no_gradient(small):
    table = ItemTable(small.item_ids, small.token_ids)
    weight = torch.ones(2, requires_grad=True)
    table.refresh(lambda sequences: counting_encoder(1.0)(sequences).bfloat16() * weight)
    assert table.rows.dtype == torch.float32 and not table.rows.requires_grad
    assert (table.rows.norm(dim=1) - 1).abs().max() < 1e-6
    table.refresh(counting_encoder(1.0), [2])
    assert table.rows[2].tolist() == pytest.approx([3 / 10**0.5, 1 / 10**0.5])


def test_rows_taken_are_a_copy(small):
    small.refresh(counting_encoder(0.0))
    taken = small.take(range(4))
    small.refresh(counting_encoder(1.0), [0, 1, 2, 3])
    assert taken[:, 1].tolist() == [0, 0, 0, 0] and small.rows[:, 1].tolist() == [1, 1, 1, 1]


def test_a_masked_repeat_is_a_miss_and_the_best_leave_it_out(small):
    """Scores 1, 2, 3, 4: the third of four has rank 2; masked as a repeat it is a miss, rank 5."""
    small.refresh(counting_encoder(0.0))
    state, target, excluded = torch.tensor([[1.0, 0.0]]), torch.tensor([2]), torch.tensor([[2]])
    ranks = [
        small.rank(state, target, temperature=1.0, excluded=excluded, keep_target=kept).rank.item()
        for kept in (True, False)
    ]
    assert ranks == [2, 5] and small.best(state, 3, excluded=excluded)[1].tolist() == [[3, 1, 0]]


@settings(max_examples=60)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=12), st.integers(1, 12))
def test_round_robin_reaches_every_row_and_spares_none_twice(lengths, budget):
    table = ItemTable([str(row) for row in range(len(lengths))], [[0] * length for length in lengths])
    seen: list[int] = []
    for _ in range(len(lengths)):
        rows = table.next_slice(budget)
        assert 1 <= len(rows) <= len(lengths)
        assert len(rows) == 1 or sum(lengths[row] for row in rows) <= budget
        seen += rows
    assert seen == [row % len(lengths) for row in range(len(seen))]  # in order, wrapping: so all of them


def test_round_robin_without_a_budget_or_with_a_large_one(small):
    assert small.next_slice(0) == [] and small.next_slice(-3) == []
    assert small.next_slice(10**9) == [0, 1, 2, 3]
    assert small.next_slice(3) == [0, 1]
    assert small.next_slice(3) == [2]
    assert small.next_slice(3) == [3, 0]


def test_row_indices_name_the_stranger(small):
    assert small.row_indices(["d", "a"]) == [3, 0]
    with pytest.raises(UserError, match="'z' is not in the catalogue of 4 items"):
        small.row_indices(["a", "z"])
    with pytest.raises(UserError, match="'da' is no list"):
        small.row_indices("da")


def test_refuses_repeated_ids_tiny_catalogues_and_unknown_similarities():
    with pytest.raises(UserError, match="'a' is in the catalogue twice"):
        ItemTable(["a", "b", "a"], [[1], [2], [3]])
    with pytest.raises(UserError, match="at least two"):
        ItemTable(["a"], [[1]])
    with pytest.raises(UserError, match="similarity"):
        ItemTable(["a", "b"], [[1], [2]], similarity="euclid")


def test_save_and_load_round_trip(small, tmp_path):
    small.refresh(counting_encoder(0.5))
    assert small.next_slice(3) == [0, 1]
    small.save(tmp_path / "table")
    assert sorted(path.name for path in (tmp_path / "table").iterdir()) == [
        "item_table.json",
        "item_table.safetensors",
    ]
    again = ItemTable(small.item_ids, small.token_ids, similarity="dot")
    again.load(tmp_path / "table")
    assert torch.equal(again.rows, small.rows) and again.text_hash == small.text_hash
    assert again.next_slice(3) == [2]  # the round goes on


def test_load_refuses_another_catalogue_prompt_or_similarity(small, tmp_path):
    small.refresh(counting_encoder(0.5))
    small.save(tmp_path)
    strangers = [
        ItemTable(small.item_ids, small.token_ids, similarity="cosine"),
        ItemTable(["a", "b", "c", "e"], small.token_ids, similarity="dot"),
        ItemTable(small.item_ids, [[1], [2, 2], [3, 3, 3], [5]], similarity="dot"),
        ItemTable(["b", "a", "c", "d"], small.token_ids, similarity="dot"),
    ]
    for table in strangers:
        with pytest.raises(UserError, match="another catalogue, prompt or similarity"):
            table.load(tmp_path)
        assert table.is_empty
    with pytest.raises(UserError, match="holds no item table"):
        small.load(tmp_path / "nowhere")
    (tmp_path / "item_table.safetensors").unlink()
    with pytest.raises(UserError, match="holds no item table"):
        small.load(tmp_path)


def test_an_empty_table_cannot_be_saved(small, tmp_path):
    with pytest.raises(UserError, match="empty"):
        small.save(tmp_path)
    assert not (tmp_path / "item_table.json").exists() or json.loads((tmp_path / "item_table.json").read_text())


def test_bf16_model_gives_fp32_rows_and_batching_changes_nothing(tiny_model, shop, chat_tokenizer, model_family):
    model = tiny_model(model_family)
    add_answer_state(model)
    prompts = Prompts(chat_tokenizer, PromptConfig(), shop["items"])
    table = make_table(prompts, shop["items"], "cosine", "cpu")
    assert all(ids[-len(prompts.marker_ids) :] == prompts.marker_ids for ids in table.token_ids)
    table.refresh(make_encoder(model, prompts, token_budget=16_384))
    whole = table.rows
    table.refresh(make_encoder(model, prompts, token_budget=1))  # each item alone, in the order of the catalogue
    assert (table.rows - whole).abs().max() < 1e-5
    assert len(table.rows) == len(shop["items"])
    table.refresh(make_encoder(model.bfloat16(), prompts, token_budget=16_384))
    assert table.rows.dtype == torch.float32
    assert torch.cosine_similarity(table.rows, whole).min() > 0.9


@pytest.mark.parametrize(
    "name, content",
    [
        ("item_table.json", b"{"),
        ("item_table.json", b"{}"),
        ("item_table.json", b"[]"),
        ("item_table.safetensors", b"123"),
        ("item_table.safetensors", save({"rows": torch.ones(3, 2)})),
        ("item_table.safetensors", save({"rows": torch.full((4, 2), torch.nan)})),
    ],
)
def test_a_damaged_table_is_one_sentence(small, tmp_path, name, content):
    small.refresh(counting_encoder(0.0))
    small.save(tmp_path)
    (tmp_path / name).write_bytes(content)
    fresh = ItemTable(small.item_ids, small.token_ids, small.similarity)
    with pytest.raises(UserError, match="The item table in .* is damaged .*; encode it anew"):
        fresh.load(tmp_path)
    assert fresh.is_empty


def test_a_row_that_is_not_finite_is_named(small):
    """It would never be recommended, and stand before every target."""

    def encoder(sequences):
        return torch.tensor([[1.0, torch.inf if ids[0] == 3 else 0.0] for ids in sequences])

    for table in (small, ItemTable(small.item_ids, small.token_ids)):
        with pytest.raises(UserError, match="state for item 'c' is not finite .1 of 4.; .*bfloat16"):
            table.refresh(encoder)
        table.refresh(counting_encoder(0.0))
        with pytest.raises(UserError, match="state for item 'c' is not finite .1 of 2."):
            table.refresh(encoder, [3, 2])
        assert table.rows.isfinite().all()
