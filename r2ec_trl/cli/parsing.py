"""The command line of every recipe: flags and YAML through TRL's parser, users' mistakes as one sentence."""

from __future__ import annotations

import argparse
import difflib
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

import yaml
from trl import TrlParser

from r2ec_trl.bundle.meta import OLD_NAMES as RENAMED
from r2ec_trl.cli.terminal import printable
from r2ec_trl.errors import UserError
from r2ec_trl.policy.ranges import check_ranges

logger = logging.getLogger(__name__)

# How long another rank holds its sentence back: if rank 0 fails in the same way, the launcher ends this process first.
OTHER_RANK_DELAY = 3.0
# Texts for which true and false are words, too
_TRUE_OR_FALSE = ("gradient_checkpointing", "scale_rewards", "trackio_static_space_id")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the known word nearest to `word`, or an empty string when none is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


class OneKeyLoader(yaml.SafeLoader):
    """YAML without code, in which a key that stands twice, or is no text, is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(problem=f"the key {key!r} is no text; put it into quotes")
            if key in seen:
                line = key_node.start_mark.line + 1
                raise yaml.constructor.ConstructorError(problem=f"the key {key!r} stands twice, again in line {line}")
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_plain(self, node: yaml.ScalarNode) -> Any:
        """Numbers as they are meant: to YAML 1.1 0:0.5 is one to the base 60, and 010 an octal; here they are text."""
        if ":" in node.value or re.fullmatch(r"[-+]?0[0-9_]+", node.value):
            return self.construct_scalar(node)
        kind = node.tag.rpartition(":")[2]
        return self.construct_yaml_int(node) if kind == "int" else self.construct_yaml_float(node)


for _kind in ("int", "float"):
    OneKeyLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", OneKeyLoader.construct_plain)


def renamed(name: str, known: Iterable[str]) -> str:
    """A setting's name of today for the one it had; said once where they differ."""
    new = RENAMED.get(name, name)
    known = set(known)
    if new == name or name in known or new not in known:
        return name
    logger.warning("%s is called %s now; the old name will go with the next release.", name, new)
    return new


class RecipeParser(TrlParser):
    """
    TRL's parser with four habits changed: no abbreviated flags; whatever it refuses is a [`UserError`]; a switch that
    may be unset, such as `--bf16`, can stand alone as the others can; and a value of the YAML file passes the same
    checks as on the command line (TRL takes it as it comes: a string where a list belongs, 2.5 for an integer, any
    text for a choice).
    """

    def __init__(self, dataclass_types: Iterable[Any], description: str | None = None):
        super().__init__(dataclass_types, description=description, allow_abbrev=False)
        self.source = "command line"
        self.hints = {name: hint for kind in self.dataclass_types for name, hint in get_type_hints(kind).items()}
        for action in self._actions:
            if self.hints.get(action.dest) == bool | None and action.nargs is None:
                action.nargs, action.const = "?", True
        # For --help alone: `parse` takes it away before argparse sees it.
        self.add_argument("--config", default=argparse.SUPPRESS, help="YAML file of flags; the command line wins.")

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.source}: {' '.join(message.split())}; --help lists every flag.")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[argparse.Namespace, list[str]]:
        args = [self._renamed_flag(word) for word in (sys.argv[1:] if args is None else args)]
        namespace, unknown = super().parse_known_args(args, namespace)
        if not unknown:
            return namespace, []
        flags = [word.split("=")[0] for word in unknown if word.startswith("-")]
        if flags:
            hint = did_you_mean(flags[0], [flag for action in self._actions for flag in action.option_strings])
            raise UserError(f"{self.source}: unknown flag {flags[0]!r}{hint or '; --help lists every flag.'}")
        raise UserError(f"{self.source}: {unknown[0]!r} belongs to no flag; remove it or put a flag before it.")

    def _renamed_flag(self, word: str) -> str:
        flag, equals, value = word.partition("=")
        name = renamed(flag[2:].replace("-", "_"), self.hints) if flag.startswith("--") else ""
        return f"--{name}{equals}{value}" if name in self.hints and flag[2:].replace("-", "_") in RENAMED else word

    def set_defaults_with_config(self, **config: Any) -> list[str]:
        """Check each value by parsing it like a flag, then let TRL make it the default."""
        actions: dict[str, argparse.Action] = {}
        for action in self._actions:
            actions.setdefault(action.dest, action)  # the first one: --no_x shares its destination with --x
        hints = self.hints
        given = list(config)
        config = {renamed(str(key), hints): value for key, value in config.items()}
        if len(config) < len(given):
            raise UserError(f"{self.source}: two names of one setting among {', '.join(map(str, given))}; keep one.")
        words: list[str] = []
        as_is: dict[str, Any] = {}  # what no flag can say: null, an empty list, a list where a flag takes one value
        for key, value in config.items():
            if key not in actions or key not in hints:
                hint = did_you_mean(str(key), set(actions) & set(hints))
                raise UserError(f"{self.source}: unknown key {key!r}{hint or '; --help lists every flag.'}")
            if value is None and type(None) not in get_args(hints[key]):
                raise UserError(f"{self.source}: {key!r} cannot be null; remove the line to get the default.")
            kinds = (hints[key], *get_args(hints[key]))
            if isinstance(value, bool) and bool not in kinds and str in kinds and key not in _TRUE_OR_FALSE:
                raise UserError(f"{self.source}: {key!r} takes a word, and YAML reads {value}; put it into quotes.")
            if isinstance(value, list) and list not in [get_origin(kind) for kind in kinds]:
                raise UserError(f"{self.source}: {key!r} takes one value, not the list {value}.")
            if isinstance(value, list) and value and actions[key].nargs == "+":
                words += [f"--{key}", *map(str, value)]
            elif value is None or isinstance(value, list):
                as_is[key] = value
            else:
                words.append(f"--{key}={json.dumps(value) if isinstance(value, dict) else value}")
        checker = RecipeParser(self.dataclass_types)
        checker.source = self.source
        for action in checker._actions:
            action.required = False  # the rest may come from the command line
        checked = {**vars(checker.parse_args(words)), **as_is}
        return super().set_defaults_with_config(**{key: checked[key] for key in config})


def parse(
    dataclass_types: Sequence[type],
    args: Sequence[str] | None = None,
    description: str | None = None,
    default_config: str | os.PathLike | None = None,
) -> tuple[Any, ...]:
    """
    Fill dataclasses from a YAML file and the command line; the command line wins.

    Args:
        dataclass_types (`Sequence[type]`):
            Dataclasses whose fields become flags.
        args (`Sequence[str]`, *optional*):
            Words of the command line. Defaults to `sys.argv[1:]`.
        description (`str`, *optional*):
            First lines of `--help`.
        default_config (`str` or `os.PathLike`, *optional*):
            YAML file read when `--config` is absent.

    Returns:
        `tuple`: One instance of each dataclass, in order.

    Raises:
        [`UserError`]: For an unknown flag or key, a bad value, an unreadable file, or values the dataclasses refuse.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", nargs="?", default=default_config, const="")
    found, words = finder.parse_known_args(sys.argv[1:] if args is None else list(args))
    if found.config == "":
        raise UserError("command line: --config needs the path of a YAML file after it.")
    parser = RecipeParser(dataclass_types, description=description)
    try:
        if found.config is not None:
            parser.set_defaults_with_config(**_read_config(parser, found.config))
            parser.source = "command line"
        filled = parser.parse_args_and_config(words)
    except UserError:
        raise
    except ValueError as error:  # raised by the dataclasses themselves: values that do not go together
        raise UserError(" ".join(str(error).split())) from error
    for one in filled:
        check_ranges(one)
    return filled


def _read_config(parser: RecipeParser, path: str | os.PathLike) -> dict[str, Any]:
    parser.source = str(path)
    try:
        with open(path, encoding="utf-8") as file:
            config = yaml.load(file, Loader=OneKeyLoader)
    except OSError as error:
        raise UserError(f"{path}: cannot read the config file: {error.strerror}; check --config.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a YAML file: {' '.join(str(error).split())}.") from error
    config = {} if config is None else config
    if not isinstance(config, dict):
        raise UserError(f"{path}: must hold `flag: value` lines, not a {type(config).__name__}.")
    env = config.pop("env", None) or {}  # TRL's convention: a mapping of environment variables
    if not isinstance(env, dict):
        raise UserError(f"{path}: 'env' must hold `NAME: value` lines, not a {type(env).__name__}.")
    os.environ.update({str(name): str(value) for name, value in env.items()})
    return config


def run(main: Callable[[], Any]) -> None:
    """
    Call a recipe's `main`: a [`UserError`], or a path that does not exist, ends it with one sentence on stderr and
    status 2. Anything else is a bug and keeps its traceback.
    """
    cause: Exception
    try:
        main()
        return
    except UserError as error:
        sentence, cause = str(error), error
    except FileNotFoundError as error:
        if error.filename is None:
            raise
        sentence, cause = f"{error.filename}: no such file or folder; check the path.", error
    rank = int(os.environ.get("RANK", "0"))
    if rank:
        time.sleep(OTHER_RANK_DELAY)
        sentence = f"[rank {rank}] {sentence}"
    print(printable(sentence), file=sys.stderr, flush=True)
    raise SystemExit(2) from cause
