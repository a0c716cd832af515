"""The console command `r2ec NAME ARGS`: the recipe files, wherever they are installed."""

import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from r2ec_trl.cli.parsing import did_you_mean, run
from r2ec_trl.errors import UserError, first_line

TRAINS = ("recpo", "contrastive")  # through `accelerate launch`; the others in this interpreter's own process
HELP = """usage: r2ec NAME [--launch SETTINGS] ARGS

NAME is a recipe ({names}) or `doctor`, which prints what a bug report needs.
ARGS are the recipe's own: `r2ec NAME --help`. `--launch zero2` (or a file) trains with those accelerate settings:
{launches}."""


def home() -> Path:
    """The folder that holds `recipes/` and `accelerate_configs/`: a clone, or what the wheel installed."""
    package = Path(__file__).parents[1]
    for folder in (package.parent, package):
        if (folder / "recipes" / "recpo.py").is_file():
            return folder
    raise UserError(f"The recipes are neither beside nor inside {package}; install r2ec_trl again.")


def recipes() -> dict[str, Path]:
    """Name on the command line → file; `prepare_data.py` is called `prepare-data`."""
    return {path.stem.replace("_", "-"): path for path in sorted((home() / "recipes").glob("*.py"))}


def launch_settings(name: str, folder: str) -> Path:
    """
    The accelerate settings called `name` (such as `"zero2"`), or the YAML file of that name, copied into `folder` with
    DeepSpeed's file found from anywhere.
    """
    known = {path.stem: path for path in (home() / "accelerate_configs").glob("*.yaml")}
    file = known.get(name, Path(name))
    if not file.is_file():
        raise UserError(f"--launch {name!r} is neither a file nor one of {', '.join(sorted(known))}.")
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--launch {name!r} cannot be read as YAML: {first_line(error)}.") from error
    deepspeed = settings.get("deepspeed_config") or {} if isinstance(settings, dict) else None
    if not isinstance(deepspeed, dict):
        raise UserError(f"--launch {name!r} holds no accelerate settings; `accelerate config` writes such a file.")
    if "deepspeed_config_file" in deepspeed and not Path(deepspeed["deepspeed_config_file"]).is_file():
        deepspeed["deepspeed_config_file"] = str(home() / deepspeed["deepspeed_config_file"])
    copy = Path(folder) / file.name
    copy.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return copy


def command(words: list[str], folder: str) -> list[str]:
    """The command line that `r2ec WORDS` stands for."""
    found = recipes()
    name, rest = words[0], words[1:]
    if rest and rest[0].startswith("--launch="):
        rest = ["--launch", rest[0].removeprefix("--launch="), *rest[1:]]
    if name not in found:
        raise UserError(f"r2ec knows no {name!r}{did_you_mean(name, found)}; give one of {', '.join(found)}, doctor.")
    launch: list[str] = []
    if rest[:1] == ["--launch"]:
        if len(rest) < 2:
            raise UserError("--launch needs the name of accelerate settings after it, such as zero2.")
        launch, rest = ["--config_file", str(launch_settings(rest[1], folder))], rest[2:]
    if name in TRAINS or launch:
        return [sys.executable, "-m", "accelerate.commands.launch", "--quiet", *launch, str(found[name]), *rest]
    return [sys.executable, str(found[name]), *rest]


def main() -> None:
    """Entry point of the console command."""
    words = sys.argv[1:]

    def go() -> None:
        if not words or words[0] in ("-h", "--help"):
            launches = ", ".join(sorted(path.stem for path in (home() / "accelerate_configs").glob("*.yaml")))
            print(HELP.format(names=", ".join(recipes()), launches=launches), file=sys.stdout)
            return
        if words[0] == "doctor":
            from r2ec_trl.cli.doctor import doctor

            print(doctor(words[1:]), file=sys.stdout)
            return
        with tempfile.TemporaryDirectory() as folder:
            raise SystemExit(subprocess.call(command(words, folder)))

    run(go)
