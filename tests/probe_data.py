"""Inputs of the data room for probe.py: damaged files of every source, nonsense settings, damaged dataset folders."""

import functools
import gzip
import io
import json
import os
import sys
import zipfile
from pathlib import Path

import polars as pl
from probe import inputs

from r2ec_trl.data import load_dataset_folder
from r2ec_trl.errors import UserError

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a name that is nowhere is not looked for
LOG = "user_id,item_id,rating,timestamp\n"
LOG += "".join(
    f"u{user},i{(user + at) % 7},{at % 5 + 1},{100 * user + 10 * at}\n" for user in range(9) for at in range(6)
)
ITEMS = "item_id,title,brand\n" + "".join(f'i{n},"Thing {n}",b{n}\n' for n in range(7))


def _lines(text, number=("rating", "timestamp")):
    head, *rows = (line.split(",") for line in text.replace('"', "").splitlines())
    rows = [dict(zip(head, row)) for row in rows]
    return "".join(json.dumps({k: float(v) if k in number else v for k, v in row.items()}) + "\n" for row in rows)


def _parquet(text):
    file = io.BytesIO()
    pl.read_csv(text.encode()).write_parquet(file)
    return file.getvalue()


def _sequence(user):
    return json.dumps(
        {"user_id": user, "history": ["i0", "i1"], "target": "i2", "timestamp": 5, "history_ratings": [1, 2]}
    )


META, REVIEWS = _lines(ITEMS).replace("item_id", "parent_asin"), LOG.replace("item_id", "parent_asin")
SEQUENCES = {
    f"{name}.jsonl": "".join(_sequence(f"u{n}") + "\n" for n in range(5)) for name in ("train", "valid", "test")
}
NUMBERS = LOG.replace("u", "").replace("i", "").split("\n", 1)[1]
# source -> files that go together; each is damaged in turn
SOURCES = {
    "table": ({"log.csv": LOG, "items.csv": ITEMS}, "--input log.csv --items items.csv"),
    "table tsv": ({"log.tsv": LOG.replace(",", "\t")}, "--input log.tsv"),
    "table jsonl": ({"log.jsonl": _lines(LOG), "items.jsonl": _lines(ITEMS)}, "--input log.jsonl --items items.jsonl"),
    "table parquet": (
        {"log.parquet": _parquet(LOG), "items.parquet": _parquet(ITEMS)},
        "--input log.parquet --items items.parquet",
    ),
    "table gz": ({"log.csv.gz": gzip.compress(LOG.encode(), mtime=0)}, "--input log.csv.gz"),
    "amazon": ({"Toys.csv": REVIEWS, "meta_Toys.jsonl": META}, "--input . --amazon_category Toys"),
    "movielens": (
        {
            "ratings.dat": NUMBERS.replace(",", "::"),
            "movies.dat": "".join(f"{n}::M{n} (1999)::War\n" for n in range(7)),
        },
        "--input .",
    ),
    "movielens csv": (
        {
            "ratings.csv": "userId,movieId,rating,timestamp\n" + NUMBERS,
            "movies.csv": "movieId,title,genres\n" + "".join(f"{n},M{n},War\n" for n in range(7)),
        },
        "--input .",
    ),
    "recbole": ({"x.inter": LOG.replace(",", "\t"), "x.item": ITEMS.replace(",", "\t")}, "--input ."),
    "sequences": ({**SEQUENCES, "items.jsonl": _lines(ITEMS)}, "--input ."),
}


def _zipped(data):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x", data)
    return file.getvalue()


DAMAGES = {
    "nothing": lambda data: data,
    "empty": lambda data: b"",
    "a line end": lambda data: b"\n",
    "first half": lambda data: data[: len(data) // 2],
    "first line": lambda data: data.split(b"\n", 1)[0] + b"\n",
    "without its first line": lambda data: data.split(b"\n", 1)[-1],
    "twice": lambda data: data + data,
    "zip": _zipped,
    "gzip": lambda data: gzip.compress(data, mtime=0),
    "gzip cut": lambda data: gzip.compress(data, mtime=0)[:-9],
    "UTF-16": lambda data: data.decode("latin-1").encode("utf-16"),
    "latin-1": lambda data: data.replace(b"i1", b"\xfc1"),
    "zeros": lambda data: bytes(400),
    "a zero in each id": lambda data: data.replace(b"i1", b"i\x001"),
    "bytes": lambda data: bytes(range(256)) * 9,
    "old line ends": lambda data: data.replace(b"\n", b"\r"),
    "DOS line ends": lambda data: data.replace(b"\n", b"\r\n"),
    "an open quote": lambda data: data.replace(b"i1", b'"i1', 1),
    "stray quotes": lambda data: data.replace(b"i1", b'i"1'),
    "deep": lambda data: data + b"[" * 100_000 + b"\n",
    "deep object": lambda data: data + b'{"item_id": ' * 50_000 + b"\n",
    "a long line": lambda data: data + b"x" * 3_000_000 + b"\n",
    "NaN": lambda data: data.replace(b"i1", b"NaN"),
    "other ids": lambda data: data.replace(b"i", b"j") if b"::" not in data else data.replace(b"1", b"8"),
    "terminal codes": lambda data: data.replace(b"i1", b"\x1b[2Ji1"),
}


@functools.cache
def _recipe():
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))
    import prepare_data

    return prepare_data


def prepare(folder, words):
    """The recipe as `run` calls it, so that a UserError comes out; the folder it wrote must load, each row whole."""
    words = [
        str(folder / word) if (folder / word).exists() and not word.startswith("-") else word for word in words.split()
    ]
    sys.argv = ["prepare_data.py", *words, "--output", str(folder / "out" / "folder")]
    _recipe().main()
    dataset = load_dataset_folder(folder / "out" / "folder")
    assert all(len(rows) for rows in dataset.values()) and [path.name for path in (folder / "out").iterdir()] == [
        "folder"
    ]
    return dataset


def _damaged(source, name, damage, skip, folder):
    files, words = SOURCES[source]
    for file, content in files.items():
        content = content.encode() if isinstance(content, str) else content
        (folder / file).write_bytes(DAMAGES[damage](content) if file == name else content)
    dataset = prepare(folder, f"--source {source.split()[0]} {words}" + (" --skip_bad_rows true" if skip else ""))
    if damage in ("nothing", "DOS line ends") and "parquet" not in source and "gz" not in source:
        assert len(dataset["test"]) in (9, 5), "the damage is none"


SETTINGS = """
--split nowhere | --split time_ratio --ratio 1 | --split time_ratio --ratio 0 0.5 0.5
--split time_ratio --ratio nan 0.5 0.5 | --split time_cut
--split time_cut --validation_from 1971-01-01 --test_from 1970-01-01 | --split given | --split_column x
--min_history 0 | --min_history 50 | --max_history 0 | --max_history 1 | --min_history 5 --max_history 2
--max_history 1e9 | --k_core 99 | --k_core -1 | --k_core 3.5 | --user_core 99 | --item_core 99 | --min_rating 9
--min_rating nan | --min_rating x | --window_start 2050-01-01 | --window_end 1960-01-01 | --window_start soon
--window_end 1970-01-01 --window_start 1980-01-01 | --window_start 1970-01-01 --window_min_items 99
--window_start 0001-01-01 | --window_end 9999-12-31
--window_start 1970-01-01 --window_min_items 99 --window_step_months 0
--window_start 1970-01-02 --window_min_items 99 --window_step_months 99999999 | --max_items 0 | --max_items -3
--max_items 1 | --max_users 0 | --max_users -1 | --max_users 1 | --max_field_words 0 | --item_fields nothing
--item_fields title,brand | --item_fields brand brand | --item_fields item_id | --max_title_words 0
--require_price true | --missing_title none | --repeats never | --tie_break dice | --timestamp_unit h
--timestamp_unit us | --user_column nobody | --item_column user_id | --title_column brand | --title_column nothing
--rating_column nothing | --time_column rating | --time_column user_id | --user_column timestamp | --reviews raw
--amazon_category Toys | --sauce x | --published_counts x | --tokenizer . | --tokenizer nowhere/at-all
--config nowhere.yaml | --check out | --category= | --category_plural= | --source table2 | --source recbole
--source movielens | --source sequences | --source amazon | --items nothing.csv | --items . | --input nothing.csv
--input . | --input log.csv/x | --download_dir x | --min_rating 1e400 | --ratio 1 2 3
"""


def _set(words, folder):
    (folder / "log.csv").write_text(LOG)
    (folder / "items.csv").write_text(ITEMS)
    prepare(folder, f"--source table --input log.csv --items items.csv {words}")


def _folder_damages():
    text = {
        "empty": "",
        "cut": "{",
        "a list": "[]",
        "a number": "5",
        "null": "null",
        "deep": "[" * 100_000,
        "latin": "\xff",
    }
    for file in ("train/state.json", "items/state.json", "dataset_card.json"):
        for what, content in text.items():
            yield f"{file} {what}", lambda folder, file=file, content=content: (folder / file).write_text(
                content, "latin-1"
            )
        yield f"{file} gone", lambda folder, file=file: (folder / file).unlink()
    for name in ("../../log.csv", "/etc/hostname", "", ".", "..", "nothing.arrow", 5, None):
        state = json.dumps({"_data_files": [{"filename": name}]})
        yield f"names {name}", lambda folder, state=state: (folder / "test" / "state.json").write_text(state)
    for split in ("train", "validation", "test", "items"):
        yield f"{split} cut", lambda folder, split=split: _cut(next((folder / split).glob("*.arrow")))


def _cut(file):
    file.write_bytes(file.read_bytes()[:-200])


def _damaged_folder(damage, folder):
    _set("", folder)
    target = (folder / "out" / "folder").rename(folder / "data")
    damage(target)
    try:
        load_dataset_folder(target)
        raise AssertionError("it was read as if it were whole")
    except UserError as error:
        if "dataset_card.json" in str(error) or "data" in str(error):
            raise


@inputs("data")
def data():
    for source, (files, _) in SOURCES.items():
        for name in files:
            for damage in DAMAGES:
                for skip in (False, True):
                    yield f"{source} {name} {damage} {skip}", functools.partial(_damaged, source, name, damage, skip)
    for words in SETTINGS.replace("\n", " | ").split(" | "):
        if words.strip():
            yield words, functools.partial(_set, words)
    for what, damage in _folder_damages():
        if what != "dataset_card.json gone":
            yield f"folder: {what}", functools.partial(_damaged_folder, damage)
