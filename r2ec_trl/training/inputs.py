"""What a trainer is given, checked before anything is loaded: settings, catalogue, users, rewards."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import polars as pl
import torch
from datasets import Dataset, DatasetDict
from transformers import AutoTokenizer
from transformers.integrations import get_reporting_integration_callbacks

from r2ec_trl.errors import UserError
from r2ec_trl.evaluation.users import summarise_users
from r2ec_trl.policy.checks import fit_adapter
from r2ec_trl.policy.loading import PolicyArguments, load_policy
from r2ec_trl.rewards import OF_REWARDS, check_arguments, checked_reward, load_reward, reward_name

logger = logging.getLogger(__name__)

HIDDEN = "_shown_to_rewards_as_"  # prefix of columns whose names mean something else to TRL
NEVER_GIVEN = ("prompt", "completion", "environments")  # of what TRL knows, what no reward of ours gets
OF_TRL = ("image", "images")  # TRL would make a vision model's prompts of them


def check_inputs(args: Any, kind: Any, items: Any, train: Any, evaluation: Any) -> tuple[Dataset, Dataset, Any]:
    """Catalogue, training users and validation users as plain rows, the settings checked; see the functions below."""
    items = check_items(items)
    evaluation = check_eval_users(evaluation, items["item_id"][:])
    check_settings(args, kind, evaluation)
    if train is None or (isinstance(train, Dataset) and len(train) == 0):
        raise UserError("`train_dataset` is empty; give at least one batch of users.")
    train = check_users(train, "train_dataset", items["item_id"][:], own_names=("prompt",))
    for column in (taken := [name for name in OF_REWARDS if name in train.column_names]):
        logger.warning("The column `%s` of `train_dataset` is left out: rewards get another thing by it.", column)
    return items, train.remove_columns(taken), evaluation


def check_batch(args: Any, train_dataset: Dataset) -> None:
    """[`UserError`] for fewer users than TRL's sampler puts into a generation batch; what it drops is said."""
    users = args.generation_batch_size // args.num_generations
    if len(train_dataset) < users:
        raise UserError(
            f"`train_dataset` has {len(train_dataset)} users, fewer than the {users} of one generation batch "
            f"({args.generation_batch_size} rollouts / {args.num_generations} a user); lower the batch size."
        )
    if left := len(train_dataset) % users:
        logger.warning("%d of %d users do not fill a generation batch each epoch.", left, len(train_dataset))


def check_settings(args: Any, kind: Any, eval_dataset: Any) -> None:
    """
    Refuse settings that would end the run later; `eval_dataset` is checked already.

    Raises:
        [`UserError`]: for another kind of settings, a reporter that is not installed, an evaluation without users, or
        a figure to choose the best checkpoint by that no evaluation gives.
    """
    if not isinstance(args, kind):
        raise UserError(
            f"`args` is a {type(args).__name__}; give a {kind.__name__}, which has the same fields and those of ours."
        )
    args.report_to = [name for name in args.report_to or [] if name]
    for name in args.report_to:
        try:
            for callback in get_reporting_integration_callbacks([name]):
                callback()
        except (RuntimeError, ImportError, ValueError) as error:
            raise UserError(f"`report_to` names {name!r}: {' '.join(str(error).split())}") from error
    if args.eval_strategy != "no" and eval_dataset is None:
        raise UserError(f"`eval_strategy` is {args.eval_strategy.value!r}, but there is no `eval_dataset`.")
    _check_selection(args, eval_dataset)


def _check_selection(args: Any, eval_dataset: Any) -> None:
    """The best checkpoint is chosen by a figure that evaluations give; among several sets, by the first one's."""
    if args.metric_for_best_model is None or args.eval_strategy == "no":
        return
    one = {"user_id": ["u"], "rank": [1], "rank_masked": [1], "has_marker": [True], "reasoning_tokens": [0]}
    one["top_item_ids"] = [["x"]]
    known = [f"recommendation/{name}" for name in summarise_users(pl.DataFrame(one))]
    wanted = args.metric_for_best_model.removeprefix("eval_")
    if isinstance(eval_dataset, Mapping):
        first = next(iter(eval_dataset))
        if wanted in known:
            args.metric_for_best_model = f"{first}_{wanted}"
            logger.warning("The best checkpoint is chosen by `%s`.", args.metric_for_best_model)
            return
        known = [f"{name}_{figure}" for name in eval_dataset for figure in known]
    if wanted not in known:
        raise UserError(
            f"`metric_for_best_model` is {args.metric_for_best_model!r}, which no evaluation gives; one of "
            f"{', '.join(known)}."
        )


def check_items(item_dataset: Any) -> Dataset:
    """The catalogue as plain rows; [`UserError`] for what is none, or for an item without id or title."""
    items = _plain(item_dataset, "item_dataset", ("item_id", "title"))
    for name in ("item_id", "title"):
        for row, value in enumerate(items[name][:]):
            if value is None or not str(value).strip():
                raise UserError(f"`item_dataset`, row {row}: no `{name}`; every item needs one.")
    return items


def check_users(users: Any, name: str, item_ids: Iterable[str], own_names: tuple[str, ...] = ()) -> Dataset:
    """
    Users as plain rows.

    Args:
        users ([`~datasets.Dataset`]):
            Rows of `user_id`, `history`, `target` and further columns.
        name (`str`):
            What the argument is called.
        item_ids (`Iterable[str]`):
            Those of the catalogue.
        own_names (`tuple[str]`, *optional*):
            Columns that the trainer writes itself.

    Raises:
        [`UserError`]: for what is no map-style dataset, a missing column, a target or purchase outside the catalogue,
        or a history that is no list.
    """
    users = _plain(users, name, ("user_id", "history", "target"))
    known = set(item_ids)
    for row, target in enumerate(users["target"][:]):
        if target not in known:
            raise UserError(f"`{name}`, row {row}: target {target!r} is not in the catalogue of {len(known)} items.")
    is_list = hasattr(users.features["history"], "feature")
    if not is_list or users.data.column("history").null_count:  # of all rows, chosen or not
        for row, history in enumerate(users["history"][:]):
            if not isinstance(history, list):
                raise UserError(f"`{name}`, row {row}: history {history!r:.80} is no list of item ids; give one.")
    for row, history in enumerate(users["history"][:]):
        if absent := [item for item in history if item not in known]:
            raise UserError(f"`{name}`, row {row}: item {absent[0]!r} of the history is not in the catalogue.")
    for column in own_names:
        if column in users.column_names:
            logger.warning("The column `%s` of `%s` is replaced: prompts are made from `history`.", column, name)
    return users.rename_columns({column: HIDDEN + column for column in OF_TRL if column in users.column_names})


def check_eval_users(users: Any, item_ids: Iterable[str]) -> Dataset | dict[str, Dataset] | None:
    """Validation users: none, one dataset, or several by name; see [`check_users`]."""
    if isinstance(users, Mapping):
        if not users:
            raise UserError("`eval_dataset` is an empty dict; give at least one set of users, or none.")
        return {name: _some_users(each, f"eval_dataset[{name!r}]", item_ids) for name, each in users.items()}
    return None if users is None else _some_users(users, "eval_dataset", item_ids)


def _some_users(users: Any, name: str, item_ids: Iterable[str]) -> Dataset:
    users = check_users(users, name, item_ids)
    if not len(users):
        raise UserError(f"`{name}` is empty; give at least one user, or none of it.")
    return users


def as_given(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row under its own column names."""
    return {name.removeprefix(HIDDEN): value for name, value in row.items()}


def _plain(rows: Any, name: str, columns: tuple[str, ...]) -> Dataset:
    """A dataset as Python values; [`UserError`] says what is missing."""
    if not isinstance(rows, Dataset):
        cure = "`Dataset.from_list(list(rows))` makes one"
        if isinstance(rows, DatasetDict):
            cure = f"one of its splits: {', '.join(rows)}"
        elif hasattr(rows, "columns"):
            cure = "`Dataset.from_pandas` or `Dataset.from_polars` makes one"
        raise UserError(
            f"`{name}` is a {type(rows).__name__}; give a `datasets.Dataset` ({cure}): rows are drawn by number."
        )
    if absent := [column for column in columns if column not in rows.column_names]:
        raise UserError(f"`{name}` has no column `{absent[0]}`; it needs {', '.join(columns)}.")
    return rows.with_format(None)


def resolve_policy(model: Any, tokenizer: Any, peft_config: Any, args: Any, more: dict) -> tuple[Any, Any, Any]:
    """Model, tokenizer and adapter settings, loaded where a name or nothing was given (`more`: TRL's arguments)."""
    if isinstance(model, str):
        bits = more.pop("quantization_config", None)
        model, found = load_policy(PolicyArguments(model), True, args.trust_remote_code, quantization=bits)
        tokenizer = tokenizer or found
    if tokenizer is None:
        name = model.config._name_or_path
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=args.trust_remote_code)
    return model, tokenizer, fit_adapter(peft_config, model)


def resolve_rewards(reward_funcs: Any, args: Any, columns: Iterable[str]) -> list[Callable]:
    """
    Reward functions by name or as they are, each checking its answers; the fused reward where none is given. Each gets
    what it asks for from train rows of these columns.
    """
    specs = list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs or "fused"]
    if not specs:
        raise UserError("`reward_funcs` is an empty list; name at least one reward, or leave it out.")
    names = ("reward_mix", "reward_cutoff", "max_completion_length", "soft_punish_cache")
    settings = {name: getattr(args, name) for name in names}
    loaded = [load_reward(s, **settings) if isinstance(s, str) else s for s in specs]
    if args.reward_weights is not None and len(args.reward_weights) != len(loaded):
        raise UserError(f"{len(loaded)} reward functions, but {len(args.reward_weights)} `reward_weights`.")
    if wrong := [func for func in loaded if not callable(func)]:
        raise UserError(f"`reward_funcs` holds a {type(wrong[0]).__name__}; give functions, or names of them.")
    known = {*OF_REWARDS, *(name.removeprefix(HIDDEN) for name in columns)} - set(NEVER_GIVEN)
    own = [func for func in loaded if not isinstance(func, torch.nn.Module)]
    for func in own:
        check_arguments(func, reward_name(func), known)
    return [checked_reward(func) if func in own else func for func in loaded]


def numbered(names: list[str]) -> list[str]:
    """
    Names with those that stand several times numbered, so that each reward has a figure of its own.

    >>> numbered(["reward", "hit", "reward"])
    ['reward_1', 'hit', 'reward_2']
    """
    counts, seen = Counter(names), Counter[str]()
    result = []
    for name in names:
        new = name
        while counts[name] > 1 and (new == name or new in counts):  # another may have such a name of its own
            seen[name] += 1
            new = f"{name}_{seen[name]}"
        result.append(new)
    return result
