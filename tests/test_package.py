"""The package as it is installed, its settings files, and the house rules a machine can check."""

import ast
import configparser
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import r2ec_trl

ROOT = Path(r2ec_trl.__file__).parents[1]
SOURCES = sorted((ROOT / "r2ec_trl").rglob("*.py"))
PROGRAMS = sorted((ROOT / "recipes").glob("*.py"))


def _setup():
    setup = configparser.RawConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    return setup


@pytest.mark.parametrize("name", r2ec_trl.__all__)
def test_public_names_are_there(name):
    assert getattr(r2ec_trl, name).__name__ == name
    assert name in dir(r2ec_trl)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'RecPO'"):
        r2ec_trl.RecPO


def test_import_is_light():
    code = "import sys, r2ec_trl; print(r2ec_trl.__version__, {'torch', 'trl', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout == f"{r2ec_trl.__version__} set()\n"


def test_the_version_is_said_twice_and_agrees():
    assert _setup()["metadata"]["version"] == r2ec_trl.__version__


def test_installed_versions_are_within_the_ranges():
    for line in _setup()["options"]["install_requires"].split("\n"):
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            version = importlib.metadata.version(requirement.name)
            assert requirement.specifier.contains(version, prereleases=True), f"{line}: {version} is installed"


def test_the_package_is_typed():
    assert (ROOT / "r2ec_trl" / "py.typed").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "accelerate_configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_launch_settings_load_and_point_at_a_file(path):
    from accelerate.commands.config.config_args import load_config_from_file

    text = path.read_text()
    assert [line.split(":")[0] for line in text.splitlines() if line.startswith("# ") and line[2] != " "] == [
        "# What",
        "# Launch",
        "# Override",
    ]
    assert f"accelerate_configs/{path.name}" in text
    load_config_from_file(str(path))
    settings = yaml.safe_load(text)
    assert "num_processes" not in settings
    if settings["distributed_type"] == "DEEPSPEED":
        assert settings["deepspeed_config"]["deepspeed_config_file"] == f"deepspeed_configs/{path.stem}.json"
        deepspeed = json.loads((ROOT / "deepspeed_configs" / f"{path.stem}.json").read_text())
        assert str(deepspeed["zero_optimization"]["stage"]) == path.stem[4]
        sizes = (
            "train_batch_size",
            "train_micro_batch_size_per_gpu",
            "gradient_accumulation_steps",
            "gradient_clipping",
        )
        assert all(deepspeed[size] == "auto" for size in sizes)


def test_every_deepspeed_setting_has_its_launch_setting():
    names = {path.stem for path in (ROOT / "accelerate_configs").glob("*.yaml")}
    deepspeed = {path.stem for path in (ROOT / "deepspeed_configs").glob("*.json")}
    assert names - {"cpu", "single_gpu", "multi_gpu"} == deepspeed == {"zero1", "zero2", "zero3", "zero3_offload"}


def _body_lines(function):
    """Lines of a function without its decorators and docstring."""
    docstring = function.body[0] if ast.get_docstring(function) is not None else None
    lines = function.end_lineno - function.lineno + 1
    return lines - (docstring.end_lineno - docstring.lineno + 1 if docstring else 0)


@pytest.mark.parametrize("path", SOURCES + PROGRAMS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_house_rules(path):
    """At most 400 lines a file, 60 a function (docstring apart); no bare except; no print to stdout in the library."""
    text = path.read_text(encoding="utf-8")
    broken = [f"{len(text.splitlines())} lines"] if len(text.splitlines()) > 400 else []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and _body_lines(node) > 60:
            broken.append(f"line {node.lineno}: {node.name} has {_body_lines(node)} lines")
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            broken.append(f"line {node.lineno}: bare except")
        if path in SOURCES and isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print":
            if "file" not in [keyword.arg for keyword in node.keywords]:
                broken.append(f"line {node.lineno}: print")
    assert not broken, "; ".join(broken)
