"""The start is measured first, and ranks are on disk before anything that may still fail."""

import json
from types import SimpleNamespace

import polars as pl
import pytest
from datasets import Dataset, DatasetDict
from rich import get_console
from transformers import AutoModelForCausalLM

from r2ec_trl.bundle.bundle import Bundle
from r2ec_trl.cli import run_end
from r2ec_trl.cli.run_end import finish_run, without_tokens
from r2ec_trl.cli.run_start import RunArguments
from r2ec_trl.data.demo import write_reasoning
from r2ec_trl.data.schema import load_dataset_card
from r2ec_trl.evaluation.comparison import compare_frames
from r2ec_trl.evaluation.report import read_ranks, report
from r2ec_trl.evaluation.users import without_histories


def test_the_start_is_measured_before_training_and_a_run_goes_on_where_it_is_told(tmp_path, monkeypatch):
    calls = []
    trainer = SimpleNamespace(
        args=SimpleNamespace(resume_from_checkpoint="latest", output_dir=str(tmp_path)),
        accelerator=SimpleNamespace(is_main_process=True),
        evaluate_frame=lambda rows: calls.append(("evaluate", rows)) or "before",
        train=lambda resume_from_checkpoint: calls.append(("train", resume_from_checkpoint)),
    )
    monkeypatch.setattr(run_end, "_write_before", lambda *_: calls.append("written"))
    monkeypatch.setattr(run_end, "finish_run", lambda *args: calls.append(args[3:]))
    run_end.train_and_finish(trainer, {}, {}, "rows", RunArguments(shown_rollouts=3))
    assert calls == [("evaluate", "rows"), "written", ("train", "latest"), ("rows", "before", 3)]


def test_test_prompts_are_tried_before_training(monkeypatch):
    """By the evaluation of the start, or else by a look at them: a prompt too long fails at once, not at the end."""
    order = []
    arguments = SimpleNamespace(resume_from_checkpoint=None)
    trainer = SimpleNamespace(args=arguments, check_prompts=order.append, train=lambda **_: order.append("train"))
    monkeypatch.setattr(run_end, "finish_run", lambda *given: order.append("finish"))
    run_end.train_and_finish(trainer, {}, {}, "rows", RunArguments(report_before=False))
    assert order == ["rows", "train", "finish"]


def test_the_ranks_are_kept_whatever_fails_later(written, shop_folder, tmp_path, monkeypatch, launch):
    def fail(*_, **__):
        raise RuntimeError("baselines")

    monkeypatch.setattr(run_end, "baseline_frames", fail)
    with pytest.raises(RuntimeError, match="baselines"):
        launch("evaluate", "--bundle", written, "--dataset", shop_folder, out=tmp_path)
    assert read_ranks(tmp_path)[0].height == 10 and (tmp_path / "metrics.json").is_file()


def test_a_run_keeps_its_ranks_and_titles_steer_no_terminal(
    make_trainer, tiny_model_folder, shop, shop_folder, tmp_path, monkeypatch, capsys
):
    """The bundle is gone when its figures are recorded: `ranks.parquet` and `metrics.json` stand all the same."""
    hostile = shop["items"].map(lambda item: {"title": item["title"] + " \x1b[2J\x9b"})
    data = DatasetDict({**shop, "items": hostile})
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder("llama"))
    trainer = make_trainer(model=model, output_dir=str(tmp_path), seed=4)
    before = trainer.evaluate_frame(shop["test"])
    result = {"after": {**report(before, {}, {}), "reasoning": {}}}
    run_end._print(get_console(), result, data, shop["test"], before, before, 3)
    text = capsys.readouterr().out
    assert not {"\x1b", "\x9b"} & set(text) and "\\x1b[2J" in text and text.count("bought") == 3
    before = before.with_columns(rank=pl.Series(range(1, 11)))
    monkeypatch.setattr(Bundle, "record_metrics", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        finish_run(trainer, shop, load_dataset_card(shop_folder), shop["test"], before)
    frame, protocol = read_ranks(tmp_path)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert protocol["seed"] == 4 and frame.height == 10 and metrics["difference"]["unmasked"]["hit@5"]
    again = compare_frames(read_ranks(tmp_path / "before")[0], frame, seed=4)
    assert metrics["difference"] == again != compare_frames(before, frame, seed=0)


def test_each_figure_of_the_end_is_of_the_weights_and_the_mode_that_it_names(
    make_trainer, change_weights, tiny_model_folder, shop, shop_folder, tmp_path
):
    """
    The weights have changed since the table was encoded, as when the best are loaded at the end: the bundle's ranks
    are those of a table of the new ones, with reasoning, without, and of users whose purchases nobody knows.
    """
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder("llama"))
    trainer = make_trainer(model=model, output_dir=str(tmp_path), seed=4)
    stale = trainer.evaluate_frame(shop["test"])
    change_weights(trainer.model)
    trainer.state.global_step, trainer.state.best_global_step, trainer.state.best_metric = 5, 3, 0.25
    finish_run(trainer, shop, load_dataset_card(shop_folder), shop["test"], None)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    full, none = (trainer.evaluate_frame(shop["test"], mode) for mode in ("full", "none"))
    strangers = trainer.evaluate_frame(without_histories(shop["test"]))
    assert read_ranks(tmp_path)[0]["rank"].equals(full["rank"]) and not full["rank"].equals(stale["rank"])
    found = {
        "full": metrics["after"]["unmasked"],
        "none": metrics["reasoning_none"]["unmasked"],
        "strangers": metrics["after"]["no_history"],
    }
    for name, frame in {"full": full, "none": none, "strangers": strangers}.items():
        expected = report(frame, {}, {}, seed=4)["unmasked"]["model"]
        assert found[name]["model"] == {metric: expected[metric] for metric in found[name]["model"]}, name
    assert len({json.dumps(figures["model"]["ndcg@10"]) for figures in found.values()}) == 3
    settings = {name: metrics[name]["protocol"]["settings"] for name in ("after", "reasoning_none")}
    lengths = {name: (one["reasoning"], one["max_completion_length"]) for name, one in settings.items()}
    assert lengths == {"after": ("full", 8), "reasoning_none": ("none", 0)}
    training = metrics["training"]
    assert (training["steps"], training["best_step"], training["best_validation"]) == (5, 3, 0.25)


def test_shares_of_reasonings_are_of_all_rows():
    """Of three, two name the family, one the stage as well, and two end by themselves."""
    text = write_reasoning("guitar", "strap", "fenta")
    frame = pl.DataFrame({"reasoning": [text, text, "no idea"], "has_marker": [True, False, True]})
    truth = [{"true_family": "guitar", "true_stage": stage} for stage in ("strap", "stand", "strap")]
    shares = run_end.reasoning_shares(frame, Dataset.from_list(truth))
    assert shares == pytest.approx({"has_marker": 2 / 3, "right_family": 2 / 3, "right_stage": 1 / 3})


def test_baselines_count_train_rows_alone():
    """a is bought twice in training, b once, c never: c, which all test users bought, is last of three for popularity
    and, as nothing was seen to follow it, for item to item."""
    rows = [{"user_id": "u", "history": ["b"], "target": "a"}] * 2 + [
        {"user_id": "v", "history": ["a"], "target": "b"}
    ]
    test = Dataset.from_list([{"user_id": f"w{row}", "history": ["a"], "target": "c"} for row in range(3)])
    items = Dataset.from_list([{"item_id": item, "title": item} for item in "abc"])
    data = DatasetDict({"train": Dataset.from_list(rows), "test": test, "items": items})
    frames = run_end.baseline_frames(data, test, synthetic=False)
    best = {name: frame["top_item_ids"].to_list() for name, frame in frames.items()}
    assert best == {"popularity": [["a", "b", "c"]] * 3, "item_to_item": [["b", "a", "c"]] * 3}
    for frame in frames.values():
        assert list(frame["rank"]) == [3, 3, 3] and list(frame["rank_masked"]) == [2, 2, 2]
        assert frame["user_id"].to_list() == ["w0", "w1", "w2"] and frame["target"].to_list() == ["c"] * 3


def test_a_bundle_answers_as_its_policy_was_trained():
    """Mixed precision, lengths and temperature go into its protocol; without autocast there is none."""
    args = SimpleNamespace(max_completion_length=7, item_temperature=0.05, forward_token_budget=99)
    for native, reasoning, expected in (
        (True, "full", ("bf16", 7)),
        (False, "full", ("no", 7)),
        (True, "none", ("bf16", 512)),
    ):
        accelerator = SimpleNamespace(mixed_precision="bf16", native_amp=native)
        made = run_end._bundle_protocol(SimpleNamespace(args=args, accelerator=accelerator, reasoning=reasoning))
        assert (made.mixed_precision, made.max_completion_length) == expected
        assert (made.reasoning, made.item_temperature, made.forward_token_budget) == (reasoning, 0.05, 99)


def test_a_command_is_kept_without_its_secrets():
    """metrics.json, report.html and the bundle's card hold it."""
    words = "recpo.py --hub_token hf_1 --push_to_hub-token=hf_2 --hub-token hf_3 --max_token 4 --seed 0".split()
    shown = (
        "recpo.py --hub_token <hidden> --push_to_hub-token=<hidden> --hub-token <hidden> --max_token <hidden> --seed 0"
    )
    assert without_tokens(words) == shown.split()
    assert without_tokens(["--hub_token=hf_1", "--seed", "0", "token", "x"]) == [
        *("--hub_token=<hidden>", "--seed", "0", "token", "x"),
    ]
