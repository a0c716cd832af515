"""Each flag of recipes/prepare_data.py changes what it says, by numbers worked by hand; one that cannot is refused.

The log: users u0 … u3 buy i(n), i(n+1), … i(n+4) of six items on days 10n … 10n+4, rated 1 … 5; u0 buys i0 again on
day 5. Item i3 has no title, i1 markup in it, i2 five words, i4 no price. So 21 purchases, 17 of them with a title.
"""

import gzip
import re
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
from twin import core

from r2ec_trl.data import load_dataset_card, load_dataset_folder
from r2ec_trl.data.sources import kind_of

DAY, START = 86_400, 1_577_836_800  # 2020-01-01
LOG = [(f"u{n}", f"i{(n + at) % 6}", at + 1, START + DAY * (10 * n + at)) for n in range(4) for at in range(5)]
LOG.append(("u0", "i0", 5, START + DAY * 5))
ITEMS = """item_id,title,brand,price,notes
i0,Zero,Acme,1,a b
i1,One <span id=x>big</span>,Acme,2,a b
i2,Two words and three more,Acme,3,a b
i3,,Acme,4,a b
i4,Four,Brill,—,a b
i5,Five,Brill,"1,299.00",a b
"""


@pytest.fixture(scope="module")
def recipe():
    sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))
    import prepare_data

    yield prepare_data
    sys.path.pop(0)


@pytest.fixture
def made(recipe, tmp_path, monkeypatch, capsys):
    """Runs the recipe on the log; gives rows of the splits and the card, or what it says when it refuses."""
    (tmp_path / "items.csv").write_text(ITEMS, encoding="utf-8")

    def run(*words, log=LOG, head="user_id,item_id,rating,timestamp", source=True, line=""):
        (tmp_path / "log.csv").write_text("\n".join([head, *(",".join(map(str, row)) for row in log)]) + "\n" + line)
        table = ["--source", "table", "--input", tmp_path / "log.csv"] if source else []
        table += [] if "--items" in words or not source else ["--items", tmp_path / "items.csv"]
        output = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        words = [*map(str, table), "--output", str(output), *map(str, words)]
        monkeypatch.setattr(sys, "argv", ["prepare_data.py", *words])
        try:
            recipe.run(recipe.main)
        except SystemExit:
            return capsys.readouterr().err
        return load_dataset_folder(output), load_dataset_card(output)

    return run


def sizes(found):
    return [len(found[0][split]) for split in ("train", "validation", "test", "items")]


def test_without_flags(made):
    found = made()
    assert sizes(found) == [5, 4, 4, 5]  # four purchases a user, five of u0: all but the first are targets
    assert found[1]["dropped"]["interaction with an item without a title"] == 4
    assert found[1]["category_plural"] == "items" and max(map(len, found[0]["test"]["history"])) == 4


@pytest.mark.parametrize(
    "words, cause, count",
    [
        ("--repeats first", "repeat of user and item (kept: first)", 1),
        ("--min_rating 2", "rating below 2", 4),
        ("--require_price true", "interaction with an item without a price", 4),
        ("--max_title_words 4", "interaction with an item whose title has over 4 words", 3),
        ("--drop_markup_titles true", "interaction with an item with markup in its title", 3),
        ("--window_start 2020-01-11", "interaction outside the time window", 5),
        ("--window_end 2020-01-31", "interaction outside the time window", 4),
        ("--user_core 5", "5/0-core of users/items", 12),
        ("--max_items 4", "cut: item", 1),
        ("--min_history 2", "too little history to be a target (stays in histories)", 8),
        ("--train_targets last", "train target that is not the user's last (stays in histories)", 1),
    ],
)
def test_what_is_left_out(made, words, cause, count):
    assert made(*words.split())[1]["dropped"][cause] == count


@pytest.mark.parametrize(
    "words, expected",
    [
        ("--split time_ratio", [10, 1, 2, 5]),  # 13 targets: 10.4 and 11.7
        ("--split time_ratio --ratio 0.6 0.2 0.2", [7, 3, 3, 5]),
        ("--split time_cut --validation_from 2020-01-21 --test_from 2020-01-31", [7, 3, 3, 5]),
        ("--split time_cut --validation_from 2020-01-11 --test_from 2020-01-31", [4, 6, 3, 5]),
        ("--split time_cut --validation_from 2020-01-11 --test_from 2020-01-21", [4, 3, 6, 5]),
        ("--missing_title id", [9, 4, 4, 6]),
        ("--max_users 2", [2, 2, 2, 5]),  # not u0
        ("--min_history 2", [1, 4, 4, 5]),
    ],
)
def test_sizes(made, words, expected):
    assert sizes(made(*words.split())) == expected


@pytest.mark.parametrize("least", [2, 3])
def test_cores(made, least):
    rows = [row for row in LOG if row[1] != "i3"]
    for words, kept in ((("--k_core", least), core(rows, least)), (("--item_core", 3), None)):
        facts = made(*words)[1]["facts"]
        if kept is not None:
            assert (facts["interactions"], facts["users"]) == (len(kept), len({row[0] for row in kept}))
        else:  # i0 … i5 without i3: 4, 3, 3, 4, 3 purchases
            assert (facts["interactions"], facts["items"]) == (17, 5)


def test_windows_move_back(made):
    """Only u3 buys from 31 January on, four items: one more moves the start back, by a month or by two."""
    words = ["--window_start", "2020-01-31", "--window_min_items", 5]
    assert made(*words[:2])[1]["facts"]["window_start"] == "2020-01-31"
    assert made(*words)[1]["facts"]["window_start"] == "2019-12-28"
    assert made(*words, "--window_step_months", 2)[1]["facts"]["window_start"] == "2019-11-28"


@pytest.mark.parametrize("rule, first", [("file", ["i5", "i0"]), ("item", ["i0", "i1"])])
def test_ties(made, rule, first):
    log = [
        (user, item, 5, START + at * (user != "u9"))
        for user in ("u1", "u9")
        for at, item in enumerate(["i5", "i0", "i4", "i1"])
    ]
    dataset = made("--tie_break", rule, log=log)[0]
    assert dict(zip(dataset["validation"]["user_id"], dataset["validation"]["history"]))["u9"] == first


def test_text_of_items(made):
    dataset, card = made(
        "--category", "lamp", "--category_plural", "lights", "--item_fields", "notes", "--max_field_words", 1
    )
    assert (card["category"], card["category_plural"]) == ("lamp", "lights")
    assert dataset["items"][0] == {"item_id": "i0", "title": "Zero", "notes": "a"}
    assert max(map(len, made("--max_history", 2)[0]["test"]["history"])) == 2


def test_columns(made, tmp_path):
    head = "who,what,stars,when,part"
    words = ["--user_column", "who", "--item_column", "what", "--rating_column", "stars", "--time_column", "when"]
    items = tmp_path / "named.csv"
    items.write_text(ITEMS.replace("item_id,title", "what,name"), encoding="utf-8")
    log = [(*row[:3], row[3] * 1000, "train" if row[2] < 3 else "dev" if row[2] == 3 else "test") for row in LOG]
    words += ["--items", items, "--title_column", "name", "--timestamp_unit", "ms", "--split", "given"]
    dataset, card = made(*words, "--split_column", "part", log=log, head=head)
    assert card["split_rule"] == "given" and set(dataset["items"]["title"]) >= {"Zero", "Four"}
    # u0 buys i0, i1 (train), i2 (validation), i4 and i0 again (test; i3 between has no title)
    rows = [row for row in dataset["test"] if row["user_id"] == "u0"]
    assert [(row["target"], row["timestamp"]) for row in rows] == [("i4", START + 4 * DAY), ("i0", START + 5 * DAY)]
    assert rows[0]["history"] == ["i0", "i1", "i2"] and rows[0]["history_ratings"] == [1, 2, 3]


def test_bad_rows(made):
    assert "row 22 has a rating that is no number" in made(line="u1,i1,x,5\n")
    assert (
        made("--skip_bad_rows", "true", line="u1,i1,x,5\n")[1]["dropped"]["row that has a rating that is no number"]
        == 1
    )


def test_amazon(made, tmp_path, monkeypatch):
    import r2ec_trl.data.sources.amazon as amazon

    rows = "user_id,parent_asin,rating,timestamp\n" + "".join(f"{u},{i},{r},{t * 1000}\n" for u, i, r, t in LOG)
    meta = "".join(f'{{"parent_asin": "i{n}", "title": "T{n}"}}\n' for n in range(6))
    raw = "".join(
        f'{{"user_id": "{u}", "parent_asin": "{i}", "rating": 5, "timestamp": {t}000}}\n' for u, i, _, t in LOG
    )
    for name, text in {"Toys.csv": rows, "meta_Toys.jsonl": meta, "Toys.jsonl": raw}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "counts.yaml").write_text("Toys: {users: 4, test: 8}\n")
    words = ["--source", "amazon", "--amazon_category", "Toys"]
    dataset, card = made(*words, "--input", tmp_path, "--published_counts", tmp_path / "counts.yaml", source=False)
    assert card["published"] == {"users": {"published": 4, "here": 4}, "test": {"published": 8, "here": 4}}
    assert dataset["test"][0]["history_ratings"][0] == 1
    assert made(*words, "--input", tmp_path, "--reviews", "raw", source=False)[0]["test"][0]["history_ratings"][0] == 5
    kept = []

    def fetch(url, path, progress=None):
        kept.append(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress((meta if "meta" in url else rows).encode()))
        return path

    monkeypatch.setattr(amazon, "download", fetch)
    made(*words, "--input", "authors", "--download_dir", tmp_path / "kept", source=False)
    assert len(kept) == 2 and all(path.is_relative_to(tmp_path / "kept") for path in kept)


def test_tokenizer_and_check(made, tmp_path, chat_tokenizer, capsys):
    chat_tokenizer.save_pretrained(tmp_path / "tokenizer")
    assert made("--tokenizer", tmp_path / "tokenizer")[1]["prompt_lengths"]["tokenizer"] == "tokenizer"
    assert "--check audits a folder alone: leave --source out" in made("--check", tmp_path)


@pytest.mark.parametrize(
    "words, sentence",
    [
        ("--ratio 0.6 0.2 0.2", "--ratio does nothing without --split time_ratio"),
        ("--test_from 2020-01-31", "--test_from does nothing without --split time_cut"),
        ("--split_column part", "--split_column does nothing without --split given"),
        ("--window_step_months 2", "--window_step_months does nothing without --window_min_items"),
        ("--window_min_items 2", "--window_min_items does nothing without --window_start"),
        ("--k_core 3 --user_core 2 --item_core 2", "--k_core does nothing beside"),
        ("--reviews raw", "--reviews does not apply to --source table"),
        ("--download_dir x", "--download_dir does not apply to --source table"),
        ("--published_counts x", "--published_counts does nothing without --source amazon"),
        ("--split time_ratio --ratio nan 0.5 0.5", "must be three positive shares"),
        ("--min_rating nan", "--min_rating nan is no number"),
        ("--min_rating inf", "--min_rating inf is no number"),
        ("--max_items -1", "--max_items -1 cannot be: give at least 0"),
        ("--max_history 0", "--max_history 0 cannot be"),
        ("--k_core -2", "--k_core -2 cannot be"),
        ("--k_core 99999999999", "--k_core 99999999999 cannot be"),
        ("--window_start 2020-01-31 --window_min_items 9 --window_step_months 0", "--window_step_months 0 cannot be"),
        ("--window_start soon", "'soon' is no date such as 2022-10-01"),
        ("--item_fields title,notes", "names 'title,notes', which the items lack"),
    ],
)
def test_flags_that_cannot_be_meant(made, words, sentence):
    said = made(*words.split())
    assert sentence in said and said.strip().count("\n") == 0


@pytest.mark.parametrize(
    "source, flag",
    [
        ("sequences", "k_core"),
        ("sequences", "max_history"),
        ("sequences", "timestamp_unit"),
        ("movielens", "user_column"),
        ("recbole", "items"),
        ("amazon", "title_column"),
    ],
)
def test_flags_of_another_source(made, tmp_path, source, flag):
    value = {"k_core": 5, "max_history": 3, "timestamp_unit": "ms"}.get(flag, "x")
    words = ["--source", source, "--input", tmp_path, f"--{flag}", value]
    words += ["--amazon_category", "Toys"] if source == "amazon" else []
    assert f"--{flag} does not apply to --source {source}: leave it out" in made(*words, source=False)


@pytest.mark.parametrize("words", ["--max_history 20", "--split leave_one_out", "--ratio 0.8 0.1 0.1"])
def test_a_default_that_was_asked_for_is_no_less_refused(made, tmp_path, words):
    said = made("--source", "sequences", "--input", tmp_path, *words.split(), source=False)
    assert f"{words.split()[0]} does not apply to --source sequences: leave it out" in said


def test_every_flag_is_tested(recipe):
    words = set(re.findall(r"--(\w+)", Path(__file__).read_text(encoding="utf-8")))
    assert {one.name for part in recipe.ARGUMENTS for one in fields(part)} - words == set()


@pytest.mark.parametrize(
    "words", ["--window_start soon", "--split time_cut", "--max_history 2 --min_history 3", "--tokenizer nowhere/x"]
)
def test_what_cannot_be_meant_is_said_before_the_long_reading(recipe, made, monkeypatch, words):
    monkeypatch.setattr(recipe, "kind_of", lambda name: replace(kind_of(name), read=lambda **_: pytest.fail("read")))
    assert "Traceback" not in made(*words.split()) and "read" not in made(*words.split())
