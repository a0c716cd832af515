"""Recipes as a user launches them, in processes of their own; the demo is the test bench of everything."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from r2ec_trl.evaluation.report import read_ranks

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SHORT = (
    "--max_steps 2 --max_test_users 40 --eval_strategy no --save_strategy no --load_best_model_at_end false".split()
)
LIFT = 0.15  # measured: .262, .278, .285 on seeds 0, 1, 2


def launch(recipe, *words):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "recipes" / recipe), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The whole demo, once."""
    folder = tmp_path_factory.mktemp("demo")
    out = launch("recpo.py", "--output_dir", folder)
    return folder, json.loads((folder / "metrics.json").read_text()), out


@pytest.mark.timeout(1200)
def test_demo_lifts_ndcg_and_the_right_reasoning(demo):
    folder, metrics, out = demo
    change = metrics["difference"]["unmasked"]["ndcg@10"]
    after = {name: system["ndcg@10"]["value"] for name, system in metrics["after"]["unmasked"].items()}
    assert change["difference"] > LIFT and change["low"] > 0
    assert after["model"] > after["item_to_item"] > after["popularity"]
    assert metrics["after"]["reasoning"]["right_stage"] > metrics["before"]["reasoning"]["right_stage"] + 0.3
    assert "oracle" in out and "after - before" in out
    for name in ("adapter_model.safetensors", "learning_curve.png", "ranks.parquet", "before/ranks.parquet"):
        assert (folder / name).is_file()


@pytest.mark.timeout(1200)
def test_demo_needs_its_own_reasoning(demo, tmp_path):
    """Another user's reasoning on the same checkpoint is worse, and the same users' own give the run's own ranks."""
    folder, _, _ = demo
    prompts = "user_template item_template item_fields max_history_items max_prompt_length max_item_length category"
    settings = json.loads((folder / "metrics.json").read_text())["protocol"]["settings"]
    words = []
    for name in prompts.split():
        values = settings[name] if isinstance(settings[name], list) else [settings[name]]
        words += [f"--{name}", *values]
    words += "--use_ratings false --use_times false --item_temperature 0.05 --max_completion_length 32".split()
    data = folder / "demo_dataset"
    launch(
        "evaluate.py", "--dataset", data, "--model_name_or_path", "demo", "--adapter", folder, *words,
        "--reasoning", "full", "other", "--output_dir", tmp_path,
    )  # fmt: skip
    own, other = (read_ranks(tmp_path / name)[0] for name in ("full", "other"))
    assert own["rank"].equals(read_ranks(folder)[0]["rank"])
    out = launch("compare.py", "--before", tmp_path / "full", "--after", tmp_path / "other")
    assert "NDCG@10" in out
    assert (other["rank"] <= 10).mean() < 0.2 < (own["rank"] <= 10).mean()


def test_bundle_in_a_new_process_gives_the_same_ranks(demo, tmp_path):
    folder, metrics, _ = demo
    data = folder / "demo_dataset"
    launch("evaluate.py", "--bundle", folder / "bundle", "--dataset", data, "--output_dir", tmp_path)
    assert read_ranks(tmp_path)[0].equals(read_ranks(folder)[0])
    again = json.loads((tmp_path / "metrics.json").read_text())
    assert "oracle" in again["unmasked"]  # the catalogue is the one the demo was trained on
    assert all(again[mask]["model"] == metrics["after"][mask]["model"] for mask in ("masked", "unmasked"))


def test_one_seed_gives_one_result_and_another_reward_another_adapter(tmp_path):
    reward = tmp_path / "my_rewards.py"
    reward.write_text(
        "def top3(completions, target_rank, **kwargs):\n    return [float(r <= 3) for r in target_rank]\n"
    )
    runs = {"one": (), "two": (), "mine": ("--reward_funcs", f"{reward}:top3")}
    for name, words in runs.items():
        launch("recpo.py", *SHORT, "--output_dir", tmp_path / name, *words)
    metrics = {name: json.loads((tmp_path / name / "metrics.json").read_text()) for name in runs}
    assert metrics["one"]["after"] == metrics["two"]["after"] and metrics["one"]["before"] == metrics["two"]["before"]
    weights = {name: load_file(tmp_path / name / "adapter_model.safetensors") for name in runs}
    assert all(weights["one"][key].equal(weights["two"][key]) for key in weights["one"])
    assert not all(weights["one"][key].equal(weights["mine"][key]) for key in weights["one"])
    logs = json.loads((tmp_path / "mine" / "log_history.json").read_text())
    assert any("rewards/top3/mean" in log for log in logs)


def test_contrastive_recipe_from_the_same_start(tmp_path):
    config = ROOT / "recipes" / "configs" / "demo_contrastive.yaml"
    launch("contrastive.py", "--config", config, *SHORT, "--output_dir", tmp_path / "out")
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["training"]["steps"] == 2 and metrics["protocol"]["settings"]["reasoning"] == "none"
