"""Rewards as TRL reward callables, and how the command line finds them.

Every reward takes lists with one entry per rollout. [`RecPOTrainer`] adds to TRL's keyword arguments `target_rank`
(1-based), `target_prob` (softmax over the catalogue, M2), `target_score`, `top_item_ids`, `num_items` and every column
of the dataset; a reward names those it wants and takes the others as `**kwargs`. The `completions` themselves are
not looked at by those below.
"""

import functools
import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from types import ModuleType
from typing import Any

from trl.rewards import get_soft_overlong_punishment

from r2ec_trl.errors import UserError
from r2ec_trl.metrics import hit_at_k, ndcg_at_k, reciprocal_rank

Reward = Callable[..., Any]
# what else goes wrong in a user's file keeps its traceback
_IMPORT_ERRORS = (ImportError, NameError, SyntaxError, SystemExit)
LARGEST = 3.4e38  # TRL keeps rewards in float32, and an advantage that is no number counts as 0 there
OF_REWARDS = (  # what TRL and we hand to rewards ourselves: a column of such a name would never reach one
    "prompts completion completions completion_ids trainer_state log_extra log_metric environments num_items "
    "target_rank target_prob target_score top_item_ids"
).split()


def ndcg_reward(completions: list, target_rank: list[int], reward_cutoff: int = 1000, **kwargs: Any) -> list[float]:
    r"""NDCG@k of the target's rank (M1): \\( R_d = 1/\log_2(\text{rank}+1) \\) if the rank is at most k, else 0.

    Args:
        target_rank (`list[int]`):
            1-based rank of the target in the catalogue.
        reward_cutoff (`int`, *optional*, defaults to `1000`):
            k, the last rank that is rewarded.

    Example:

    ```python
    >>> ndcg_reward(["...", "...", "..."], target_rank=[1, 3, 1001])
    [1.0, 0.5, 0.0]

    ```
    """
    return ndcg_at_k(target_rank, reward_cutoff).tolist()


def hit_reward(completions: list, target_rank: list[int], reward_cutoff: int = 1000, **kwargs: Any) -> list[float]:
    """1 if the rank is at most k, else 0; arguments as in [`ndcg_reward`].

    Example:

    ```python
    >>> hit_reward(["...", "..."], target_rank=[10, 11], reward_cutoff=10)
    [1.0, 0.0]

    ```
    """
    return hit_at_k(target_rank, reward_cutoff).tolist()


def reciprocal_rank_reward(
    completions: list, target_rank: list[int], reward_cutoff: int = 1000, **kwargs: Any
) -> list[float]:
    """1/rank if the rank is at most k, else 0; arguments as in [`ndcg_reward`].

    Example:

    ```python
    >>> reciprocal_rank_reward(["...", "..."], target_rank=[4, 1001])
    [0.25, 0.0]

    ```
    """
    return reciprocal_rank(target_rank, reward_cutoff).tolist()


def target_probability_reward(completions: list, target_prob: list[float], **kwargs: Any) -> list[float]:
    r"""Softmax over the catalogue, at the target (M2): \\( R_c = \text{softmax}(h_T \cdot h_v / \tau) \\).

    Args:
        target_prob (`list[float]`):
            Probability of the target.

    Example:

    ```python
    >>> target_probability_reward(["..."], target_prob=[0.125])
    [0.125]

    ```
    """
    return [float(probability) for probability in target_prob]


def fused_reward(
    completions: list,
    target_rank: list[int],
    target_prob: list[float],
    reward_mix: float = 0.05,
    reward_cutoff: int = 1000,
    **kwargs: Any,
) -> list[float]:
    r"""The paper's reward (M3): \\( R = \beta R_c + (1-\beta) R_d \\), probability and NDCG@k of the target.

    Args:
        target_rank, reward_cutoff:
            As in [`ndcg_reward`].
        target_prob (`list[float]`):
            Probability of the target (M2).
        reward_mix (`float`, *optional*, defaults to `0.05`):
            The paper's beta, the share of the probability.

    Example:

    Rank 3 has NDCG 0.5, so the reward is 0.05 * 0.2 + 0.95 * 0.5.

    ```python
    >>> [round(reward, 6) for reward in fused_reward(["..."], target_rank=[3], target_prob=[0.2])]
    [0.485]

    ```
    """
    gains = ndcg_reward(completions, target_rank, reward_cutoff)
    probabilities = target_probability_reward(completions, target_prob)
    return [reward_mix * p + (1 - reward_mix) * gain for p, gain in zip(probabilities, gains, strict=True)]


def length_reward(
    completions: list, completion_ids: list[list[int]], max_completion_length: int = 64, **kwargs: Any
) -> list[float]:
    """Minus the number of tokens, the marker's included, over the most that is allowed.

    Args:
        completion_ids (`list[list[int]]`):
            Token ids of the rollouts.
        max_completion_length (`int`, *optional*, defaults to `64`):
            What counts as 1.

    Example:

    ```python
    >>> length_reward(["..."], completion_ids=[[5, 6, 7]], max_completion_length=12)
    [-0.25]

    ```
    """
    return [-len(ids) / max_completion_length for ids in completion_ids]


def soft_overlong_reward(
    completions: list,
    completion_ids: list[list[int]],
    max_completion_length: int = 64,
    soft_punish_cache: int = 16,
    **kwargs: Any,
) -> list[float]:
    """[`~trl.rewards.get_soft_overlong_punishment`]: 0, falling to -1 over the last tokens before the limit.

    Args:
        completion_ids (`list[list[int]]`):
            Token ids of the rollouts.
        max_completion_length (`int`, *optional*, defaults to `64`):
            The limit.
        soft_punish_cache (`int`, *optional*, defaults to `16`):
            Tokens before the limit over which it falls.

    Example:

    ```python
    >>> soft_overlong_reward(["...", "..."], [[1] * 8, [1] * 6], max_completion_length=8, soft_punish_cache=4)
    [-1.0, -0.5]

    ```
    """
    return get_soft_overlong_punishment(max_completion_length, soft_punish_cache)(completion_ids=completion_ids)


_BUILT_IN: dict[str, Reward] = {
    "fused": fused_reward,
    "hit": hit_reward,
    "length": length_reward,
    "ndcg": ndcg_reward,
    "reciprocal_rank": reciprocal_rank_reward,
    "soft_overlong": soft_overlong_reward,
    "target_probability": target_probability_reward,
}


def load_reward(spec: str, **settings: Any) -> Reward:
    """The reward that a command line names.

    Args:
        spec (`str`):
            A built-in ("fused", "hit", "length", "ndcg", "reciprocal_rank", "soft_overlong", "target_probability"),
            `path/to/file.py:function` or `package.module:function`.
        **settings:
            `reward_mix`, `reward_cutoff`, `max_completion_length`, `soft_punish_cache`: given to the built-ins that
            take them.

    Returns:
        `Callable`: a TRL reward callable whose `__name__` is the name in the logs.
    """
    if spec in _BUILT_IN:
        return _bind(_BUILT_IN[spec], **settings)
    source, _, name = spec.rpartition(":")
    if not source or not name:
        known = ", ".join(_BUILT_IN)
        raise UserError(
            f"Unknown reward {spec!r}; choose one of {known}, or give path/to/file.py:function or "
            "package.module:function."
        )
    module = _module_of_file(Path(source), spec) if source.endswith(".py") else _module(source, spec)
    reward = getattr(module, name, None)
    if reward is None:
        raise UserError(f"Reward {spec!r}: {source} has no function {name!r}; check the spelling after the colon.")
    if not callable(reward):
        kind = type(reward).__name__
        raise UserError(f"Reward {spec!r}: {name} is of type {kind} and cannot be called; name a function.")
    if inspect.isclass(reward):
        raise UserError(f"Reward {spec!r}: {name} is a class; make one there (`reward = {name}()`) and name that.")
    return reward


def checked_reward(func: Reward) -> Reward:
    """The reward with its answer checked: one number or `None` per rollout, else a [`UserError`] that names it.

    TRL turns `None` into NaN ("not applicable") and leaves it out of the sum, so a NaN that a reward computes by
    mistake would silently mean the same.

    Args:
        func (`Callable`):
            TRL reward callable, sync or async.

    Returns:
        `Callable`: a callable of the same kind and `__name__`.
    """
    name = reward_name(func)

    def checked(completions: list, **kwargs: Any) -> list[float | None]:
        return _check_rewards(func(**_wanted(func, name, completions, kwargs)), len(completions), name)

    async def checked_async(completions: list, **kwargs: Any) -> list[float | None]:
        return _check_rewards(await func(**_wanted(func, name, completions, kwargs)), len(completions), name)

    wrapper = checked_async if _is_async(func) else checked
    wrapper.__name__ = wrapper.__qualname__ = name
    wrapper.__doc__ = func.__doc__
    return wrapper


def _wanted(func: Reward, name: str, completions: list, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments that a reward takes: all of them with `**kwargs`, else those that it names."""
    given = {"completions": completions, **kwargs}
    check_arguments(func, name, given)
    parameters = _parameters(func)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters) or not parameters:
        return given
    return {each.name: given[each.name] for each in parameters if each.name in given}


def check_arguments(func: Reward, name: str, known: Collection[str]) -> None:
    """[`UserError`] for a reward that asks for what is not `known`, or takes it by its place alone."""
    for each in _parameters(func):
        if each.default is not each.empty or each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD):
            continue
        if each.kind is each.POSITIONAL_ONLY:
            raise UserError(f"Reward {name!r} takes {each.name!r} by its place alone; take the `/` out: it is named.")
        if each.name not in known:
            raise UserError(
                f"Reward {name!r} asks for {each.name!r}, which is neither a column of the dataset nor one of "
                f"{', '.join(sorted(known))}; name one of these, or give it a default."
            )


def _parameters(func: Reward) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(func).parameters.values())
    except ValueError:  # a function of C tells nothing
        return []


def reward_name(func: Reward) -> str:
    """Name of a reward in logs and messages: that of the function, through partials, or of the class of an object."""
    if isinstance(func, functools.partial) and "__name__" not in vars(func):
        return reward_name(func.func)
    return getattr(func, "__name__", type(func).__name__)


def _bind(func: Reward, **settings: Any) -> Reward:
    """The function with the settings it takes, under its own name. A partial pickles, a closure does not."""
    accepted = inspect.signature(func).parameters
    bound = functools.partial(func, **{name: value for name, value in settings.items() if name in accepted})
    functools.update_wrapper(bound, func, assigned=("__name__", "__doc__"), updated=())
    return bound


def _module_of_file(path: Path, spec: str) -> ModuleType:
    if not path.is_file():
        raise UserError(f"Reward {spec!r}: there is no file {path}; give its path from the current folder.")
    name = f"_reward_file_{path.stem}"  # prefixed: a file called json.py must not take the place of a module
    module_spec = importlib.util.spec_from_file_location(name, path)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"Reward {spec!r}: {path} cannot be loaded as a Python file.")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up
    try:
        module_spec.loader.exec_module(module)
    except _IMPORT_ERRORS as error:
        del sys.modules[name]
        raise UserError(f"Reward {spec!r}: {path} does not import ({_describe(error)}); mend the file.") from error
    return module


def _module(name: str, spec: str) -> ModuleType:
    if "/" in name or name.startswith("."):
        raise UserError(f"Reward {spec!r}: {name} is no name of a module; name a file as path/to/file.py:function.")
    try:
        return importlib.import_module(name)
    except _IMPORT_ERRORS as error:
        raise UserError(
            f"Reward {spec!r}: module {name} does not import ({_describe(error)}); install it, or name a file as "
            "path/to/file.py:function."
        ) from error


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".replace("\n", " ")


def _is_async(func: Reward) -> bool:
    while isinstance(func, functools.partial):
        func = func.func
    return inspect.iscoroutinefunction(func) or inspect.iscoroutinefunction(type(func).__call__)


def _check_rewards(rewards: Any, expected: int, name: str) -> list[float | None]:
    """The rewards as floats or `None`."""
    if isinstance(rewards, (str, dict, set)) or not hasattr(rewards, "__len__") or getattr(rewards, "ndim", 1) == 0:
        kind = type(rewards).__name__
        raise UserError(f"Reward {name!r} returned a {kind}; it must return a list with one number per rollout.")
    if len(rewards) != expected:
        raise UserError(
            f"Reward {name!r} returned {len(rewards)} values for {expected} rollouts; return one for each."
        )
    return [_check_reward(reward, row, name) for row, reward in enumerate(rewards)]


def _check_reward(reward: Any, row: int, name: str) -> float | None:
    if reward is None:
        return None
    try:
        number = math.nan if isinstance(reward, str) else float(reward)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= LARGEST:  # NaN is not
        raise UserError(
            f"Reward {name!r} returned {reward!r:.80} for rollout {row}; return a finite number (TRL takes it as "
            "float32), or None where the reward does not apply."
        )
    return number
