"""Rewards by hand, where they come from, and what is refused."""

import asyncio
import functools
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trl.trainer.utils import get_callable_name, is_async_callable

from r2ec_trl.errors import UserError
from r2ec_trl.rewards import (
    check_arguments,
    checked_reward,
    fused_reward,
    hit_reward,
    load_reward,
    ndcg_reward,
    reciprocal_rank_reward,
    target_probability_reward,
)

BUILT_IN = ("fused", "hit", "length", "ndcg", "reciprocal_rank", "soft_overlong", "target_probability")
TRL_ARGUMENTS = {"prompts": ["p", "p"], "completion_ids": [[1], [2]], "trainer_state": None, "num_items": [9, 9]}


def test_hand_worked():
    """Ranks 1, 3 and 1001 at the paper's k = 1000 and beta = .05: 0.05 p + 0.95 NDCG."""
    completions, ranks, probabilities = ["a", "b", "c"], [1, 3, 1001], [0.6, 0.2, 0.01]
    assert ndcg_reward(completions, ranks) == [1.0, 0.5, 0.0]
    assert hit_reward(completions, ranks) == [1.0, 1.0, 0.0]
    assert reciprocal_rank_reward(completions, ranks) == pytest.approx([1, 1 / 3, 0])
    assert target_probability_reward(completions, probabilities) == probabilities
    assert fused_reward(completions, ranks, probabilities) == pytest.approx([0.98, 0.485, 0.0005])
    assert all(isinstance(reward, float) for reward in fused_reward(completions, ranks, probabilities))


def test_length_by_hand():
    """`max_completion_length` 10, `soft_punish_cache` 4: 6 tokens cost nothing, 8 a half, 11 all (a marker beyond)."""
    ids = [[1] * count for count in (2, 6, 8, 11)]
    settings = {"max_completion_length": 10, "soft_punish_cache": 4}
    assert load_reward("soft_overlong", **settings)(completions=ids, completion_ids=ids) == [0, 0, -0.5, -1]
    assert load_reward("length", **settings)(completions=ids, completion_ids=ids) == [-0.2, -0.6, -0.8, -1.1]
    assert load_reward("soft_overlong", **settings | {"soft_punish_cache": 8})(ids, ids)[1] == -0.5


@given(rank=st.integers(1, 5000), probability=st.floats(0, 1), mix=st.floats(0, 1), cutoff=st.integers(1, 2000))
def test_the_fused_reward_lies_between_its_parts(rank, probability, mix, cutoff):
    gain = ndcg_reward(["a"], [rank], cutoff)[0]
    reward = fused_reward(["a"], [rank], [probability], mix, cutoff)[0]
    assert min(gain, probability) - 1e-12 <= reward <= max(gain, probability) + 1e-12


def test_rewards_of_unequal_length_are_not_silently_cut():
    with pytest.raises(ValueError):
        fused_reward(["a", "b"], [1, 2], [0.5])


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_ins_take_trl_arguments_and_keep_their_names(name):
    reward = load_reward(name)
    assert (
        reward.__name__ == get_callable_name(reward) == get_callable_name(checked_reward(reward)) == f"{name}_reward"
    )
    result = checked_reward(reward)(
        completions=["a", "b"], target_rank=[1, 2], target_prob=[0.5, 0.25], target=["x", "y"], **TRL_ARGUMENTS
    )
    assert len(result) == 2 and result[0] > result[1] - 1e-12
    assert get_callable_name(pickle.loads(pickle.dumps(reward))) == f"{name}_reward"


def test_settings_reach_the_built_ins():
    """At cutoff 2 rank 3 earns nothing; at mix 1 only the probability counts."""
    rows = {"completions": ["a"], "target_rank": [3], "target_prob": [0.25]}
    assert load_reward("ndcg", reward_cutoff=2)(**rows) == [0.0]
    assert load_reward("fused", reward_mix=1.0)(**rows) == [0.25]
    assert load_reward("fused", reward_mix=0.0, reward_cutoff=2)(**rows) == [0.0]


def write(folder, text):
    file = folder / "mine.py"
    file.write_text(text)
    return file


def test_from_a_file(tmp_path):
    """The file may hold what needs its module to be registered, such as a dataclass with postponed annotations."""
    file = write(
        tmp_path,
        "from __future__ import annotations\nimport dataclasses\n\n"
        "@dataclasses.dataclass\nclass Bonus:\n    value: float = 2.0\n\n"
        "def my_reward(completions, **kwargs):\n    return [Bonus().value for _ in completions]\n",
    )
    reward = load_reward(f"{file}:my_reward")
    assert reward(completions=["a", "b"]) == [2.0, 2.0] and get_callable_name(reward) == "my_reward"


def test_from_a_module(tmp_path, monkeypatch):
    package = tmp_path / "shop_rewards"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "own.py").write_text("def my_reward(completions, **kwargs):\n    return [1.0] * len(completions)\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_reward("shop_rewards.own:my_reward")(completions=["a"]) == [1.0]


def test_a_file_does_not_take_the_place_of_a_module(tmp_path):
    file = tmp_path / "json.py"
    file.write_text("def dumps(completions, **kwargs):\n    return [0.0]\n")
    load_reward(f"{file}:dumps")
    import json

    assert json.dumps([1]) == "[1]"


@pytest.mark.parametrize(
    ("text", "spec", "message"),
    [
        ("", "ndgc", "Unknown reward 'ndgc'; choose one of fused, hit, length, ndcg, .*, soft_overlong, target_prob"),
        ("", "{file}", "Unknown reward"),
        ("", "{file}:", "Unknown reward"),
        ("", "{folder}/other.py:f", "there is no file .*other.py"),
        ("x = 1", "{file}:f", "has no function 'f'"),
        ("f = 1", "{file}:f", "f is of type int and cannot be called"),
        ("class F:\n    def __call__(self, **_):\n        return []", "{file}:F", "F is a class; make one there"),
        ("import no_such_module", "{file}:f", "does not import .*no_such_module"),
        ("def f(:\n", "{file}:f", "does not import .*SyntaxError"),
        ("f = missing", "{file}:f", "does not import .*NameError"),
        ("raise SystemExit(0)", "{file}:f", "does not import .*SystemExit"),
        ("", "no_such_package.rewards:f", "module no_such_package.rewards does not import"),
        ("", "json:f", "json has no function 'f'"),
        ("", "./rewards:f", "./rewards is no name of a module; name a file as"),
        ("", "..rewards:f", "..rewards is no name of a module"),
    ],
)
def test_what_cannot_be_loaded(tmp_path, text, spec, message):
    file = write(tmp_path, text)
    with pytest.raises(UserError, match=message) as caught:
        load_reward(spec.format(file=file, folder=tmp_path))
    assert "\n" not in str(caught.value)


def giving(value):
    def my_reward(completions, **kwargs):
        return value

    return my_reward


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1.0], "'my_reward' returned 1 values for 2 rollouts"),
        ([1.0, 2.0, 3.0], "'my_reward' returned 3 values for 2 rollouts"),
        ([1.0, float("nan")], "'my_reward' returned nan for rollout 1"),
        ([float("inf"), 1.0], "'my_reward' returned inf for rollout 0"),
        ([1.0, -float("inf")], "'my_reward' returned -inf for rollout 1"),
        ([1.0, 1e39], "'my_reward' returned 1e\\+39 for rollout 1.*float32"),
        ([1.0, 10**400], "'my_reward' returned 10+ for rollout 1"),
        (["0.5", 1.0], "'my_reward' returned '0.5' for rollout 0"),
        ([[1.0, 2.0], [1.0, 2.0]], "for rollout 0"),
        ("ab", "'my_reward' returned a str"),
        (1.0, "'my_reward' returned a float"),
        (torch.tensor(1.0), "'my_reward' returned a Tensor"),
        (None, "'my_reward' returned a NoneType"),
    ],
)
def test_wrong_answers_name_the_reward(value, message):
    with pytest.raises(UserError, match=message):
        checked_reward(giving(value))(completions=["a", "b"])


@pytest.mark.parametrize(
    "value", [[1, None], [np.float32(1), None], [torch.tensor(1.0), None], (True, None), np.array([1.0, None])]
)
def test_numbers_of_any_kind_and_none_pass(value):
    assert checked_reward(giving(value))(completions=["a", "b"]) == [1.0, None]


def test_tensors_pass():
    assert checked_reward(giving(torch.tensor([1.0, 0.5])))(completions=["a", "b"]) == [1.0, 0.5]


async def slow_reward(completions, **kwargs):
    await asyncio.sleep(0)
    return [0.5] * (len(completions) - kwargs.get("missing", 0))


class Judge:
    async def __call__(self, completions, **kwargs):
        return [0.25] * len(completions)


class Rule:
    def __call__(self, completions, **kwargs):
        return [0.75] * len(completions)


@pytest.mark.parametrize(
    ("reward", "name", "value", "is_async"),
    [
        (slow_reward, "slow_reward", 0.5, True),
        (functools.partial(slow_reward, extra=1), "slow_reward", 0.5, True),
        (Judge(), "Judge", 0.25, True),
        (Rule(), "Rule", 0.75, False),
        (functools.partial(Rule()), "Rule", 0.75, False),
    ],
)
def test_every_form_that_trl_takes_keeps_its_kind_and_name(reward, name, value, is_async):
    checked = checked_reward(reward)
    assert get_callable_name(checked) == get_callable_name(reward) == name
    assert is_async_callable(checked) == is_async_callable(reward) == is_async
    result = checked(completions=["a", "b"])
    assert (asyncio.run(result) if is_async else result) == [value, value]


def by_place(completions, /, **kwargs):
    return [1.0] * len(completions)


def by_name(*unused, completions, target_rank, scale=2.0):
    return [scale / rank for rank in target_rank]


def test_what_a_reward_asks_for_is_given_by_its_name():
    with pytest.raises(UserError, match="'by_place' takes 'completions' by its place alone; take the `/` out"):
        checked_reward(by_place)(completions=["a"])
    with pytest.raises(UserError, match="'sqrt' takes .* by its place alone"):
        checked_reward(math.sqrt)(completions=["a"])
    assert checked_reward(by_name)(completions=["a", "b"], target_rank=[1, 2], user_id=["u", "v"]) == [2.0, 1.0]
    with pytest.raises(UserError, match="'by_name' asks for 'target_rank', .* one of completions, user_id; name"):
        checked_reward(by_name)(completions=["a"], user_id=["u"])
    check_arguments(by_name, "by_name", ["completions", "target_rank"])
    check_arguments(max, "max", [])  # a function of C that tells nothing


def test_async_answers_are_checked():
    with pytest.raises(UserError, match="'slow_reward' returned 1 values for 2 rollouts"):
        asyncio.run(checked_reward(slow_reward)(completions=["a", "b"], missing=1))
