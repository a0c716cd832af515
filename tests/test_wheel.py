"""What a wheel holds, and that it works where there is no clone."""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import r2ec_trl

ROOT = Path(r2ec_trl.__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    subprocess.run(["git", "clone", "-q", ROOT, source], check=True)
    words = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, source]
    subprocess.run(list(map(str, words)), check=True, timeout=300)
    return next(folder.glob("*.whl"))


def test_package_data(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    policy = {path.name for path in (ROOT / "r2ec_trl" / "demo_policy").iterdir()}
    files = {"r2ec_trl/py.typed", "r2ec_trl/cli/run_report.html"}
    assert files | {f"r2ec_trl/demo_policy/{name}" for name in policy} <= names
    for folder, pattern in (
        ("recipes", "*.py"),
        ("recipes/benchmarks", "*.py"),
        ("recipes/configs", "*.yaml"),
        ("accelerate_configs", "*.yaml"),
        ("deepspeed_configs", "*.json"),
    ):
        files = {f"r2ec_trl/{folder}/{path.name}" for path in (ROOT / folder).glob(pattern)}
        assert files and files <= names
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "r2ec_trl").rglob("*.py")}
    assert modules <= names
    assert not [name for name in names if name.startswith("tests/")]


def test_a_folder_with_nothing_but_the_wheel(wheel, tmp_path):
    """Installed beside the packages of this environment: the demo policy, the commands, and nothing left behind."""
    place = tmp_path / "venv"
    venv.create(place, with_pip=False)
    bin_folder = place / "bin"
    pip = [sys.executable, "-m", "pip", "--python", str(bin_folder / "python")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    install = [*pip, "install", "-q", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, env=environment, cwd=tmp_path, timeout=120)
    site = next((place / "lib").glob("python*/site-packages"))
    others = [path for path in sys.path if path.endswith("site-packages")]
    (site / "others.pth").write_text("\n".join(others))

    def r2ec(*words):
        return subprocess.run(
            [bin_folder / "r2ec", *words], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=600
        )

    assert "no known problem" in r2ec("doctor").stdout or "PROBLEM" in r2ec("doctor").stdout
    run = r2ec("recpo", "--max_steps", "1", "--output_dir", "run", "--eval_strategy", "no", "--save_strategy", "no")
    assert run.returncode == 0, run.stderr[-2000:]
    answer = r2ec("recommend", "--bundle", "run/bundle", "--history", "d000", "d020", "--format", "jsonl")
    assert answer.returncode == 0 and '"items"' in answer.stdout
    subprocess.run([*pip, "uninstall", "-q", "-y", "r2ec_trl"], check=True, env=environment, cwd=tmp_path, timeout=120)
    left = [path for path in place.rglob("*") if "r2ec" in path.name and "__pycache__" not in str(path)]
    assert left == []
