"""RecTools and RecBole users: their columns in, our ranks and recommendations out in their columns."""

import ast
import importlib.util
import io
import json
import math
import re
import sys
from pathlib import Path

import pandas as pd
import pytest

from r2ec_trl.data.schema import load_dataset_folder
from r2ec_trl.evaluation.users import summarise_users
from r2ec_trl.serving.recommender import Recommender
from r2ec_trl.training.recpo_config import RecPOConfig

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"


@pytest.fixture
def call(monkeypatch, capsys):
    """`call("recommend", words...)` runs a recipe in this process and returns what it printed."""

    def run(name, *words):
        spec = importlib.util.spec_from_file_location(f"recipe_{name}", RECIPES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        monkeypatch.setattr("sys.argv", [f"{name}.py", *map(str, words)])
        capsys.readouterr()
        module.main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def as_csv(call, written, shop, tmp_path):
    """Ten items for each test row of the shop, as `recommend.py --format csv` prints them."""
    columns = ["history", "history_ratings", "history_timestamps", "timestamp"]
    users = [{"user_id": str(row), **user} for row, user in enumerate(shop["test"].select_columns(columns))]
    (tmp_path / "users.jsonl").write_text("\n".join(map(json.dumps, users)))
    words = ("--bundle", written, "--input", tmp_path / "users.jsonl", "--k", 10, "--exclude_history", "false")
    return call("recommend", *words, "--format", "csv")


def test_csv_has_the_columns_of_rectools(as_csv, written, shop):
    frame = pd.read_csv(io.StringIO(as_csv), dtype={"user_id": str, "item_id": str})
    assert list(frame.columns) == ["user_id", "item_id", "score", "rank"]
    [first] = Recommender.from_pretrained(written).recommend(
        shop["test"].select_columns(["history", "history_ratings", "history_timestamps", "timestamp"]).to_list()[:1],
        10,
        exclude_history=False,
    )
    mine = frame[frame["user_id"] == "0"]
    assert mine["item_id"].tolist() == [item.item_id for item in first.items]
    assert mine["rank"].tolist() == list(range(1, 11))
    assert mine["score"].tolist() == pytest.approx([item.score for item in first.items])


def test_rectools_computes_our_ndcg(as_csv, written, shop):
    """Its NDCG divides by the best k items unless `divide_by_achievable`; ours has one relevant item a row."""
    metrics = pytest.importorskip("rectools.metrics")
    recommended = pd.read_csv(io.StringIO(as_csv), dtype={"user_id": str, "item_id": str})
    bought = pd.DataFrame(
        {"user_id": [str(row) for row in range(len(shop["test"]))], "item_id": shop["test"]["target"]}
    )
    bought = bought.assign(weight=1.0, datetime=pd.Timestamp("2020-01-01"))
    theirs = metrics.calc_metrics(
        {
            "ndcg": metrics.NDCG(k=10, divide_by_achievable=True),
            "undivided": metrics.NDCG(k=10),
            "hit": metrics.HitRate(k=10),
            "mrr": metrics.MRR(k=10),
        },
        recommended,
        bought,
    )
    ours = summarise_users(Recommender.from_pretrained(written).bundle.evaluate(shop["test"]))
    for name in ("ndcg", "hit", "mrr"):
        assert theirs[name] == pytest.approx(ours[f"{name}@10"], abs=1e-9)
    ideal = sum(1 / math.log2(rank + 1) for rank in range(1, 11))
    assert theirs["undivided"] * ideal == pytest.approx(ours["ndcg@10"], abs=1e-9)


def test_atomic_files_of_recbole_become_a_dataset_folder(call, tmp_path):
    raw = tmp_path / "toy"
    raw.mkdir()
    rows = [
        f"u{user}\ti{(user + step) % 6}\t4\t{1_600_000_000 + 86_400 * step + user}"
        for user in range(5)
        for step in range(5)
    ]
    (raw / "toy.inter").write_text("user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + "\n".join(rows))
    items = [f"i{item}\tthing {item}" for item in range(6)]
    (raw / "toy.item").write_text("item_id:token\ttitle:token_seq\n" + "\n".join(items))
    words = ("--source", "recbole", "--input", raw, "--output", tmp_path / "data", "--category", "thing")
    call("prepare_data", *words, "--split", "leave_one_out")
    data = load_dataset_folder(tmp_path / "data")
    assert len(data["items"]) == 6 and len(data["test"]) == 5
    assert data["test"][0]["history"][-1] == data["validation"][0]["target"]


def test_what_stands_ready_for_trls_documentation_runs(tiny_model_folder, shop, shop_folder, tmp_path, monkeypatch):
    """docs/upstream: the settings of the paper index are the paper's, the example trains, its reward is a reward."""
    monkeypatch.chdir(tmp_path)
    pages = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "upstream").glob("*.md")}
    model = str(tiny_model_folder("llama"))
    [entry] = re.findall("```python\n(.*?)```", pages["paper_index_entry.md"], re.DOTALL)
    names = {"model": model, "items": shop["items"], "users": shop["train"]}
    exec(entry, names)
    [call] = [
        n for n in ast.walk(ast.parse(entry)) if isinstance(n, ast.Call) and ast.unparse(n.func) == "RecPOConfig"
    ]
    assert call.keywords
    for setting in call.keywords:
        assert getattr(names["training_args"], setting.arg) == getattr(RecPOConfig("out"), setting.arg), setting.arg
    example, reward = re.findall("```python\n(.*?)```", pages["recpo_trainer.md"], re.DOTALL)
    names = {}
    exec(reward, names)
    quick = 'RecPOConfig("out", max_steps=1, max_completion_length=4, eval_strategy="no", '
    example = example.replace("data/mine", str(shop_folder)).replace("Qwen/Qwen2.5-0.5B-Instruct", model)
    exec(
        example.replace('RecPOConfig("out", ', quick).replace("    args=", "    reward_funcs=top3,\n    args="), names
    )
    assert names["trainer"].state.global_step == 1 and "rewards/top3/mean" in names["trainer"].state.log_history[0]
