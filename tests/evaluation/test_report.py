"""Reports, the files they leave, and paired comparisons."""

import inspect
import json
import os
import random
import re

import polars as pl
import pyarrow.parquet as pq
import pytest

from r2ec_trl.errors import UserError
from r2ec_trl.evaluation import report as report_module
from r2ec_trl.evaluation.report import (
    protocol,
    read_ranks,
    report,
    write_report,
)
from r2ec_trl.metrics import LEVEL, RESAMPLES, bootstrap_interval, paired_bootstrap

CARD = {"source": "shop", "sha256": {"test": "aa", "items": "bb"}, "counts": {"test": 4, "items": 9}}


def frame(rank=(1, 3, 2, 10), rank_masked=(1, 10, 2, 9)):
    return pl.DataFrame(
        {
            "user_id": ["u", "u", "v", "w"],
            "target": ["a", "b", "a", "c"],
            "rank": rank,
            "rank_masked": rank_masked,
            "top_item_ids": [["a", "b"]] * 4,
        }
    )


def made(**settings):
    return protocol(CARD, {"reasoning": "full", **settings}, seed=3)


def test_report_by_hand():
    """Ranks 1, 3, 2, 10 at k = 2: two hits of four. Masked, the repeat of row 2 is a miss: 1, 10, 2, 9 at k = 3."""
    result = report(frame(), {"popularity": frame((9, 9, 9, 9), (1, 1, 1, 1))}, made(), ks=[2, 3])
    assert (result["rows"], result["users"]) == (4, 3)
    assert result["unmasked"]["model"]["hit@2"]["value"] == 0.5
    assert result["unmasked"]["model"]["mrr@3"]["value"] == pytest.approx((1 + 1 / 3 + 1 / 2) / 4)
    assert result["masked"]["model"]["hit@3"]["value"] == 0.5
    assert result["unmasked"]["popularity"]["hit@3"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert result["masked"]["popularity"]["hit@3"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    figure = result["unmasked"]["model"]["hit@3"]
    assert 0 <= figure["low"] < figure["value"] == 0.75 < figure["high"] <= 1


# One user with ten rows, ten with one each
HEAVY = {"user_id": ["heavy"] * 10 + [f"light{row}" for row in range(10)], "target": ["a"] * 20}


def test_users_are_resampled_with_all_their_rows():
    """The ten hits are one user's, who is missing from 35 % of the draws and there three times in some."""
    ranks = [1] * 10 + [9] * 10
    result = report(pl.DataFrame({**HEAVY, "rank": ranks, "rank_masked": ranks}), {}, made(), ks=[1])
    for mask in ("unmasked", "masked"):
        assert result[mask]["model"]["hit@1"] == {"value": 0.5, "low": 0.0, "high": pytest.approx(30 / 38)}


def test_the_seed_reaches_every_interval():
    """200 users whose hits are neither all nor none: model, baseline and slices move with the seed."""
    ranks = [(7 * row) % 23 + 1 for row in range(200)]
    many = pl.DataFrame({"user_id": [f"u{row}" for row in range(200)], "rank": ranks, "rank_masked": ranks})
    many = many.with_columns(history_items=pl.lit(1), target_popularity=pl.lit("cold"))
    reports = [report(many, {"popularity": many}, made(), ks=[5], seed=seed) for seed in (0, 0, 1)]
    for mask in ("unmasked", "masked"):
        for system in ("model", "popularity"):
            one, again, other = (found[mask][system]["ndcg@5"] for found in reports)
            assert one == again and one["value"] == other["value"]
            assert (one["low"], one["high"]) != (other["low"], other["high"])
    one, again, other = (found["slices"] for found in reports)
    assert one == again != other


def test_slices_are_the_rows_they_say():
    """Rank 1 is of a cold target after one purchase, ranks 3 and 2 after two, rank 10 after five."""
    described = frame().with_columns(
        history_items=pl.Series([1, 2, 2, 5]), target_popularity=pl.Series(["cold", "tail", "middle", "middle"])
    )
    result = report(described, {"popularity": frame(rank=(11, 11, 11, 1))}, made(), counts={"a": 2, "b": 1, "c": 0})
    rows = {name: {one: found["rows"] for one, found in of.items()} for name, of in result["slices"].items()}
    assert rows == {
        "targets": {"cold": 1, "others": 3},
        "history": {"none": 0, "1": 1, "2": 2, "3-4": 0, "5+": 1},
        "popularity": {"tail": 1, "middle": 2, "head": 0},
    }
    two, five = result["slices"]["history"]["2"], result["slices"]["history"]["5+"]
    assert two["unmasked"]["model"]["ndcg@10"]["value"] == pytest.approx((1 / 2 + 1 / 1.584962500721156) / 2)
    assert two["masked"]["model"]["hit@10"]["value"] == 1 and two["unmasked"]["popularity"]["hit@10"]["value"] == 0
    assert five["unmasked"]["popularity"]["ndcg@10"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert set(result["slices"]["history"]["none"]) == {"rows"}
    assert set(result["beyond_accuracy"]) == {"model", "popularity"}
    assert result["beyond_accuracy"]["model"]["coverage@10"] == pytest.approx(2 / 3)
    assert "slices" not in report(frame(), {}, made()) and "beyond_accuracy" not in report(frame(), {}, made())


def test_sentences_say_how_many_draws_there_are():
    assert made()["intervals"] == "95 % percentile bootstrap of users, 10,000 resamples"
    assert (LEVEL, RESAMPLES) == (0.95, 10_000)
    for function in (bootstrap_interval, paired_bootstrap):
        defaults = inspect.signature(function).parameters
        assert (defaults["level"].default, defaults["resamples"].default) == (LEVEL, RESAMPLES)


def test_ranks_of_another_length_are_refused():
    with pytest.raises(ValueError, match="other rows than the 4 of the model: popularity 3"):
        report(frame(), {"popularity": frame()[:3]}, made())


def test_protocol_says_how_the_figures_came_about():
    found = made(path=os.sep)
    assert found["split_sha256"] == "aa" and found["catalogue_sha256"] == "bb" and found["catalogue_items"] == 9
    assert found["ties"] == "count against the target" and "miss" in found["mask"] and found["seed"] == 3
    assert set(found["versions"]) == {"torch", "transformers", "trl", "peft", "r2ec_trl"}
    assert protocol(CARD, {"dtype": int}, 0)["settings"] == {"dtype": "<class 'int'>"}, "anything can be stored"


def test_files_and_what_is_read_back(tmp_path):
    folder = tmp_path / "new" / "folder"
    result = report(frame(), {}, made())
    write_report(folder, result, frame())
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.json", "ranks.parquet"]
    assert json.loads((folder / "metrics.json").read_text()) == result
    assert json.loads(pq.read_schema(folder / "ranks.parquet").metadata[b"protocol"]) == made()
    read, found = read_ranks(folder)
    assert read.equals(frame()) and found == made()


def test_writing_again_replaces(tmp_path):
    write_report(tmp_path, report(frame(), {}, made()), frame())
    other = frame(rank=(9, 9, 9, 9))
    write_report(tmp_path, report(other, {}, made()), other)
    assert read_ranks(tmp_path)[0].equals(other)


def test_nothing_is_left_half_written(tmp_path, monkeypatch):
    write_report(tmp_path, report(frame(), {}, made()), frame())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(
        pq, "write_table", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    other = frame(rank=(9, 9, 9, 9))
    with pytest.raises(UserError, match="cannot be written .*No space left"):
        write_report(tmp_path, report(other, {}, made()), other)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    monkeypatch.undo()
    monkeypatch.setattr(report_module, "write_json", lambda *_: (_ for _ in ()).throw(UserError("full")))
    with pytest.raises(UserError, match="full"):
        write_report(tmp_path, report(other, {}, made()), other)
    assert read_ranks(tmp_path)[0].equals(other), "the ranks are kept whatever happens to the figures"


def test_a_figure_that_is_no_number_costs_no_other(tmp_path, caplog):
    figures = {"loss": float("nan"), "steps": 3, "limits": [1.0, float("inf")]}
    write_report(tmp_path / "new", {"protocol": made(), "training": figures}, frame())
    saved = json.loads((tmp_path / "new" / "metrics.json").read_text())
    assert saved["training"] == {"loss": None, "steps": 3, "limits": [1.0, None]}
    assert "training.loss is no finite number" in caplog.text and read_ranks(tmp_path / "new")[0].equals(frame())


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "taken").touch()
    with pytest.raises(UserError, match="taken.* cannot be written"):
        write_report(tmp_path / "taken", report(frame(), {}, made()), frame())


def test_what_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="holds no ranks.parquet"):
        read_ranks(tmp_path)
    (tmp_path / "ranks.parquet").write_text("no parquet")
    with pytest.raises(UserError, match="not a ranks file with its protocol"):
        read_ranks(tmp_path)
    frame().write_parquet(tmp_path / "ranks.parquet")
    with pytest.raises(UserError, match="not a ranks file with its protocol"):
        read_ranks(tmp_path)
    write_report(tmp_path, report(frame(), {}, made()), frame().drop("rank_masked"))
    with pytest.raises(UserError, match="lacks the columns rank_masked"):
        read_ranks(tmp_path)


def test_a_flipped_bit_in_the_ranks_is_refused_or_harmless(tmp_path):
    wanted, figures = pl.concat([frame()] * 12), ["user_id", "target", "rank", "rank_masked"]
    write_report(tmp_path, {"protocol": made()}, wanted)
    whole, draw, refused = (tmp_path / "ranks.parquet").read_bytes(), random.Random(0), 0
    for _ in range(400):
        data = bytearray(whole)
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        (tmp_path / "ranks.parquet").write_bytes(data)
        try:
            found, _ = read_ranks(tmp_path)
        except UserError:
            refused += 1
        else:
            assert found.select(figures).equals(wanted.select(figures))
    assert refused > 100


@pytest.mark.parametrize(
    ("column", "values", "sentence"),
    [
        ("rank", [1.0, 3.0, 2.0, float("nan")], "the column rank (Float64) must hold whole numbers"),
        ("rank", [1, 3, 2, 0], "the column rank (Int64) must hold whole numbers from 1 up"),
        ("rank_masked", [1, None, 2, 9], "the column rank_masked (Int64)"),
        ("rank_masked", ["1", "2", "3", "4"], "the column rank_masked (String)"),
        ("user_id", [1, 1, 2, 3], "the column user_id (Int64) must hold text"),
        ("target", ["a", None, "a", "c"], "the column target (String) must hold text in every row"),
        ("target", [["a"], ["b"], ["a"], ["c"]], "the column target (List(String))"),
    ],
)
def test_columns_of_the_wrong_kind_are_one_sentence(tmp_path, column, values, sentence):
    wrong = frame().with_columns(pl.Series(column, values))
    write_report(tmp_path, {"protocol": made()}, wrong)
    with pytest.raises(UserError, match=re.escape(sentence)):
        read_ranks(tmp_path)


@pytest.mark.parametrize("found", [[1], "full", None, 3])
def test_a_protocol_of_the_wrong_kind_is_one_sentence(tmp_path, found):
    write_report(tmp_path, {"protocol": found}, frame())
    with pytest.raises(UserError, match="holds a protocol that is a"):
        read_ranks(tmp_path)
    write_report(tmp_path, {"protocol": made()}, frame()[:0])
    with pytest.raises(UserError, match="holds no rows"):
        read_ranks(tmp_path)
