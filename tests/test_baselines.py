"""recipes/baselines.py from the command line, with what needs no extra; tests/evaluation has the others."""

import importlib.metadata
import json

import pytest

from r2ec_trl.data.schema import save_dataset_folder
from r2ec_trl.errors import UserError
from r2ec_trl.evaluation.comparison import compare_frames, differences
from r2ec_trl.evaluation.report import read_ranks

COUNTS = ["popularity", "recent_popularity", "item_to_item"]


def test_every_system_is_written_as_evaluate_writes_it(launch, written, shop, shop_folder, tmp_path, capsys):
    """`systems`, `max_eval_users`, `split`, `seed` and `max_history_items` are obeyed; compare.py takes both."""
    launch("evaluate", "--bundle", written, "--dataset", shop_folder, out=tmp_path / "model")
    launch("baselines", "--dataset", shop_folder, "--systems", *COUNTS, out=tmp_path / "own")
    model, protocol = read_ranks(tmp_path / "model")
    assert "recent popularity" in capsys.readouterr().out
    for name in COUNTS:
        frame, found = read_ranks(tmp_path / "own" / name)
        assert set(frame.columns) < set(model.columns) and frame.schema.items() < model.schema.items()
        assert all(key.split(".")[0] in ("seed", "settings", "versions") for key in differences(protocol, found))
        assert found["settings"]["baseline"] == name and compare_frames(model, frame)["rows"] == 10
        metrics = json.loads((tmp_path / "own" / name / "metrics.json").read_text())
        assert set(metrics["unmasked"]) == {"model"} and metrics["slices"] and metrics["beyond_accuracy"]["model"]
        assert metrics["tuning"][0]["ndcg@10"] == max(one["ndcg@10"] for one in metrics["tuning"])
        beside = json.loads((tmp_path / "model" / "metrics.json").read_text())["unmasked"].get(name)
        assert beside is None or beside == metrics["unmasked"]["model"]
    words = ["--systems", "item_to_item", "--max_eval_users", 4, "--split", "validation", "--seed", 3]
    launch("baselines", "--dataset", shop_folder, *words, "--max_history_items", 1, out=tmp_path / "few")
    frame, found = read_ranks(tmp_path / "few" / "item_to_item")
    assert frame["user_id"].to_list() == shop["validation"]["user_id"][:4]
    assert (found["split"], found["seed"], found["settings"]["max_history_items"]) == ("validation", 3, 1)


def test_what_the_data_lack_is_left_out_and_said(launch, shop, shop_folder, tmp_path, capsys):
    bare = {split: rows.remove_columns([c for c in rows.column_names if "time" in c]) for split, rows in shop.items()}
    card = json.loads((shop_folder / "dataset_card.json").read_text())
    save_dataset_folder(type(shop)(bare), tmp_path / "bare", {**card, "counts": {}})
    seen = []
    with pytest.raises(SystemExit):
        launch(
            "baselines", "--dataset", tmp_path / "bare", out=tmp_path / "out",
            patch={"check_installed": lambda name: seen.append(name) or (name == "hstu" and exit(3))},
        )  # fmt: skip
    text = capsys.readouterr().out
    assert "Left out: recent_popularity (the rows have no times)" in text
    assert "Left out: text_neighbours (no --text_encoder)" in text
    assert seen == ["popularity", "item_to_item", "ease", "sasrec", "hstu"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--systems", "svd"], "`systems` names 'svd'; give some of popularity"),
        (["--systems", "text_neighbours"], "text_neighbours needs --text_encoder"),
        (["--max_eval_users", "0"], "`max_eval_users` is 0"),
        (["--systems", "item_to_item", "--max_history_items", "0"], "`max_history_items` is 0"),
        (["--systems", "popularity", "--text_encoder", "x"], "--text_encoder is read by text_neighbours alone"),
        (["--systems", "popularity", "--max_history_items", "5"], "--max_history_items is read by hstu, item_to_item"),
        (["--systems", "ease"], "ease needs rectools; pip install"),
        (["--systems", "text_neighbours", "--text_encoder", "x"], "text_neighbours needs sentence-transformers; pip"),
    ],
)
def test_mistakes_are_one_sentence(launch, shop_folder, tmp_path, words, sentence):
    real = importlib.metadata.version

    def without(name):
        if name in ("rectools", "sentence-transformers"):
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    with pytest.raises(UserError, match=sentence):
        launch("baselines", "--dataset", shop_folder, *words, out=tmp_path, patch={"version": without})
