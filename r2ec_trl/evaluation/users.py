"""Greedy reasoning, then the whole catalogue: the one evaluator of every trainer and recipe."""

import random
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import polars as pl
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import PreTrainedModel

from r2ec_trl.errors import UserError
from r2ec_trl.items.encoding import make_encoder
from r2ec_trl.items.scoring import CatalogueScores, exclusion_matrix
from r2ec_trl.items.table import ItemTable
from r2ec_trl.metrics import bootstrap_interval, ndcg_at_k, summarise_ranks
from r2ec_trl.policy.generation import generate_reasoning
from r2ec_trl.policy.prompts import Prompts
from r2ec_trl.policy.rollouts import MarkerReader, Reasoner, Rollout, Watch

REASONING_MODES = ("full", "none", "truncated", "other")
NUM_TOP_ITEMS = 10


def alter_reasoning(rollouts: Sequence[Rollout], reader: MarkerReader, reasoning: str, seed: int = 0) -> list[Rollout]:
    """
    The rollouts that answer "does the reasoning help?" for one checkpoint.

    Args:
        rollouts (`Sequence[Rollout]`):
            Each user's own.
        reader ([`~r2ec_trl.policy.rollouts.MarkerReader`]):
            Completes what is cut.
        reasoning (`str`):
            `"full"` (as they are), `"none"` (the marker at once), `"truncated"` (the first half) or `"other"` (another
            user's).
        seed (`int`, *optional*, defaults to `0`):
            Draws whose reasoning a user gets under `"other"`.
    """
    if reasoning not in REASONING_MODES:
        raise UserError(f"`reasoning` is {reasoning!r}; give one of {', '.join(REASONING_MODES)}.")
    if reasoning == "none":
        return [reader.finish([], end_ids=[])] * len(rollouts)
    if reasoning == "truncated":
        halves = [rollout.ids[: (len(rollout.ids) - len(reader.marker_ids)) // 2] for rollout in rollouts]
        return [reader.finish(half, end_ids=[]) for half in halves]
    if reasoning == "other":
        order = list(range(len(rollouts)))
        random.Random(seed).shuffle(order)
        other = {order[i]: rollouts[order[i - 1]] for i in range(len(order))}  # one cycle: nobody keeps their own
        return [other[i] for i in range(len(rollouts))]
    return list(rollouts)


@torch.no_grad()
def answer_users(
    model: PreTrainedModel,
    prompts: Prompts,
    table: ItemTable,
    users: Iterable[Mapping[str, Any]],
    reasoner: Reasoner,
    max_new_tokens: int,
    token_budget: int,
    reasonings: Sequence[str | Rollout],
    watch: Watch | None = None,
) -> tuple[torch.Tensor, list[Rollout]]:
    """
    Reason about each user, then read the answer state (paper §3): what trainers, evaluation and serving all do.

    Args:
        model, prompts, table:
            The policy, its prompt maker and the item table encoded with it.
        users (`Iterable[Mapping]`):
            What the prompts use.
        reasoner ([`~r2ec_trl.policy.rollouts.Reasoner`]):
            Writes the reasonings.
        max_new_tokens (`int`), token_budget (`int`):
            Longest reasoning, and tokens of a forward.
        reasonings (`Sequence[str]`):
            One a user: `"full"` (the reasoner's), `"none"` (the marker at once), a text to take as it is, or a rollout
            that was written before.
        watch (`Callable`, *optional*):
            See [`~r2ec_trl.policy.rollouts.Reasoner`]; it gets the user's number.

    Returns:
        Answer states as the table scores them, `(users, d)` on its device, and the rollouts they were read after.
    """
    reader = MarkerReader(prompts.tokenizer, prompts.config.marker)
    prompt_ids = [prompts.user_ids(user) for user in users]
    written = [number for number, reasoning in enumerate(reasonings) if reasoning == "full"]
    seen = None if watch is None else (lambda row, ids: watch(written[row], ids))
    made = reasoner([prompt_ids[number] for number in written], max_new_tokens, watch=seen) if written else []
    rollouts = dict(zip(written, made, strict=True))
    for number in set(range(len(prompt_ids))).difference(written):
        given = reasonings[number]
        if isinstance(given, str):
            given = reader.finish(prompts.plain.ids("" if given == "none" else given), end_ids=[])
        rollouts[number] = given
    sequences = [list(ids) + rollouts[number].ids for number, ids in enumerate(prompt_ids)]
    states = table.project(make_encoder(model, prompts, token_budget)(sequences)).to(table.device)
    return states, [rollouts[number] for number in range(len(prompt_ids))]


@torch.no_grad()
def evaluate_users(
    model: PreTrainedModel,
    prompts: Prompts,
    table: ItemTable,
    dataset: Dataset,
    max_new_tokens: int,
    temperature: float,
    reasoning: str = "full",
    token_budget: int = 16_384,
    rollouts: Sequence[Rollout] | None = None,
) -> pl.DataFrame:
    """
    Rank every user's target in the whole catalogue, with the history masked and not.

    Args:
        model, prompts, table:
            The policy, its prompt maker and the item table encoded with it.
        dataset ([`~datasets.Dataset`]):
            Rows of `user_id`, `history`, `target` and what the prompts use; a history may be empty.
        max_new_tokens (`int`):
            Longest reasoning.
        temperature (`float`):
            τ of the log-probability column.
        reasoning (`str`, *optional*, defaults to `"full"`):
            See [`alter_reasoning`].
        rollouts (`Sequence[Rollout]`, *optional*):
            Each user's own rollout where it is known already; the policy writes them otherwise, greedily.

    Returns:
        `polars.DataFrame`: one row a user, in order: `user_id`, `target`, `rank`, `rank_masked` (1-based, ties against
        the target; a masked repeat is rank N+1), `logprob`, `reasoning`, `reasoning_tokens`, `has_marker`,
        `top_item_ids` (10, history not masked).
    """
    reader = MarkerReader(prompts.tokenizer, prompts.config.marker)
    write = partial(generate_reasoning, model, reader, batch_tokens=2 * token_budget)

    def reason(*question: Any, **options: Any) -> list[Rollout]:
        written = write(*question, **options) if rollouts is None else rollouts[: len(asked)]
        return alter_reasoning(written, reader, reasoning)

    histories = [table.row_indices(history) for history in dataset["history"]]
    strangers = not any(histories)  # nobody has bought anything: one prompt, one answer for all
    asked = dataset.select([0]) if strangers else dataset
    modes = ["none" if reasoning == "none" else "full"] * len(asked)
    states, used = answer_users(model, prompts, table, asked, reason, max_new_tokens, token_budget, modes)
    if strangers:
        states, used = states.expand(len(dataset), -1), used * len(dataset)
    return rank_users(prompts, table, dataset, histories, states, used, temperature)[0]


def rank_users(
    prompts: Prompts,
    table: ItemTable,
    dataset: Dataset,
    histories: list[list[int]],
    states: torch.Tensor,
    rollouts: Sequence[Rollout],
    temperature: float,
) -> tuple[pl.DataFrame, CatalogueScores]:
    """
    The frame of [`evaluate_users`] from answer states `(users, d)`, the rollouts they were read after and the rows of
    the histories, and the scores of the targets with the history not masked.
    """
    excluded = exclusion_matrix(histories, table.device)
    targets = torch.tensor(table.row_indices(dataset["target"]), device=table.device)
    scores = table.rank(states, targets, temperature=temperature)
    masked = table.rank(states, targets, temperature=temperature, excluded=excluded, keep_target=False)
    _, best = table.best(states, NUM_TOP_ITEMS)
    columns = {
        "user_id": dataset["user_id"][:],
        "target": dataset["target"][:],
        "rank": scores.rank.tolist(),
        "rank_masked": masked.rank.tolist(),
        "logprob": scores.logprob.tolist(),
        "reasoning": prompts.tokenizer.batch_decode([rollout.ids for rollout in rollouts], skip_special_tokens=True),
        "reasoning_tokens": [sum(rollout.trained) for rollout in rollouts],
        "has_marker": [rollout.has_marker for rollout in rollouts],
        "top_item_ids": [[table.item_ids[row] for row in rows] for rows in best.tolist()],
    }
    return pl.DataFrame(columns), scores


def summarise_users(frame: pl.DataFrame) -> dict[str, float]:
    """
    Means over users of [`evaluate_users`]' frame: `hit@k`, `ndcg@k`, `mrr@k` for k = 5, 10, 20, `ndcg@10_low` and
    `ndcg@10_high` (bootstrap interval), the same with the prefix `masked_`, `missing_marker`, `reasoning_tokens`, and
    `top1_share`, the share of users who get the most frequent first item (near 1 when recommendations have collapsed).
    """
    top, users = frame["top_item_ids"].list.first(), frame["user_id"].to_numpy()
    figures: dict[str, float] = {}
    for prefix, column in (("", "rank"), ("masked_", "rank_masked")):
        ranks = frame[column].to_numpy()
        figures |= {f"{prefix}{name}": value for name, value in summarise_ranks(ranks).items()}
        low, high = bootstrap_interval(ndcg_at_k(ranks, 10), groups=users)
        figures |= {f"{prefix}ndcg@10_low": low, f"{prefix}ndcg@10_high": high}
    return {
        **figures,
        "missing_marker": 1 - float(frame["has_marker"].cast(pl.Float64).sum()) / frame.height,
        "reasoning_tokens": float(frame["reasoning_tokens"].sum()) / frame.height,
        "top1_share": int(top.value_counts()["count"].to_numpy().max()) / frame.height,
    }


def without_histories(dataset: Dataset) -> Dataset:
    """The same users and targets as if nobody had bought anything: `user_id`, `history` (empty), `target`."""
    empty: list[list[str]] = [[]] * len(dataset)
    return Dataset.from_dict({"user_id": dataset["user_id"][:], "history": empty, "target": dataset["target"][:]})


def first_rows(dataset: Dataset, count: int | None) -> Dataset:
    """The first `count` rows, or all."""
    return dataset if count is None else dataset.select(range(min(count, len(dataset))))


def own_rows(dataset: Dataset, accelerator: Accelerator) -> Dataset:
    """This process's share of a dataset's rows, dealt out one by one; row 0 where none is left for it."""
    rows = range(accelerator.process_index, len(dataset), accelerator.num_processes)
    return dataset.select(list(rows) or [0])


def gather_rows(frame: pl.DataFrame, rows: int) -> pl.DataFrame:
    """
    The frames that all processes made of their [`own_rows`], one row each, as one frame in the order of the dataset's
    `rows` rows.
    """
    frames = gather_object([frame])
    places = [range(rank, rows, len(frames)) for rank in range(len(frames))]
    placed = [
        one[: len(place)].with_columns(row=pl.Series(place, dtype=pl.Int64))
        for one, place in zip(frames, places, strict=True)
    ]
    return pl.concat(placed).sort("row").drop("row")
