"""Ready sequences and the JSON-lines reader below them: exact rows, damage located, bad rows counted."""

import gzip
import json
from collections import Counter

import polars as pl
import pytest

from r2ec_trl.data import cut_dataset, import_sequences, validate_dataset
from r2ec_trl.data.sources.jsonl import ROW, UNREADABLE, read_jsonl
from r2ec_trl.errors import UserError

ITEM_LINES = [
    '{"item_id": "a", "title": "Ant", "brand": "x"}',
    '{"item_id": 2, "title": "Bee", "notes": ["one", "two"], "price": 2.50}',
    '{"item_id": "c/../d", "title": "Cat", "brand": null}',
]
TRAIN = '{"user_id": "u1", "history": ["a", 2], "target": "c/../d"}'
OTHER = '{"user_id": 7, "history": ["c/../d"], "target": 2, "extra": [1]}'


def write(folder, train=(TRAIN,), items=tuple(ITEM_LINES), valid=(OTHER,), test=(OTHER,)):
    folder.mkdir(exist_ok=True)
    for name, lines in {"train": train, "valid": valid, "test": test, "items": items}.items():
        (folder / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return folder


def test_exact_rows(tmp_path):
    dataset = import_sequences(write(tmp_path / "in"))
    validate_dataset(dataset, "in")
    assert dataset["train"].to_list() == [{"user_id": "u1", "history": ["a", "2"], "target": "c/../d"}]
    assert dataset["test"].to_list() == [{"user_id": "7", "history": ["c/../d"], "target": "2"}]
    assert dataset["items"].to_list() == [
        {"item_id": "a", "title": "Ant", "brand": "x", "notes": None, "price": None},
        {"item_id": "2", "title": "Bee", "brand": None, "notes": "one two", "price": "2.5"},
        {"item_id": "c/../d", "title": "Cat", "brand": None, "notes": None, "price": None},
    ]


def test_optional_columns(tmp_path):
    row = {**json.loads(TRAIN), "history_ratings": ["5", 3.5], "history_timestamps": [1, 2], "timestamp": 3}
    dataset = import_sequences(write(tmp_path / "in", train=[json.dumps(row)]))
    assert dataset["train"][0] == {**row, "history": ["a", "2"], "history_ratings": [5.0, 3.5]}
    assert dataset["test"].column_names == ["user_id", "history", "target"]


def test_gzip_and_other_names(tmp_path):
    folder = write(tmp_path / "in")
    (folder / "valid.jsonl").rename(folder / "validation.jsonl")
    plain = import_sequences(folder)
    for name in ("train", "items"):
        with gzip.open(folder / f"{name}.jsonl.gz", "wb") as file:
            file.write((folder / f"{name}.jsonl").read_bytes())
        (folder / f"{name}.jsonl").unlink()
    packed = import_sequences(folder)
    assert {name: split.to_list() for name, split in packed.items()} == {
        name: split.to_list() for name, split in plain.items()
    }


BAD_ROWS = [
    ('{"user_id": "u", "history": ["a"], "target": "2"', "row 2: not a JSON object"),
    ("[1, 2]", "row 2: not a JSON object"),
    ('{"user_id": "u", "history": 5, "target": "2"}', "row 2: 'history' holds a int instead of a list"),
    ('{"user_id": "u", "history": ["a"]}', "row 2 has no target"),
    ('{"user_id": "", "history": ["a"], "target": "2"}', "row 2 has no user_id"),
    ('{"user_id": "u", "history": [], "target": "2"}', "row 2 has an empty history"),
    ('{"user_id": "u", "target": "2"}', "row 2 has an empty history"),
    ('{"user_id": "u", "history": ["a"], "target": "z"}', r"row 2 has a target outside the catalogue \('z'\)"),
    ('{"user_id": "u", "history": ["a", "z"], "target": "2"}', "row 2 has a history item outside the catalogue"),
    ('{"user_id": "u", "history": ["a", null], "target": "2"}', "row 2 has a history item outside the catalogue"),
]


@pytest.mark.parametrize("line, sentence", BAD_ROWS)
def test_bad_rows_are_named_or_counted(tmp_path, line, sentence):
    folder = write(tmp_path / "in", train=[TRAIN, line, TRAIN])
    with pytest.raises(UserError, match=sentence) as caught:
        import_sequences(folder)
    assert "train.jsonl" in str(caught.value) and "--skip_bad_rows" in str(caught.value)
    dropped = Counter()
    assert len(import_sequences(folder, skip_bad_rows=True, dropped=dropped)["train"]) == 2
    assert sum(dropped.values()) == 1


@pytest.mark.parametrize(
    "wrong", [{"timestamp": "soon"}, {"history_ratings": [1]}, {"history_ratings": [1, "x"]}, {"timestamp": None}]
)
def test_wrong_optional_values(tmp_path, wrong):
    good = {**json.loads(TRAIN), "timestamp": 3, "history_ratings": [1, 2]}
    folder = write(tmp_path / "in", train=[json.dumps(good), json.dumps({**good, **wrong})])
    with pytest.raises(UserError, match=f"row 2 has a {[*wrong][0]} that does not fit"):
        import_sequences(folder)


@pytest.mark.parametrize(
    "line, sentence",
    [
        ('{"item_id": "e"}', "row 4 has no title"),
        ('{"title": "E"}', "row 4 has no item_id"),
        ('{"item_id": "a", "title": "E"}', r"row 4 repeats an item_id \('a'\)"),
        ("{", "row 4: not a JSON object"),
    ],
)
def test_bad_items(tmp_path, line, sentence):
    folder = write(tmp_path / "in", items=[*ITEM_LINES, line])
    with pytest.raises(UserError, match=sentence):
        import_sequences(folder)
    dropped = Counter()
    assert len(import_sequences(folder, skip_bad_rows=True, dropped=dropped)["items"]) == 3
    assert sum(dropped.values()) == 1


def test_missing_and_empty_files(tmp_path):
    folder = write(tmp_path / "in", test=[])
    with pytest.raises(UserError, match="test.jsonl is empty"):
        import_sequences(folder)
    (folder / "test.jsonl").unlink()
    with pytest.raises(UserError, match="has no file test.jsonl"):
        import_sequences(folder)
    folder = write(tmp_path / "in", train=["{"])
    with pytest.raises(UserError, match="no row is left"):
        import_sequences(folder, skip_bad_rows=True)


def test_damaged_gzip_is_located(tmp_path):
    packed = gzip.compress(b"".join(b'{"a": "%d"}\n' % row for row in range(50_000)))
    for name, content in {"cut": packed[:-20_000], "wrong": packed[:-500] + b"x" * 100 + packed[-400:]}.items():
        path = tmp_path / f"{name}.jsonl.gz"
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"{name}.jsonl.gz is damaged after row \d+") as caught:
            list(read_jsonl(path, {"a": pl.String}, block_bytes=10_000))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("block_bytes", [1, 7, 40, 1000])
def test_blocks_do_not_matter(tmp_path, block_bytes):
    lines = ['{"a": "é\\n", "b": 1}', "", '{"b": 2.0}', "  ", '{"a": {"k": [1]}, "b": null}', "oops", '{"a": 5}']
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    dropped = Counter()
    blocks = read_jsonl(
        path, {"a": pl.String, "b": pl.String}, skip_bad_rows=True, dropped=dropped, block_bytes=block_bytes
    )
    assert pl.concat(blocks).rows() == [("é\n", "1", 1), (None, "2", 3), ('{"k": [1]}', None, 5), ("5", None, 7)]
    assert dropped == {UNREADABLE: 1}


def test_fast_and_slow_reading_agree(tmp_path):
    """A blank line sends the block to Python's parser: the values must be those of polars."""
    values = ['"x"', "1", "2.5", "3.0", "true", "null", '["a", "b\\"c"]', '{"k": "v"}', "12345678901"]
    lines = [f'{{"a": {value}, "l": [{value}]}}' for value in values if not value.startswith(("[", "{"))]
    lines.append('{"a": "first of two", "l": [], "a": "second"}')
    (tmp_path / "fast.jsonl").write_text("\n".join(lines))
    (tmp_path / "slow.jsonl").write_text("\n\n".join(lines))
    schema = {"a": pl.String, "l": pl.List(pl.String)}
    fast, slow = (pl.concat(read_jsonl(tmp_path / f"{name}.jsonl", schema)) for name in ("fast", "slow"))
    assert fast.drop(ROW).equals(slow.drop(ROW), null_equal=True)
    assert slow[ROW].to_list() == list(range(1, 2 * len(lines), 2))


def shop():
    """Targets: a 3 times, b 2, c 2, d 1. A history that loses more than half is a row dropped."""
    rows = [
        ("u1", ["b", "d"], "a"),
        ("u2", ["d", "d", "b"], "a"),
        ("u3", ["b"], "c"),
        ("u3", ["b", "c"], "d"),
    ]
    from datasets import Dataset, DatasetDict

    def split(chosen):
        return Dataset.from_dict(
            {
                "user_id": [row[0] for row in chosen],
                "history": [row[1] for row in chosen],
                "history_timestamps": [list(range(len(row[1]))) for row in chosen],
                "target": [row[2] for row in chosen],
            }
        )

    held_out = [("u4", ["a"], "b"), ("u5", ["a"], "c")]
    items = Dataset.from_dict({"item_id": list("dcba"), "title": list("DCBA")})
    return DatasetDict(
        train=split(rows),
        validation=split(held_out),
        test=split([("u6", ["b"], "a"), ("u6", ["a"], "b")]),
        items=items,
    )


def test_cut_by_hand():
    dropped = Counter()
    cut = cut_dataset(shop(), max_items=3, dropped=dropped)
    validate_dataset(cut, "cut")
    assert cut["items"]["item_id"][:] == ["c", "b", "a"]
    assert cut["train"].to_list() == [
        {"user_id": "u1", "history": ["b"], "history_timestamps": [0], "target": "a"},
        {"user_id": "u3", "history": ["b"], "history_timestamps": [0], "target": "c"},
    ]
    assert {name: len(split) for name, split in cut.items()} == {"train": 2, "validation": 2, "test": 2, "items": 3}
    assert dict(dropped) == {
        "cut: item": 1,
        "cut: row whose target is outside the cut": 1,
        "cut: row that lost more than half of its history": 1,
        "cut: history item outside the cut": 1,
    }


def test_cut_of_users():
    dropped = Counter()
    cut = cut_dataset(shop(), max_users=1, dropped=dropped)
    assert [len(set(cut[split]["user_id"])) for split in ("train", "validation", "test")] == [1, 1, 1]
    assert cut["test"].to_list() == shop()["test"].to_list()
    with pytest.raises(UserError, match="leaves no row in split 'train'"):
        cut_dataset(shop(), max_items=1, dropped=Counter())


@pytest.mark.parametrize("title", ["&nbsp;", "<br>", "\\u200b"])
def test_a_title_that_cleaning_empties_is_a_bad_row(tmp_path, title):
    folder = write(tmp_path / "in", items=[*ITEM_LINES, f'{{"item_id": "x", "title": "{title}"}}'])
    with pytest.raises(UserError, match="items.jsonl, row 4 has no title"):
        import_sequences(folder)
    assert import_sequences(folder, skip_bad_rows=True, dropped=Counter())["items"].num_rows == 3


def test_numbers_in_some_splits_alone_are_told(tmp_path, caplog):
    import_sequences(write(tmp_path / "in", train=[json.dumps({**json.loads(TRAIN), "history_ratings": [5, 3.5]})]))
    assert "no history_ratings in validation and test, so that prompts differ" in caplog.text


def test_keys_without_end_are_one_sentence(tmp_path):
    items = [json.dumps({"item_id": str(n), "title": "T", f"key{n}": 1}) for n in range(2_000)]
    with pytest.raises(UserError, match="row 999: over 1,000 different keys"):
        import_sequences(write(tmp_path / "in", items=items))
