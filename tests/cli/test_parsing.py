"""Flags and YAML: what is accepted, and the sentence for what is not."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from trl import GRPOConfig, ModelConfig

from r2ec_trl.cli import parsing as cli
from r2ec_trl.errors import UserError


@dataclass
class Model:
    name: str = "tiny"
    target_modules: list[str] | None = None


@dataclass
class Training:
    learning_rate: float = field(default=1e-5, metadata={"help": "Step size."})
    max_steps: int = 10
    shuffle: bool = True
    kind: str = field(default="grpo", metadata={"choices": ["grpo", "rloo"]})
    limit: int | None = 5
    half: bool | None = None
    options: dict | str | None = None
    report_to: None | str | list[str] = None

    def __post_init__(self):
        if self.max_steps < 1:
            raise ValueError("`max_steps` must be positive,\n    not " + str(self.max_steps) + ".")


@dataclass
class Required:
    dataset: str = field(metadata={"help": "Dataset folder."})


@pytest.fixture
def config(tmp_path):
    def write(text):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return str(path)

    return write


def _parse(*args, kinds=(Model, Training), **kwargs):
    return cli.parse(kinds, args=list(args), **kwargs)


def _sentence(*args, **kwargs):
    with pytest.raises(UserError) as caught:
        _parse(*args, **kwargs)
    sentence = str(caught.value)
    assert "\n" not in sentence and "  " not in sentence
    return sentence


def test_defaults_then_config_then_command_line(config):
    path = config("learning_rate: 3e-4\nmax_steps: 7\ntarget_modules: [q_proj, v_proj]\nshuffle: false\nlimit: null\n")
    assert _parse() == (Model(), Training())
    model, training = _parse("--config", path, "--max_steps", "9", "--name=other")
    assert model == Model(name="other", target_modules=["q_proj", "v_proj"])
    assert training == Training(learning_rate=3e-4, max_steps=9, shuffle=False, limit=None)


def test_config_in_every_spelling_and_place(config):
    path = config("max_steps: 7\n")
    for words in (
        ["--config", path, "--name", "x"],
        [f"--config={path}", "--name", "x"],
        ["--name", "x", "--config", path],
    ):
        assert _parse(*words) == (Model(name="x"), Training(max_steps=7))


def test_default_config_is_read_only_without_config(config, tmp_path):
    path = config("max_steps: 7\n")
    other = tmp_path / "other.yaml"
    other.write_text("name: other\n")
    assert _parse(default_config=path)[1].max_steps == 7
    assert _parse("--config", str(other), default_config=path) == (Model(name="other"), Training())


def test_config_satisfies_a_required_flag(config):
    assert _parse("--config", config("dataset: here\n"), kinds=(Required,)) == (Required("here"),)
    assert "--dataset" in _sentence("--config", config(""), kinds=(Required,))


def test_config_values_without_a_flag_form(config):
    text = "options: {use_reentrant: false}\nreport_to: [trackio, tensorboard]\ntarget_modules: []\n"
    model, training = _parse("--config", config(text))
    assert training.report_to == ["trackio", "tensorboard"] and model.target_modules == []
    assert training.options in ({"use_reentrant": False}, '{"use_reentrant": false}')


def test_numbers_of_a_config_are_what_they_look_like(config):
    """To YAML 1.1 0:0.5 is the number 0.5 to the base 60 (the share of `--user_share`), and 010 is eight."""
    model, training = _parse("--config", config("name: 0:0.5\nmax_steps: 010\nlimit: 12\nlearning_rate: 1.5e-4\n"))
    assert model.name == "0:0.5" and training == Training(max_steps=10, limit=12, learning_rate=1.5e-4)
    assert _parse("--config", config("name: 0123\n"))[0].name == "0123"


def test_config_sets_the_environment(config, monkeypatch):
    monkeypatch.setenv("R2EC_TEST", "")
    _parse("--config", config("env: {R2EC_TEST: 3}\n"))
    assert os.environ["R2EC_TEST"] == "3"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--learnin_rate 1", "unknown flag '--learnin_rate'; did you mean '--learning_rate'?"),
        ("--learning_rat=1", "unknown flag '--learning_rat'; did you mean '--learning_rate'?"),
        ("--learn 1", "unknown flag '--learn'"),  # an abbreviation in argparse
        ("--qqqq 1", "unknown flag '--qqqq'; --help lists every flag."),
        ("stray", "'stray' belongs to no flag"),
        ("--max_steps 2.5", "--max_steps/--max-steps: invalid int value: '2.5'"),
        ("--max_steps", "expected one argument"),
        ("--kind sft", "invalid choice: 'sft'"),
        ("--shuffle maybe", "maybe"),
        ("--max_steps 0", "`max_steps` must be positive, not 0."),
        ("--config", "--config needs the path of a YAML file"),
        ("--config no/such.yaml", "no/such.yaml: cannot read the config file: No such file or directory"),
    ],
)
def test_bad_command_line_is_one_sentence(words, expected):
    assert expected in _sentence(*words.split())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("max_step: 3", "unknown key 'max_step'; did you mean 'max_steps'?"),
        ("qqqq: 3", "unknown key 'qqqq'"),
        ("config: other.yaml", "unknown key 'config'"),
        ("max_steps: 2.5", "invalid int value: '2.5'"),
        ("max_steps: [1, 2]", "'max_steps' takes one value, not the list [1, 2]"),
        ("max_steps: null", "'max_steps' cannot be null"),
        ("kind: sft", "invalid choice: 'sft'"),
        ("kind: no", "'kind' takes a word, and YAML reads False; put it into quotes"),
        ("name: on", "'name' takes a word, and YAML reads True; put it into quotes"),
        ("learning_rate: 1:30", "invalid float value: '1:30'"),  # 90 to YAML 1.1
        ("learning_rate: fast", "invalid float value: 'fast'"),
        ("- max_steps", "must hold `flag: value` lines, not a list"),
        ("max_steps: [", "not a YAML file"),
        ("env: 3", "'env' must hold `NAME: value` lines"),
    ],
)
def test_bad_config_is_one_sentence_naming_the_file(config, text, expected):
    path = config(text)
    sentence = _sentence("--config", path)
    assert expected in sentence and sentence.startswith(path)


def test_trl_arguments_parse_and_trl_complaints_are_sentences(tmp_path, config):
    kinds = (GRPOConfig, ModelConfig)
    path = config(f"output_dir: {tmp_path}\nuse_cpu: true\nbf16: false\nreport_to: none\ntemperature: 1.5\n")
    arguments, model = _parse("--config", path, "--use_peft", kinds=kinds)
    assert arguments.temperature == 1.5 and model.use_peft
    assert "at least 2 generations" in _sentence("--config", path, "--num_generations", "1", kinds=kinds)


def test_switches_stand_alone_or_take_a_value():
    settings = (("--half",), ("--half", "true"), ("--half=yes", "--no_shuffle"), ("--half", "false"), ())
    found = [_parse(*words)[1] for words in settings]
    assert [one.half for one in found] == [True, True, True, False, None]
    assert [one.shuffle for one in found] == [True, True, False, True, True]
    assert "--half" in _sentence("--half", "maybe")


def test_help_lists_config_and_flags(capsys):
    with pytest.raises(SystemExit) as caught:
        _parse("--help", description="Train it.")
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert all(word in text for word in ("Train it.", "--config", "--learning_rate", "Step size."))


def _fail(error):
    def main():
        raise error

    return main


def test_run_prints_one_sentence_and_exits_with_2(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.run(_fail(UserError("train.jsonl, line 3: no target; add one.")))
    assert caught.value.code == 2
    assert capsys.readouterr().err == "train.jsonl, line 3: no target; add one.\n"


def test_run_names_a_missing_path_and_keeps_bugs(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.run(lambda: open("no/such/file"))
    assert caught.value.code == 2
    assert capsys.readouterr().err == "no/such/file: no such file or folder; check the path.\n"
    for bug in (ValueError("a bug"), FileNotFoundError("without a path"), KeyError("x")):
        with pytest.raises(type(bug)):
            cli.run(_fail(bug))
    assert cli.run(lambda: None) is None


def test_another_rank_waits_for_rank_0_to_speak(capsys, monkeypatch):
    waited = []
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    with pytest.raises(SystemExit):
        cli.run(_fail(UserError("bad reward.")))
    assert capsys.readouterr().err == "[rank 3] bad reward.\n" and waited == [cli.OTHER_RANK_DELAY]


SCRIPT = """
import sys
from dataclasses import dataclass
from r2ec_trl.cli.parsing import parse, run
@dataclass
class Training:
    max_steps: int = 10
run(lambda: parse((Training,)))
"""


def test_a_recipe_ends_without_a_traceback(tmp_path):
    script = tmp_path / "recipe.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, script, "--max_stepz", "3"], capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1] == "command line: unknown flag '--max_stepz'; did you mean '--max_steps'?"
    assert "Traceback" not in done.stderr


@pytest.mark.distributed
def test_two_ranks_with_the_same_mistake_say_it_once(tmp_path):
    script = tmp_path / "recipe.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--master_port=0",
        script,
        "--oops",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode != 0
    assert len(re.findall("unknown flag '--oops'", done.stderr)) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("max_steps: 3\nname: x\nmax_steps: 4", "the key 'max_steps' stands twice, again in line 3"),
        ("options: {a: 1, a: 2}", "the key 'a' stands twice"),
        ("1: x", "the key 1 is no text"),
        ("null: x", "the key None is no text"),
        ("options: {true: 1}", "the key True is no text"),
        ("[a, b]: x", "the key"),
        ("max_steps: 3\nname: !!python/object/apply:os.system [ls]", "not a YAML file"),
    ],
)
def test_yaml_keys_stand_once_and_are_text(config, text, expected):
    path = config(text)
    sentence = _sentence("--config", path)
    assert expected in sentence and sentence.startswith(path)


def test_a_setting_that_has_an_old_name_of_another_keeps_it(monkeypatch):
    monkeypatch.setattr(cli, "RENAMED", {"top": "max_steps"})
    known = [{"max_steps"}, {"top", "max_steps"}, {"top"}, set()]
    assert [cli.renamed("top", names) for names in known] == ["max_steps", "top", "top", "top"]


def test_an_old_name_is_read_with_a_warning_that_names_the_new_one(config, monkeypatch, caplog):
    monkeypatch.setattr(cli, "RENAMED", {"top": "max_steps", "title": "name"})
    for words in (["--config", config("top: 7\n")], ["--top", "7"], ["--top=7"]):
        caplog.clear()
        assert _parse(*words)[1].max_steps == 7
        assert "top is called max_steps now" in caplog.text
    assert "two names of one setting" in _sentence("--config", config("top: 7\nmax_steps: 8\n"))
    assert _parse("--config", config("top: 7\n"), "--max_steps", "9")[1].max_steps == 9


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "-inf"])
def test_numbers_outside_their_range_are_one_sentence(value):
    @dataclass
    class Scores:
        item_temperature: float = 0.02

    assert "`item_temperature` is" in _sentence(f"--item_temperature={value}", kinds=(Scores,))
