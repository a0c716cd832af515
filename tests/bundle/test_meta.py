"""bundle.json is read by one reader: every value of another type is one sentence, old formats still load."""

import json
import logging

import pytest
from conftest import PROTOCOL
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from r2ec_trl.bundle.bundle import Bundle
from r2ec_trl.bundle.meta import Protocol, read_meta
from r2ec_trl.errors import UserError


def as_format_1(folder):
    """The bundle as 0.1.0 wrote it: the old names, no seal, hashes in the item table alone."""
    meta = json.loads((folder / "bundle.json").read_text())
    protocol = meta["protocol"]
    protocol["max_new_tokens"] = protocol.pop("max_completion_length")
    protocol["token_budget"] = protocol.pop("forward_token_budget")
    del protocol["mixed_precision"], meta["prompts"]["prompt_date"], meta["prompts"]["chat_template_kwargs"]
    names = ("weights", "prompts", "tokenizer", "catalogue", "base model")
    meta["hashes"] = {name: meta["hashes"][name] for name in names}
    (folder / "bundle.json").write_text(json.dumps({**meta, "format": 1}, indent=2))
    table = folder / meta["catalogue"] / "item_table.safetensors"
    save_file(load_file(table), table, metadata=meta["hashes"])
    return folder


def test_a_bundle_of_0_1_0_answers_as_ever_and_can_be_changed(own, written, shop, caplog):
    old = as_format_1(own)
    with caplog.at_level(logging.WARNING):
        bundle = Bundle.load(old)
    assert (
        "`max_new_tokens` is now `max_completion_length`, `token_budget` is now `forward_token_budget`" in caplog.text
    )
    assert bundle.meta.protocol == Protocol.read(PROTOCOL)
    assert bundle.evaluate(shop["test"]).equals(Bundle.load(written).evaluate(shop["test"]))
    bundle.remove_items(["i03"])
    assert json.loads((old / "bundle.json").read_text())["format"] == 2
    again = Bundle.load(old)
    assert len(again.table) == 39 and again.staleness()["max_drift"] < 1e-6


def test_figures_kept_with_a_bundle_of_format_1_leave_it_loadable(own, written, shop):
    old = as_format_1(own)
    Bundle.load(old).record_metrics({"note": 1})
    again = Bundle.load(old)
    assert again.meta.metrics == {"note": 1}
    assert again.evaluate(shop["test"]).equals(Bundle.load(written).evaluate(shop["test"]))


@pytest.mark.parametrize(
    "part", ["adapter_model.safetensors", "tokenizer.json", "items.parquet", "item_table.safetensors"]
)
def test_exchanged_parts_of_an_old_bundle_are_still_refused(own, make_bundle_folder, part):
    old, other = as_format_1(own), make_bundle_folder(seed=1, item_fields=("title",))
    if part.startswith("item"):
        name = json.loads((old / "bundle.json").read_text())["catalogue"]
        theirs = json.loads((other / "bundle.json").read_text())["catalogue"]
        source, target = other / theirs / part, old / name / part
    else:
        source, target = other / part, old / part
    data = source.read_bytes()
    if part in ("tokenizer.json", "items.parquet"):  # those of the other bundle are the same
        data = data + b" " if part == "tokenizer.json" else changed_items(source, target.parent)
    target.write_bytes(data)
    with pytest.raises(UserError, match="was made with another"):
        Bundle.load(old)


def changed_items(source, folder):
    import polars as pl

    pl.read_parquet(source).with_columns(pl.col("title").reverse()).write_parquet(folder / "new")
    return (folder / "new").read_bytes()


WRONG = [None, True, 3, -1, 0.5, "x", "", [], ["x"], {}, {"x": 1}, 10**400, "\ud800"]


def _paths(value, path=()):
    yield path
    if isinstance(value, dict):
        for key, one in value.items():
            if path[:1] not in (("dataset_card",), ("versions",)):  # free text
                yield from _paths(one, (*path, key))


def test_every_value_of_another_type_is_one_sentence(own):
    """Each key of bundle.json, at every depth, with each kind of value, and without it."""
    file = own / "bundle.json"
    text, right = file.read_text(), read_meta(own)
    counts = {"refused": 0, "taken": 0}
    for path in list(_paths(json.loads(text)))[1:]:
        for value in [*WRONG, "absent"]:
            meta = json.loads(text)
            parent = meta
            for key in path[:-1]:
                parent = parent[key]
            if value == "absent":
                del parent[path[-1]]
            else:
                parent[path[-1]] = value
            file.write_text(json.dumps(meta))
            try:
                found = read_meta(own)  # a value that could stand there: the seal tells, unless it says the same
                sealed = found.seal() == found.hashes["settings"]
                assert not sealed or found == right or path[0] in ("base_model", "base_revision"), (path, value)
                counts["taken"] += 1
            except UserError as error:
                counts["refused"] += 1
                assert "\n" not in str(error) and len(str(error)) < 600, (path, value)
    assert counts["refused"] > 400, counts


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"protocol": {**PROTOCOL, "reasoning": 3}}, "`protocol`: `reasoning` is 3, but should be a text"),
        ({"protocol": {**PROTOCOL, "item_temperature": 0}}, "`item_temperature` is 0, which is out of range"),
        ({"protocol": {**PROTOCOL, "reasoning": "other"}}, "`reasoning` is 'other', which is out of range"),
        ({"protocol": [1]}, "`protocol` lacks or misspells a key: it is .1., not an object"),
        ({"prompts": {"marker": 5}}, "`prompts`: `marker` is 5, but should be a text"),
        ({"similarity": "l2"}, "`similarity` is 'l2'; it must be one of"),
        ({"dtype": "int8"}, "`dtype` is 'int8'"),
        ({"quantization": {"load_in_4bit": "yes"}}, "`quantization` has load_in_4bit 'yes'"),
        ({"quantization": {"trust_remote_code": True}}, "unknown key 'trust_remote_code'"),
        ({"hashes": {}}, "has no seal"),
        ({"hashes": {"weights": 3}}, "`hashes` is {'weights': 3}, but should be an object"),
        ({"num_items": 7}, "bundle.json is not what was written there: its hash differs"),
        ({"similarity": "dot"}, "bundle.json is not what was written there: its hash differs"),
        ({"metrics": {"after": 1}}, "bundle.json is not what was written there: its hash differs"),
        ({"protocol": {**PROTOCOL, "max_completion_length": 9}}, "bundle.json is not what was written there"),
        ({"format": "2"}, "has format '2'"),
        ({"format": True}, "has format True"),
        ({"base_model": "/somewhere/else"}, "'/somewhere/else'.*cannot be loaded"),
    ],
)
def test_a_changed_bundle_json_is_refused(own, change, sentence):
    meta = json.loads((own / "bundle.json").read_text())
    (own / "bundle.json").write_text(json.dumps({**meta, **change}))
    with pytest.raises(UserError, match=sentence):
        Bundle.load(own)


def test_old_names_of_the_protocol_are_read(caplog):
    old = {"reasoning": "none", "max_new_tokens": 3, "item_temperature": 1, "token_budget": 5}
    with caplog.at_level(logging.WARNING):
        assert Protocol.read(old) == Protocol("none", 3, 1, 5)
    assert len(caplog.records) == 1
    with pytest.raises(UserError, match="lacks or misspells a key: there is no `item_temperature`"):
        Protocol.read({"reasoning": "none", "max_completion_length": 3})


def test_the_hashes_of_an_item_table_are_those_of_its_bundle(written):
    meta = read_meta(written)
    with safe_open(written / meta.catalogue / "item_table.safetensors", framework="pt") as tensors:
        made_with = tensors.metadata()
    assert made_with == {name: meta.hashes[name] for name in made_with}
    assert meta.hashes.keys() - made_with.keys() == {"item file", "item table", "settings"}
