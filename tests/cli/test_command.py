"""`r2ec`: the same recipe files, from a clone or from a wheel."""

import sys
from pathlib import Path

import pytest
import yaml

from r2ec_trl.cli import command as module
from r2ec_trl.errors import UserError


def test_every_recipe_has_a_name():
    names = module.recipes()
    assert {"recpo", "contrastive", "evaluate", "recommend", "compare", "prepare-data"} <= set(names)
    assert all(path.is_file() for path in names.values())


def test_what_trains_goes_through_accelerate_and_the_rest_does_not(tmp_path):
    trained = module.command(["recpo", "--seed", "3"], str(tmp_path))
    assert trained[:3] == [sys.executable, "-m", "accelerate.commands.launch"]
    assert trained[3] == "--quiet"  # the recipe's sentence is enough: no traceback of the launcher's below it
    assert trained[4:] == [str(module.recipes()["recpo"]), "--seed", "3"]
    assert module.command(["compare", "--help"], str(tmp_path)) == [
        sys.executable,
        str(module.recipes()["compare"]),
        "--help",
    ]


def test_launch_settings_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = module.command(["recpo", "--launch", "zero2", "--seed", "3"], str(tmp_path))
    assert words == module.command(["recpo", "--launch=zero2", "--seed", "3"], str(tmp_path))
    assert words[4] == "--config_file" and words[6:] == [str(module.recipes()["recpo"]), "--seed", "3"]
    deepspeed = yaml.safe_load(Path(words[5]).read_text())["deepspeed_config"]["deepspeed_config_file"]
    assert Path(deepspeed).is_absolute() and Path(deepspeed).name == "zero2.json" and Path(deepspeed).is_file()


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["recp"], "r2ec knows no 'recp'; did you mean 'recpo'?"),
        (["recpo", "--launch", "zero9"], "--launch 'zero9' is neither a file nor one of cpu, "),
        (["recpo", "--launch"], "--launch needs the name of accelerate settings"),
    ],
)
def test_mistakes_are_one_sentence(words, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence.replace("?", r"\?")):
        module.command(words, str(tmp_path))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "holds no accelerate settings"),
        ("- a", "holds no accelerate settings"),
        ("deepspeed_config: 3", "holds no accelerate settings"),
        ("a: [", "cannot be read as YAML"),
        ("\x00", "cannot be read as YAML"),
    ],
)
def test_launch_settings_that_are_none_are_one_sentence(text, sentence, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=sentence):
        module.launch_settings(str(file), str(tmp_path))
    file.write_text("deepspeed_config:\n")
    assert module.launch_settings(str(file), str(tmp_path)).is_file()


def test_help_and_doctor_print(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["r2ec"])
    module.main()
    assert "prepare-data" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["r2ec", "doctor"])
    module.main()
    assert "torch " in capsys.readouterr().out
