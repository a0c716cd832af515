"""
Every command of README and docs works: its flags are those of the recipe (fast), and it is run here on a short demo
and a tiny model (slow), run by the test that `ELSEWHERE` names, or says `not yet run`.
The examples of docstrings hold.
"""

import doctest
import importlib
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from r2ec_trl.cli.parsing import parse

ROOT = Path(__file__).parents[1]
EXAMPLES = [path.relative_to(ROOT) for path in sorted((ROOT / "r2ec_trl").rglob("*.py")) if ">>>" in path.read_text()]
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# What begins so → the test or the stage of .ci/run that runs it
ELSEWHERE = {
    "python recipes/serve.py": "tests/serving/test_server.py",
    "curl -s localhost:8000": "tests/serving/test_server.py",
    "accelerate launch recipes/recommend.py --bundle BUNDLE": "tests/serving/test_batch.py",
    "accelerate launch recipes/evaluate.py --bundle BUNDLE": "tests/test_flags.py",
    "python recipes/benchmark.py --case serve": "recipes/benchmark.py",  # by hand: its figures stand in that page
    "pip install": ".ci/run",
    "pip uninstall": ".ci/run",
    "python -m venv": ".ci/run",
    "pytest": ".ci/run",
    ".ci/run": ".ci/run",
    "CUDA_VISIBLE_DEVICES=3 VLLM_SERVER_DEV_MODE=1": "tests/vllm_backend/test_engine.py",
    "python recipes/prepare_data.py --source table": "tests/data/sources/test_table.py",
    "python recipes/prepare_data.py --source movielens": "tests/data/sources/test_movielens.py",
    "python recipes/prepare_data.py --source recbole": "tests/data/sources/test_recbole.py",
    "python recipes/prepare_data.py --config recipes/configs/data_paper.yaml": "tests/data/sources/test_amazon.py",
}
# Run here, in this order, with words that make it short; DIR, users.jsonl and outputs/demo are made by the fixture
DEMO = "--max_steps 1 --max_test_users 9 --eval_strategy no --save_strategy no --load_best_model_at_end false".split()
TINY = "--dtype float32 --bf16 false --per_device_train_batch_size 8 --report_to none --use_cpu".split() + DEMO
HERE = {
    "accelerate launch recipes/recpo.py": DEMO,
    "python recipes/recpo.py --plan": [],
    "accelerate launch recipes/evaluate.py --bundle outputs/demo/bundle": ["--max_eval_users", "9"],
    "python recipes/compare.py --before outputs/demo/before": [],
    "python recipes/baselines.py --dataset outputs/demo/demo_dataset": ["--max_eval_users", "9"],
    "python recipes/compare.py --before counts": [],
    "python recipes/try_reward.py --bundle outputs/demo/bundle": ["--max_eval_users", "4"],
    "python recipes/try_reward.py --rollouts outputs/rollouts.parquet": [],
    "python recipes/report.py --run outputs/demo": [],
    "python recipes/recommend.py --bundle outputs/demo/bundle": [],
    "python recipes/prepare_data.py --source sequences": [],
    "python recipes/prepare_data.py --check data/mine": [],
    "accelerate launch recipes/contrastive.py --config": [*TINY, "--model_name_or_path", "MODEL"],
    "accelerate launch recipes/recpo.py --config recipes/configs/smollm2_cpu.yaml": [
        *[*TINY, "--model_name_or_path", "MODEL", "--num_generations", "4", "--max_completion_length", "4"],
    ],
    "accelerate launch recipes/evaluate.py --bundle outputs/smollm2-recpo": ["--max_eval_users", "9"],
    "python recipes/recommend.py --bundle outputs/smollm2-recpo": [],
    "python recipes/compare.py --before outputs/smollm2-contrastive": [],
}


def commands():
    """`(page, command, whether its line says not yet run)` of every bash block, one line each."""
    for page in PAGES:
        for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
            for line in block.replace("\\\n", " ").split("\n"):
                for command in line.split("&&"):
                    if words := shlex.split(command, comments=True):
                        yield page.name, shlex.join(words), "not yet run" in line


def longest(command, table):
    """The longest beginning in the table that the command has."""
    return max((start for start in table if command.startswith(start)), key=len, default=None)


COMMANDS = list(commands())
RECIPES = [
    (page, command) for page, command, _ in COMMANDS if " recipes/" in command and "recipes/benchmark" not in command
]


@pytest.mark.parametrize(("page", "command", "not_yet"), COMMANDS)
def test_every_command_is_run_somewhere(page, command, not_yet):
    here, elsewhere = longest(command, HERE), longest(command, ELSEWHERE)
    assert not_yet or here or elsewhere or command.startswith((". ", "r2ec doctor")), f"{page}: {command}"
    assert elsewhere is None or (ROOT / ELSEWHERE[elsewhere]).is_file()


@pytest.mark.parametrize(("page", "command"), RECIPES)
def test_flags_of_commands_are_flags_of_the_recipes(page, command, monkeypatch):
    script, words = re.search(r"recipes/(\w+)\.py *(.*)", command).groups()
    spec = importlib.util.spec_from_file_location(f"recipe_{script}", ROOT / "recipes" / f"{script}.py")
    module, found = importlib.util.module_from_spec(spec), {}
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)

    class Found(Exception):
        pass

    def note(kinds, *args, **kwargs):
        found.update(kinds=kinds, default=kwargs.get("default_config"))
        raise Found

    module.parse = note
    with pytest.raises(Found):
        module.main()
    words = shlex.split(words.replace("...", "").split(">")[0])
    words = [str(ROOT / word) if word.startswith("recipes/") else word for word in words]
    parse(found["kinds"], args=words, default_config=found["default"])


@pytest.fixture(scope="module")
def place(tmp_path_factory, shop):
    """A working folder in which every input of the commands lies."""
    folder = tmp_path_factory.mktemp("place")
    for name in ("recipes", "accelerate_configs", "deepspeed_configs"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "DIR").mkdir()
    names = {"items": "items", "train": "train", "validation": "valid", "test": "test"}
    for split, name in names.items():
        lines = [json.dumps({key: row[key] for key in row if "timestamp" not in key}) for row in shop[split]]
        (folder / "DIR" / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "users.jsonl").write_text('{"history_titles": ["orvo black cello bow"]}\n')
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_commands_run(place, tiny_model_folder):
    order = list(HERE)
    mine = sorted(
        (c for _, c, skip in COMMANDS if longest(c, HERE) and not skip), key=lambda c: order.index(longest(c, HERE))
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    starts = {"python": [sys.executable], "accelerate": [sys.executable, "-m", "accelerate.commands.launch"]}
    for command in dict.fromkeys(mine):
        words = shlex.split(command)
        words += [
            str(tiny_model_folder("llama")) if word == "MODEL" else word for word in HERE[longest(command, HERE)]
        ]
        start = starts[words[0]] + words[1 + (words[0] == "accelerate") :]
        done = subprocess.run(start, capture_output=True, text=True, env=environment, cwd=place, timeout=600)
        if "prepare_data" in command and "exists" in done.stderr:
            continue  # README and docs/data.md both make data/mine
        assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"


def test_the_walk_names_functions_that_are_there_each_once_and_returns_to_no_room():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    walk = page[page.index("## The walk") : page.index("## Where to change")]
    names = re.findall(r"`([a-z_]+\.[\w.]+)`", walk)
    assert len(names) == len(set(names)) >= 20
    for name in names:
        module, *path = re.fullmatch(r"([a-z_.]+?)\.((?:[A-Z]\w+\.)?\w+)", name).groups()
        owner = importlib.import_module(f"r2ec_trl.{module}")
        for part in path[0].split("."):
            owner = getattr(owner, part)
        assert callable(owner), name
    rooms = [name.split(".")[0] for name in names]
    entered = [room for room, before in zip(rooms, [None, *rooms]) if room != before]
    assert len(entered) == len(set(entered)), f"a room is entered twice: {entered}"


def test_every_room_and_file_that_the_pages_name_is_there():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms = {path.name for path in (ROOT / "r2ec_trl").iterdir() if (path / "__init__.py").is_file()}
    assert rooms == {name for name in re.findall(r"^\| `(\w+)/` \|", page, re.MULTILINE)}
    for name in re.findall(r"`((?:\w+/)*\w+\.py)`", page):
        assert any((ROOT / place / name).is_file() for place in ("r2ec_trl", "", "recipes")), name
    for file in PAGES:
        for link in re.findall(r"\]\(([\w./-]+)\)", file.read_text(encoding="utf-8")):
            assert (file.parent / link).exists(), f"{file.name}: {link}"
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 170


@pytest.mark.parametrize("path", EXAMPLES, ids=str)
def test_the_examples_of_docstrings_hold(path):
    found = doctest.testmod(importlib.import_module(".".join(path.with_suffix("").parts)))
    assert found.attempted and not found.failed
