"""A bundle: what is written is what is read, parts that do not belong together are refused, the catalogue changes."""

import json
import shutil
import subprocess
import sys

import datasets
import polars as pl
import pytest
import torch
from conftest import SHORT
from huggingface_hub import CommitInfo, HfApi, RepoUrl
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from r2ec_trl.bundle import bundle as bundle_module
from r2ec_trl.bundle.bundle import Bundle
from r2ec_trl.errors import UserError
from r2ec_trl.evaluation.report import report
from r2ec_trl.files import lock_folder
from r2ec_trl.items.scoring import top_k
from r2ec_trl.policy.prompts import PromptConfig, Prompts
from r2ec_trl.serving.recommender import Recommender


def catalogue_of(folder):
    return folder / json.loads((folder / "bundle.json").read_text())["catalogue"]


def unseen(count):
    """Items that the shop has not, with a column left out."""
    return [{"item_id": f"new{n}", "title": f"oboe reed {n}", "description": f"Reed {n}."} for n in range(count)]


# --------------------------------------------------------------------- load and save
def test_what_is_written_is_what_is_read(written, shop):
    first, second = Bundle.load(written), Bundle.load(written)
    frame = first.evaluate(shop["test"])
    assert frame.equals(second.evaluate(shop["test"]))
    assert torch.equal(first.table.rows, load_file(catalogue_of(written) / "item_table.safetensors")["rows"])
    assert first.items.to_polars().equals(shop["items"].to_polars())
    assert first.prompts.config == PromptConfig(category="part", **SHORT)
    assert first.staleness(sample=7)["max_drift"] < 1e-6
    assert first.meta.dataset_card["source"] == "tests" and first.meta.adapter


@pytest.mark.slow
def test_a_new_process_gets_the_same_ranks(written, shop, tmp_path):
    shop["test"].save_to_disk(tmp_path / "test")
    code = (
        "import sys, torch, datasets; torch.set_num_threads(1)\n"
        "from r2ec_trl.bundle.bundle import Bundle\n"
        "frame = Bundle.load(sys.argv[1]).evaluate(datasets.load_from_disk(sys.argv[2]))\n"
        "frame.write_parquet(sys.argv[3])"
    )
    subprocess.run([sys.executable, "-c", code, written, tmp_path / "test", tmp_path / "ranks.parquet"], check=True)
    assert pl.read_parquet(tmp_path / "ranks.parquet").equals(Bundle.load(written).evaluate(shop["test"]))


def test_full_weights(make_bundle_folder, shop, tiny_model_folder):
    folder = make_bundle_folder(adapter=False)
    bundle = Bundle.load(folder)
    assert not bundle.meta.adapter and bundle.staleness()["max_drift"] < 1e-6
    assert bundle.evaluate(shop["test"].select(range(2))).height == 2
    with pytest.raises(UserError, match="holds full weights"):
        Bundle.load(folder, model_name_or_path=str(tiny_model_folder("llama")))
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"] = weights["model.norm.weight"] * 2
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="made with another weights than"):
        Bundle.load(folder)


def test_the_rows_are_memory_mapped(own):
    bundle = Bundle.load(own)
    with open("/proc/self/maps") as maps:
        assert str(catalogue_of(own) / "item_table.safetensors") in maps.read()
    before = (catalogue_of(own) / "item_table.safetensors").read_bytes()
    bundle.table.rows[0] = 0  # a private mapping: the file keeps its rows
    assert (catalogue_of(own) / "item_table.safetensors").read_bytes() == before


def test_the_base_may_have_moved(own, tiny_model_folder, tmp_path, shop):
    for file in ("bundle.json", "adapter_config.json"):
        text = (own / file).read_text().replace(str(tiny_model_folder("llama")), "/gone/private")
        (own / file).write_text(text)
    with pytest.raises(UserError, match="/gone/private.*cannot be loaded"):
        Bundle.load(own)
    moved = shutil.copytree(tiny_model_folder("llama"), tmp_path / "moved")
    assert Bundle.load(own, model_name_or_path=str(moved)).staleness()["max_drift"] < 1e-6


def test_only_bundles_are_replaced(written, own, tmp_path):
    bundle = Bundle.load(written)
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="exists and is no bundle"):
        bundle.save(stranger)
    assert (stranger / "thesis.tex").read_text() == "years of work"
    (own / "leftover").write_text("")
    bundle.save(own)
    assert not (own / "leftover").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own", "stranger"]


def test_a_copy_elsewhere_is_no_other_home(own, tmp_path):
    """The bundle stays that of its own folder, and can be changed there; an id of two letters is not two ids."""
    bundle = Bundle.load(own)
    bundle.save(tmp_path / "copy")
    bundle.add_items([{"item_id": name, "title": f"oboe {name}"} for name in ("1", "2", "12")])
    with pytest.raises(UserError, match="'12' is no list"):
        bundle.remove_items("12")
    assert Bundle.load(own).table.item_ids[-3:] == ["1", "2", "12"] and len(Bundle.load(tmp_path / "copy").table) == 40


def test_what_another_added_is_not_saved_over(own, tmp_path):
    one, two = Bundle.load(own), Bundle.load(own)
    one.add_items(unseen(1))
    with pytest.raises(UserError, match="was changed since it was loaded"):
        two.save(own)
    assert len(Bundle.load(own).table) == 41
    one.save(own)
    one.add_items([{"item_id": "more", "title": "oboe"}])
    assert len(Bundle.load(own).table) == 42 and len(Bundle.load(two.save(tmp_path / "copy")).table) == 40


def test_what_is_no_bundle(own, tmp_path):
    with pytest.raises(UserError, match="neither a folder nor a hub id"):
        Bundle.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="has no bundle.json"):
        Bundle.load(tmp_path)
    meta = json.loads((own / "bundle.json").read_text())
    for text, sentence in (
        ("{", "bundle.json cannot be read"),
        (json.dumps({**meta, "format": 99}), "has format 99"),
        (json.dumps({**meta, "prompts": {"colour": "red"}}), "lacks or misspells a key"),
        (json.dumps({**meta, "catalogue": "catalogue-00000000"}), "cannot be read as the bundle's items"),
        (json.dumps({**meta, "catalogue": "../../home"}), "which is no catalogue's name"),
    ):
        (own / "bundle.json").write_text(text)
        with pytest.raises(UserError, match=sentence):
            Bundle.load(own)


# -------------------------------------------------------------------- mixed-up parts
def change_adapter(folder, other):
    shutil.copy(other(seed=1) / "adapter_model.safetensors", folder)


def change_adapter_settings(folder, other):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 2 * config["lora_alpha"]}))


def change_prompts(folder, other):
    meta = json.loads((folder / "bundle.json").read_text())
    meta["prompts"]["item_fields"] = ["title", "brand"]
    (folder / "bundle.json").write_text(json.dumps(meta))


def change_tokenizer(folder, other):
    (folder / "chat_template.jinja").write_text((folder / "chat_template.jinja").read_text() + " ")


def change_items(folder, other):
    items = pl.read_parquet(catalogue_of(folder) / "items.parquet")
    items.with_columns(pl.col("title").reverse()).write_parquet(catalogue_of(folder) / "items.parquet")


def change_table_for_other_weights(folder, other):
    shutil.copy(catalogue_of(other(seed=1)) / "item_table.safetensors", catalogue_of(folder))


def change_table_for_other_prompts(folder, other):
    shutil.copy(catalogue_of(other(item_fields=("title",))) / "item_table.safetensors", catalogue_of(folder))


@pytest.mark.parametrize(
    "change, part",
    [
        (change_adapter, "weights"),
        (change_adapter_settings, "weights"),
        (change_prompts, "prompts"),
        (change_tokenizer, "tokenizer"),
        (change_items, "catalogue"),
        (change_table_for_other_weights, "weights"),
        (change_table_for_other_prompts, "prompts"),
        (lambda *args: (change_adapter(*args), change_items(*args)), "weights and catalogue"),
    ],
)
def test_mixed_up_parts_are_refused_by_name(own, make_bundle_folder, change, part):
    change(own, make_bundle_folder)
    with pytest.raises(UserError, match=f"was made with another {part} than the bundle holds"):
        Bundle.load(own)


def test_another_base_of_the_same_shape_is_refused(own, tiny_model, chat_tokenizer, tmp_path):
    tiny_model("llama", seed=5).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="another base model than"):
        Bundle.load(own, model_name_or_path=str(tmp_path / "other"))


def test_prompts_that_are_rendered_otherwise_are_refused(own, monkeypatch):
    """The same fields, template and tokenizer make other tokens, in another release of transformers, say."""
    monkeypatch.setattr(Prompts, "rendered_fingerprint", lambda self: "0" * 64)
    with pytest.raises(UserError, match="was made with another rendered prompts than the bundle holds"):
        Bundle.load(own)


# ------------------------------------------------------------- changes of the catalogue
def test_added_items_are_recommended_at_once(own, shop):
    bundle = Bundle.load(own)
    old_rows = bundle.table.rows.clone()
    user = dict(shop["test"][0])
    queries = bundle.table.rows[:3].clone()
    old_scores, _ = top_k(queries, bundle.table.rows, 40)
    bundle.add_items(unseen(50))
    assert torch.equal(bundle.table.rows[:40], old_rows)  # bit-identical
    for number in range(3):
        new_scores = dict(zip(*(part[number].tolist() for part in reversed(top_k(queries, bundle.table.rows, 90)))))
        kept = sorted((score for row, score in new_scores.items() if row < 40), reverse=True)
        assert torch.allclose(torch.tensor(kept), old_scores[number], atol=1e-6, rtol=0)
    new_ids = [f"new{n}" for n in range(50)]
    for reader in (bundle, Bundle.load(own)):  # at once, and after a reload
        [result] = Recommender(reader).recommend([user["history"]], 50, allow=new_ids)
        assert {item.item_id for item in result.items} == set(new_ids)
        assert reader.items[40]["brand"] is None and len(reader.table) == 90
    assert bundle.staleness()["max_drift"] < 1e-6
    [result] = Recommender(bundle).recommend([["new3", "i01"]], 90)  # and can be bought
    assert "new3" not in {item.item_id for item in result.items} and len(result.items) == 88


def test_a_new_item_can_win(own):
    """An item with the text of an old one gets its row: added, it stands beside it."""
    bundle = Bundle.load(own)
    twin = {**bundle.items[7], "item_id": "twin"}
    bundle.add_items(datasets.Dataset.from_list([twin]))
    assert torch.allclose(bundle.table.rows[40], bundle.table.rows[7], atol=1e-6)
    _, best = top_k(bundle.table.rows[[7]].clone(), bundle.table.rows, 2)
    assert set(best[0].tolist()) == {7, 40}


def test_removed_items_never_appear(own, shop):
    bundle = Bundle.load(own)
    bundle.add_items(unseen(50))
    bundle.remove_items([f"new{n}" for n in range(50)])
    fresh = Bundle.load(own)
    assert torch.equal(fresh.table.rows, bundle.table.rows) and len(fresh.table) == 40
    [result] = Recommender(fresh).recommend([["i00"]], 100, exclude_history=False)
    assert {item.item_id for item in result.items} == set(shop["items"]["item_id"])
    gone = [f"i{n:02d}" for n in range(10, 40)]
    fresh.remove_items(gone)
    [result] = Recommender(fresh).recommend([["i00"]], 100)
    assert len(result.items) == 9 and not {item.item_id for item in result.items} & set(gone)
    with pytest.raises(UserError, match="is not in the catalogue"):
        fresh.remove_items(["i39"])
    with pytest.raises(UserError, match="keep two at least"):
        fresh.remove_items([f"i{n:02d}" for n in range(9)])


def test_updates_encode_only_what_changed(own):
    bundle = Bundle.load(own)
    rows = bundle.table.rows.clone()
    # the brand is not in the prompt; the title is
    count = bundle.update_items([{"item_id": "i03", "brand": "new"}, {"item_id": "i05", "title": "bagpipe drone"}])
    assert count == 1
    assert [n for n in range(40) if not torch.equal(rows[n], bundle.table.rows[n])] == [5]
    fresh = Bundle.load(own)
    assert fresh.items[3]["brand"] == "new" and fresh.items[3]["title"] == "guitar strap"
    assert fresh.prompts.titles["i05"] == "bagpipe drone" and fresh.staleness()["max_drift"] < 1e-6
    assert bundle.update_items([{"item_id": "i07", "description": "A drum of another kind."}]) == 1
    assert not torch.equal(rows[7], bundle.table.rows[7]) and bundle.staleness()["max_drift"] < 1e-6


@pytest.mark.parametrize(
    "method, rows, sentence",
    [
        ("add_items", [], "no items among the rows"),
        ("add_items", {"item_id": "a", "title": "x"}, "give a list of objects with `item_id`"),
        ("add_items", ["a"], "give a list of objects with `item_id`"),
        ("update_items", None, "The rows are None"),
        ("remove_items", "i01", "'i01' is no list; give a list of item ids"),
        ("remove_items", [["i01"]], "is not in the catalogue"),
        ("add_items", [{"title": "x"}], "Row 0 has no `item_id`"),
        ("add_items", [{"item_id": 3, "title": "x"}], "Row 0 has no `item_id`"),
        ("add_items", [{"item_id": "a", "title": "x"}] * 2, "'a' is given twice"),
        ("add_items", [{"item_id": "i01", "title": "x"}], "'i01' is in the catalogue already"),
        ("add_items", [{"item_id": "a"}], "'a' has no title"),
        ("add_items", [{"item_id": "a", "title": "x", "colour": "red"}], "no column 'colour'; it has item_id, title"),
        ("add_items", [{"item_id": "a", "title": "x", "brand": 3}], "Column 'brand' holds string"),
        ("update_items", [{"item_id": "a", "title": "x"}], "'a' is not in the catalogue"),
        ("update_items", [{"item_id": "i01", "title": None}], "'i01' would lose its title"),
    ],
)
def test_bad_rows_change_nothing(own, method, rows, sentence):
    bundle = Bundle.load(own)
    before = (own / "bundle.json").read_bytes()
    with pytest.raises(UserError, match=sentence):
        getattr(bundle, method)(rows)
    assert (own / "bundle.json").read_bytes() == before and len(bundle.table) == 40


@pytest.mark.parametrize(
    "change",
    [
        lambda bundle: bundle.add_items(unseen(1)),
        lambda bundle: bundle.update_items([{"item_id": "i03", "brand": "new"}]),
        lambda bundle: bundle.remove_items(["i03"]),
        lambda bundle: bundle.refresh_table(),
        lambda bundle: bundle.record_metrics({"note": 1}),
        lambda bundle: bundle.save(bundle.folder),
    ],
    ids=["add", "update", "remove", "refresh", "record", "save"],
)
def test_every_change_waits_for_the_lock(own, monkeypatch, change):
    bundle = Bundle.load(own)
    before = (own / "bundle.json").read_bytes()
    monkeypatch.setattr(bundle_module, "LOCK_TIMEOUT", 0.05)
    with lock_folder(own):
        with pytest.raises(UserError, match="is being changed by process .* within 0.05 seconds"):
            change(bundle)
    assert (own / "bundle.json").read_bytes() == before
    change(bundle)
    assert (own / "bundle.json").read_bytes() != before


def test_an_interrupted_change_leaves_the_old_bundle(own, monkeypatch):
    bundle = Bundle.load(own)

    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(bundle_module, "write_meta", fail)
    with pytest.raises(KeyboardInterrupt):
        bundle.add_items(unseen(3))
    monkeypatch.undo()
    bundle = Bundle.load(own)
    assert len(bundle.table) == 40
    bundle.add_items(unseen(1))  # what the interruption left goes with the old one
    assert [path.name for path in own.glob("catalogue-*")] == [catalogue_of(own).name]
    assert not list(own.glob(".*"))


def test_a_catalogue_is_not_added_to_files_that_were_exchanged(own, make_bundle_folder):
    bundle = Bundle.load(own)
    change_adapter(own, make_bundle_folder)
    with pytest.raises(UserError, match="another weights than"):
        bundle.add_items(unseen(1))


def test_staleness_of_trained_weights(own):
    bundle = Bundle.load(own)
    with torch.no_grad():
        for name, parameter in bundle.model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(0.9)
    stale = bundle.staleness(sample=10)
    assert stale["rows"] == 10 and 1e-4 < stale["mean_drift"] <= stale["max_drift"]
    bundle.folder = None  # its adapter on disk is the old one
    bundle.refresh_table()
    assert bundle.staleness()["max_drift"] < 1e-6


# ------------------------------------------------------------------------- hub and card
def test_push_reaches_the_hub_api(own, monkeypatch):
    calls = []

    def create_repo(self, repo_id, **kwargs):
        calls.append(("create_repo", repo_id, kwargs))
        return RepoUrl(f"https://huggingface.co/someone/{repo_id}")

    def upload_folder(self, **kwargs):
        assert (own / ".lock").exists()  # nobody changes it meanwhile
        calls.append(("upload_folder", sorted(path.name for path in kwargs["folder_path"].iterdir()), kwargs))
        return CommitInfo(
            commit_url="https://huggingface.co/someone/games/commit/abc",
            commit_message="",
            commit_description="",
            oid="",
        )

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    Bundle.load(own).push_to_hub("games", private=True)
    assert calls[0] == ("create_repo", "games", {"private": True, "exist_ok": True})
    name, files, kwargs = calls[1]
    assert kwargs["repo_id"] == "someone/games"
    old = ["catalogue-0/items.parquet", "model-1-of-2.safetensors", "model.safetensors.index.json", "config.json"]
    old += ["vocab.json", "code.py", "additional_chat_templates/x.jinja", "notes.txt"]
    assert list(filter_repo_objects(old, allow_patterns=kwargs["delete_patterns"])) == old[:-1]
    assert {"README.md", "bundle.json", "adapter_model.safetensors", "tokenizer.json"} <= set(files)


def test_a_bundle_of_the_hub_is_changed_in_memory_alone(own, monkeypatch, tmp_path):
    monkeypatch.setattr("r2ec_trl.bundle.format.snapshot_download", lambda name: str(own))
    bundle = Bundle.load("someone/games")
    bundle.add_items(unseen(1))
    assert len(bundle.table) == 41 and len(Bundle.load(own).table) == 40
    assert not bundle.meta.hashes, "they are those of the catalogue that was read"
    with pytest.raises(UserError, match="lies in no local folder"):
        bundle.push_to_hub("games")
    assert len(Bundle.load(bundle.save(tmp_path / "mine")).table) == 41


def test_the_card_tells_how_to_use_it_and_what_it_reached(own, shop, tiny_model_folder):
    bundle = Bundle.load(own)
    frame = bundle.evaluate(shop["test"])
    ranks = {"popularity": frame}
    bundle.model_card = (
        "---\nlibrary_name: transformers\ntags:\n- grpo\n---\n\n# Run\n\nOf [None](https://huggingface.co/None)\n\n"
        "## Quick start\n\nchat\n\n## Citations\n\nx\n"
    )
    for _ in range(2):  # the second time replaces the section
        bundle.record_metrics({"before": report(frame, {}, {}), "after": report(frame, ranks, {})})
    text = (own / "README.md").read_text()
    assert text.count("## Recommendation") == 1 and "chat" not in text and "## Citations\n\nx" in text
    assert "Recommender.from_pretrained" in text and "| item_temperature | 0.05 |" in text
    assert "| metric | before | after | popularity |" in text and "| hit@10, history masked |" in text
    assert "- grpo" in text and "library_name: peft" in text and "Of a model in a local folder" in text
    assert str(tiny_model_folder("llama")) not in text  # a folder is no base model of the hub's
    assert Bundle.load(own).meta.metrics["after"]["rows"] == 10
