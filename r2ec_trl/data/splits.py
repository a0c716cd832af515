"""Which interaction is a target of which split, and what lies before it: no future ever enters a history."""

from __future__ import annotations

import datetime
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from r2ec_trl.data.events import Events
from r2ec_trl.data.schema import SPLITS
from r2ec_trl.data.sources.source import SPLIT_CODES
from r2ec_trl.errors import UserError

RULES = ("leave_one_out", "time_ratio", "time_cut", "given")


@dataclass(frozen=True)
class SplitRule:
    """
    How targets are told apart.

    Args:
        name (`str`):
            `"leave_one_out"`: a user's last interaction is a test target, the last but one a validation target.
            `"time_ratio"`: targets of all users in order of time are cut by `ratio`. `"time_cut"`: by the dates
            `validation_from` and `test_from`. `"given"`: the source says.
        ratio (`tuple[float, float, float]`, *optional*, defaults to `(0.8, 0.1, 0.1)`):
            Shares of train, validation and test.
        validation_from (`datetime.datetime`, *optional*):
            First moment of validation.
        test_from (`datetime.datetime`, *optional*):
            First moment of test.
        min_history (`int`, *optional*, defaults to 1):
            Interactions that must lie before a target.
        max_history (`int`, *optional*, defaults to 20):
            Length of the window: the last so many are the history.
        train_targets (`str`, *optional*, defaults to `"all"`):
            `"last"` keeps only a user's last train target.
    """

    name: str
    ratio: tuple[float, ...] = (0.8, 0.1, 0.1)
    validation_from: datetime.datetime | None = None
    test_from: datetime.datetime | None = None
    min_history: int = 1
    max_history: int = 20
    train_targets: str = "all"

    def check(self) -> None:
        """Raise [`UserError`] for settings that cannot be meant."""
        if self.name not in RULES:
            raise UserError(f"--split {self.name!r} is unknown: choose one of {', '.join(RULES)}.")
        if self.min_history < 1 or self.max_history < self.min_history:
            raise UserError(
                f"--min_history {self.min_history} and --max_history {self.max_history} do not go together: a history "
                "has at least one item."
            )
        if self.name == "time_ratio":
            if len(self.ratio) != 3 or not (min(self.ratio) > 0 and abs(sum(self.ratio) - 1) <= 1e-6):
                raise UserError(
                    f"--ratio {' '.join(map(str, self.ratio))} must be three positive shares that sum to 1: mend it."
                )
        if self.name == "time_cut":
            if self.validation_from is None or self.test_from is None or self.validation_from >= self.test_from:
                raise UserError("--split time_cut needs --validation_from and a later --test_from: give both.")


class Targets(NamedTuple):
    """Events a split may see, and which of them are its targets (ascending positions)."""

    events: Events
    positions: np.ndarray


def split_targets(events: Events, rule: SplitRule, dropped: Counter[str]) -> dict[str, Targets]:
    """The targets of each split. Every interaction before a target, of the same user, may enter its history."""
    rule.check()
    if rule.name == "given":
        return _given(events, rule, dropped)
    seen = seen_before(events.user)
    possible = np.flatnonzero(seen >= rule.min_history)
    dropped["too little history to be a target (stays in histories)"] += len(events) - len(possible)
    if rule.name == "leave_one_out":
        code = _left_out(events.user)[possible]
    elif rule.name == "time_ratio":
        code = _by_ratio(events.time[possible], rule.ratio)
    else:
        code = _by_cut(events.time[possible], rule, events.ticks_per_second)
    chosen = {split: possible[code == SPLIT_CODES[split]] for split in SPLITS}
    chosen["train"] = _thinned(chosen["train"], events.user, rule, dropped)
    return _checked({split: Targets(events, positions) for split, positions in chosen.items()}, rule, dropped)


def seen_before(user: np.ndarray) -> np.ndarray:
    """How many interactions of the same user come before each; `user` is sorted."""
    positions = np.arange(len(user))
    return positions - first_of_user(user)


def first_of_user(user: np.ndarray) -> np.ndarray:
    """Position of the user's first interaction, for each interaction; `user` is sorted."""
    starts = np.flatnonzero(np.r_[True, user[1:] != user[:-1]]) if len(user) else np.zeros(0, np.int64)
    return np.repeat(starts, np.diff(np.r_[starts, len(user)]))


def _left_out(user: np.ndarray) -> np.ndarray:
    last = np.r_[user[1:] != user[:-1], True]
    last_but_one = np.r_[last[1:], False] & ~last
    return np.where(last, SPLIT_CODES["test"], np.where(last_but_one, SPLIT_CODES["validation"], SPLIT_CODES["train"]))


def _by_ratio(time: np.ndarray, ratio: tuple[float, ...]) -> np.ndarray:
    order = np.argsort(time, kind="stable")  # equal times stay in the order of users and of their histories
    code = np.full(len(time), SPLIT_CODES["test"])
    first_validation, first_test = int(len(time) * ratio[0]), int(len(time) * (ratio[0] + ratio[1]))
    code[order[:first_validation]] = SPLIT_CODES["train"]
    code[order[first_validation:first_test]] = SPLIT_CODES["validation"]
    return code


def _by_cut(time: np.ndarray, rule: SplitRule, ticks_per_second: int) -> np.ndarray:
    assert rule.validation_from is not None and rule.test_from is not None  # SplitRule.check
    cuts = [int(date.timestamp()) * ticks_per_second for date in (rule.validation_from, rule.test_from)]
    return np.searchsorted(cuts, time, side="right")


def _given(events: Events, rule: SplitRule, dropped: Counter[str]) -> dict[str, Targets]:
    """Histories of a split see the interactions of that split and the ones before it, whatever their times say."""
    if events.split is None:
        raise UserError("--split given needs a source that is split already; this one is not: choose another rule.")
    chosen = {}
    for split in SPLITS:
        code = SPLIT_CODES[split]
        visible = events.keep(events.split <= code)
        assert visible.split is not None
        own = visible.split == code
        positions = np.flatnonzero(own & (seen_before(visible.user) >= rule.min_history))
        dropped["too little history to be a target (stays in histories)"] += int(own.sum()) - len(positions)
        if split == "train":
            positions = _thinned(positions, visible.user, rule, dropped)
        chosen[split] = Targets(visible, positions)
    return _checked(chosen, rule, dropped)


def _thinned(positions: np.ndarray, user: np.ndarray, rule: SplitRule, dropped: Counter[str]) -> np.ndarray:
    if rule.train_targets == "all" or not len(positions):
        return positions
    users = user[positions]
    last = positions[np.r_[users[1:] != users[:-1], True]]
    dropped["train target that is not the user's last (stays in histories)"] += len(positions) - len(last)
    return last


def _checked(chosen: dict[str, Targets], rule: SplitRule, dropped: Counter[str]) -> dict[str, Targets]:
    for split, targets in chosen.items():
        if not len(targets.positions):
            raise UserError(
                f"Split rule {rule.name} leaves no row for '{split}' ({largest_causes(dropped)}): filter less "
                "(--k_core, --min_history, the time window), or choose another rule."
            )
    return chosen


def largest_causes(dropped: Counter[str]) -> str:
    """The three causes that took most, for a sentence."""
    causes = [f"{cause}: {count:,}" for cause, count in dropped.most_common(3) if count]
    return "; ".join(causes) or "nothing was dropped"
