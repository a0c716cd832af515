"""A bundle computes as the run that wrote it did, and recipes/evaluate.py works on it."""

import json
import runpy
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
import torch
from conftest import PROTOCOL
from transformers import AutoModelForCausalLM

from r2ec_trl.bundle import format as format_module
from r2ec_trl.bundle.bundle import Bundle, save_bundle
from r2ec_trl.cli.run_end import finish_run
from r2ec_trl.data.schema import load_dataset_card
from r2ec_trl.errors import UserError
from r2ec_trl.evaluation.report import read_ranks
from r2ec_trl.policy.loading import available_attention

RECIPES = Path(__file__).parents[2] / "recipes"


def test_the_base_is_asked_for_in_the_revision_it_had(own, monkeypatch):
    """A base of the hub may change; one that is named by hand is taken as it is."""
    meta = json.loads((own / "bundle.json").read_text())
    (own / "bundle.json").write_text(json.dumps(meta | {"base_revision": "4f2c"}))
    asked, load = [], format_module.load_policy

    def record(args, **kwargs):
        asked.append((args.model_revision, kwargs["trust_remote_code"]))
        return load(args, **kwargs)

    monkeypatch.setattr(format_module, "load_policy", record)
    Bundle.load(own)
    Bundle.load(own, model_name_or_path=meta["base_model"], trust_remote_code=True)
    assert asked == [("4f2c", False), ("main", True)]


def test_a_run_in_bfloat16_is_loaded_as_one(own, make_bundle_folder, shop):
    """Table and users are encoded under the same autocast; without the note the table would be stale."""
    bundle = Bundle.load(own)
    bundle.meta = replace(bundle.meta, protocol=replace(bundle.meta.protocol, mixed_precision="bf16"))
    assert bundle.staleness()["max_drift"] > 1e-6
    bundle.refresh_table()
    again = Bundle.load(own)
    assert again.staleness()["max_drift"] < 1e-9
    assert not again.evaluate(shop["test"])["logprob"].equals(
        Bundle.load(make_bundle_folder()).evaluate(shop["test"])["logprob"]
    )


def test_an_adapter_keeps_its_dtype(make_bundle_folder, shop):
    """TRL trains QLoRA adapters, and DeepSpeed all of them, in bfloat16; PEFT would read them back in float32."""
    bundle = Bundle.load(make_bundle_folder())
    for parameter in bundle.model.parameters():  # not the buffers: loading leaves them as they are
        parameter.data = parameter.data.bfloat16()
    bundle.refresh_table()
    changed = save_bundle(
        bundle.folder.parent / "bf16", bundle.model, bundle.prompts, bundle.table, bundle.items, protocol=PROTOCOL
    )
    again = Bundle.load(changed.folder)
    assert again.meta.adapter_dtype == again.meta.dtype == "bfloat16"
    assert again.staleness()["max_drift"] < 1e-9


def test_attention_that_is_not_here(caplog):
    assert [available_attention(name) for name in (None, "eager", "sdpa")] == [None, "eager", "sdpa"]
    assert available_attention("kernels-community/some") is None and "kernels-community/some" in caplog.text


def test_evaluating_a_bundle_whose_catalogue_has_grown(own, shop_folder, tmp_path, monkeypatch):
    """The protocol counts what was ranked, and the baselines rank it too; what the bundle decides is refused."""
    Bundle.load(own).add_items([{"item_id": "new", "title": "cello bow", "description": "", "brand": "orvo"}])
    words = ["--bundle", str(own), "--dataset", str(shop_folder), "--output_dir", str(tmp_path)]
    main = runpy.run_path(str(RECIPES / "evaluate.py"))["main"]
    monkeypatch.setattr("sys.argv", ["evaluate.py", *words])
    main()
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["protocol"]["catalogue_items"] == 41 and metrics["protocol"]["settings"]["bundle"] == str(own)
    assert metrics["unmasked"].keys() == {"model", "popularity", "item_to_item"}
    for flag in (["--load_in_4bit"], ["--similarity", "dot"], ["--max_completion_length", "9"], ["--adapter", "x"]):
        monkeypatch.setattr("sys.argv", ["evaluate.py", *words, *flag])
        with pytest.raises(UserError, match=f"{flag[0]} is decided by the bundle; leave it out"):
            main()


def test_what_only_training_reads_is_refused(shop_folder, tmp_path, launch):
    words = ["--dataset", shop_folder, "--model_name_or_path", "x"]
    for flags in (["--lora_r", "9"], ["--use_peft", "false"], ["--lora_target_modules", "x"], ["--selection_mask"]):
        with pytest.raises(UserError, match=f"{flags[0]} is of training and decides nothing here; leave it out"):
            launch("recommend", *words, "--history", "i00", *flags)
        with pytest.raises(UserError, match=f"{flags[0]} is of training"):
            launch("evaluate", *words, *flags, out=tmp_path)
    with pytest.raises(UserError, match="'x'"):  # how weights are held is no matter of training alone: x is not there
        launch("evaluate", *words, "--load_in_4bit", "--use_bnb_nested_quant", out=tmp_path)


@pytest.mark.parametrize("recipe", ["evaluate", "try_reward"])
def test_an_item_that_the_bundle_no_longer_holds(own, shop, shop_folder, tmp_path, monkeypatch, recipe):
    gone = shop["train"]["target"][0]
    Bundle.load(own).remove_items([gone])
    out = ["--output_dir", tmp_path / "out"] if recipe == "evaluate" else ["--rollouts", tmp_path / "r.parquet"]
    words = [f"{recipe}.py", "--bundle", own, "--dataset", shop_folder, *out]
    monkeypatch.setattr("sys.argv", [*map(str, words)])
    main = runpy.run_path(str(RECIPES / f"{recipe}.py"))["main"]
    with pytest.raises(UserError, match=f"Item '{gone}' of the train rows is not in the bundle's catalogue"):
        main()
    assert not (tmp_path / "out" / "ranks.parquet").exists() and not (tmp_path / "r.parquet").exists()


@pytest.fixture
def end_run(make_trainer, tiny_model_folder, shop, shop_folder, tmp_path):
    """`end_run(**settings)` ends an untrained run on the test users and returns its folder."""

    def call(**settings):
        model = AutoModelForCausalLM.from_pretrained(tiny_model_folder("llama"))
        trainer = make_trainer(model=model, output_dir=str(tmp_path / "run"), **settings)
        before = trainer.evaluate_frame(shop["test"])
        finish_run(trainer, shop, load_dataset_card(shop_folder), shop["test"], before)
        return tmp_path / "run"

    return call


def test_the_final_figures_come_from_the_bundle_on_disk(end_run, monkeypatch):
    evaluate = Bundle.evaluate

    def mark(self, dataset, **kwargs):
        return evaluate(self, dataset, **kwargs).with_columns(rank=pl.lit(7), reasoning=pl.lit(str(self.folder)))

    monkeypatch.setattr(Bundle, "evaluate", mark)
    folder = end_run()
    ranks, _ = read_ranks(folder)
    assert set(ranks["rank"]) == {7} and set(ranks["reasoning"]) == {str(folder / "bundle")}
    metrics = json.loads((folder / "metrics.json").read_text())
    figures = metrics["after"]["unmasked"]["model"]
    recorded = json.loads((folder / "bundle" / "bundle.json").read_text())["metrics"]["after"]["unmasked"]["model"]
    assert figures == recorded and figures["hit@10"]["value"] == 1 and figures["hit@5"]["value"] == 0
    kept = json.loads((folder / "bundle" / "bundle.json").read_text())["metrics"]["reasoning_none"]
    assert kept["protocol"]["settings"]["reasoning"] == "none" and kept["protocol"] != metrics["after"]["protocol"]


def test_a_run_in_bfloat16_leaves_a_bundle_that_says_so(end_run):
    bundle = Bundle.load(end_run(bf16=True) / "bundle")
    assert bundle.meta.protocol.mixed_precision == "bf16" and bundle.staleness()["max_drift"] < 1e-9


def test_a_final_evaluation_that_fails_loses_nothing_else(end_run, monkeypatch, caplog, tmp_path):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(Bundle, "evaluate", fail)
    with pytest.raises(torch.OutOfMemoryError):
        end_run()
    assert "its figures are missing: recipes/evaluate.py --bundle" in caplog.text
    monkeypatch.undo()
    assert Bundle.load(tmp_path / "run" / "bundle").staleness()["max_drift"] < 1e-9
    assert (tmp_path / "run" / "before" / "metrics.json").is_file() and not (
        tmp_path / "run" / "metrics.json"
    ).exists()


def test_a_base_without_a_name_is_noticed_when_it_is_saved(own, tmp_path):
    bundle = Bundle.load(own)
    bundle.meta = replace(bundle.meta, base_model="")
    with pytest.raises(UserError, match="has no name to load it by"):
        bundle.save(tmp_path / "nameless")
    assert not (tmp_path / "nameless").exists()
