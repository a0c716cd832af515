"""Exact ranks, probabilities and best items over a whole catalogue, streamed in chunks of items.

Nothing larger than (B, chunk_size) is ever built: a rank is counted, and the softmax denominator is a running
log-sum-exp. Products are formed in float64 and rounded once to float32. A float32 product depends on the shape of the
matrices it is part of (on one CPU, two identical rows get different scores when B is 1): ranks would change with the
chunk size, the batch and the device, and rounding would break ties. float64 also lies outside autocast and TF32.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from r2ec_trl.errors import UserError

SCORES_AT_ONCE = 2**24  # bounds the memory of one chunk whatever the number of states: 64 MB
ROW_VALUES_AT_ONCE = 2**22  # bounds the rows held in float64: 32 MB
SIMILARITIES = ("cosine", "dot")


class CatalogueScores(NamedTuple):
    """Where the target stands among all items of the catalogue.

    Attributes:
        rank (`torch.Tensor` of shape `(B,)`, int64):
            1-based; a tie counts against the target.
        logprob (`torch.Tensor` of shape `(B,)`, float32):
            Log of the softmax over the catalogue, at the target (log of M2).
        score (`torch.Tensor` of shape `(B,)`, float32):
            Similarity of the answer state and the target, before the temperature.
    """

    rank: torch.Tensor
    logprob: torch.Tensor
    score: torch.Tensor


@torch.no_grad()
def target_rank_and_logprob(
    states: torch.Tensor,
    rows: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float,
    excluded: torch.Tensor | None = None,
    keep_target: bool = True,
    chunk_size: int | None = None,
) -> CatalogueScores:
    r"""Rank of the target and its softmax log-probability over all items (M1's rank, log of M2).

    \\( \text{rank} = 1 + \#\{\text{better}\} + \#\{\text{equal, not itself}\} \\), counted over the items that are not
    excluded. A score that is NaN counts against the target, so a broken state can never look like a good one.

    Args:
        states (`torch.Tensor` of shape `(B, d)`):
            Answer states, normalised already if the similarity is cosine.
        rows (`torch.Tensor` of shape `(N, d)`):
            Item table, one row per item.
        targets (`torch.Tensor` of shape `(B,)`):
            Row index of each target.
        temperature (`float`):
            Divides the scores in the softmax.
        excluded (`torch.Tensor` of shape `(B, H)`, *optional*):
            Row indices that neither count nor are in the softmax, padded with -1; duplicates are harmless.
        keep_target (`bool`, *optional*, defaults to `True`):
            `True` (training): the target is never excluded. `False` (masked evaluation): an excluded target is a miss,
            rank N + 1 and log-probability -inf.
        chunk_size (`int`, *optional*):
            Items scored at once; by default as many as make 16 M scores. The result does not depend on it.

    Returns:
        [`CatalogueScores`]: rank, log-probability and score of each target.

    Example:

    One user, three items with scores .6, .8, .6 and the first as the target: one item is better, one is equal, so the
    rank is 3. At temperature .2 the log-probability is .6/.2 - log(2 exp(.6/.2) + exp(.8/.2)) = -1.5514.

    ```python
    >>> states, rows = torch.tensor([[1.0]]), torch.tensor([[0.6], [0.8], [0.6]])
    >>> scores = target_rank_and_logprob(states, rows, torch.tensor([0]), temperature=0.2)
    >>> scores.rank.item(), round(scores.logprob.item(), 4)
    (3, -1.5514)

    ```
    """
    num_items = len(rows)
    chunk_size = chunk_of(states, rows, chunk_size)
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}.")
    rows_of_targets = targets.tolist()
    if any(not 0 <= row < num_items for row in rows_of_targets):
        raise ValueError(f"targets must be row indices in 0..{num_items - 1}.")
    if excluded is None:
        excluded = targets.new_empty(len(targets), 0)
    same = excluded == targets[:, None]  # (B, H)
    missed = same.any(dim=1) & (not keep_target)
    if keep_target:
        excluded = excluded.masked_fill(same, -1)

    only = _scores(states, rows) if num_items <= chunk_size else None  # one chunk: one product serves both passes
    score = target_scores(states, rows, targets, chunk_size, only)
    rank, normaliser = count_against(states, rows, score, temperature, excluded, chunk_size, only)
    logprob = (score.double() / temperature - normaliser).float()
    return CatalogueScores(
        rank=rank.masked_fill(missed, num_items + 1), logprob=logprob.masked_fill(missed, -math.inf), score=score
    )


def target_scores(
    states: torch.Tensor, rows: torch.Tensor, targets: torch.Tensor, chunk_size: int, only: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Score of each state's target, read from the chunked product that ranks it, `(B,)`; NaN where the target is -1.

    Args:
        states, rows, targets:
            As in [`target_rank_and_logprob`].
        chunk_size (`int`):
            Items scored at once.
        only (`torch.Tensor` of shape `(B, N)`, *optional*):
            The scores, where one chunk holds them all.
    """
    score = states.new_full((len(states),), math.nan, dtype=torch.float32)
    for start in sorted({row // chunk_size * chunk_size for row in targets.tolist() if row >= 0}):
        scores = _scores(states, rows[start : start + chunk_size]) if only is None else only  # (B, chunk)
        column = targets - start
        inside = (column >= 0) & (column < scores.shape[1])
        column = column.clamp(0, scores.shape[1] - 1)
        score = torch.where(inside, scores.gather(1, column[:, None])[:, 0], score)
    return score


def count_against(
    states: torch.Tensor,
    rows: torch.Tensor,
    score: torch.Tensor,
    temperature: float,
    excluded: torch.Tensor,
    chunk_size: int,
    only: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    How many rows score no worse than `score` (its own counts, if it is among them), int64, and the log-sum-exp of all
    scores over the temperature, float64; both `(B,)`, over the rows that are not excluded.
    """
    count = torch.zeros(len(states), dtype=torch.int64, device=states.device)
    normaliser = score.new_full(score.shape, -math.inf, dtype=torch.float64)
    for start in range(0, len(rows), chunk_size):
        scores = _scores(states, rows[start : start + chunk_size]) if only is None else only  # (B, chunk)
        _exclude(scores, excluded, start)
        count += scores.shape[1] - (scores < score[:, None]).sum(dim=1)  # not worse: better, equal, itself
        normaliser = torch.logaddexp(normaliser, torch.logsumexp(scores.double() / temperature, dim=1))
    return count, normaliser


@torch.no_grad()
def top_k(
    states: torch.Tensor,
    rows: torch.Tensor,
    k: int,
    *,
    excluded: torch.Tensor | None = None,
    allowed: torch.Tensor | None = None,
    chunk_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best items of each state, best first; of equal scores the lower row index comes first.

    Args:
        states (`torch.Tensor` of shape `(B, d)`):
            Answer states, normalised already if the similarity is cosine.
        rows (`torch.Tensor` of shape `(N, d)`):
            Item table, one row per item.
        k (`int`):
            How many; a catalogue of fewer items gives fewer.
        excluded (`torch.Tensor` of shape `(B, H)`, *optional*):
            Row indices that one state must not get, padded with -1.
        allowed (`torch.Tensor` of shape `(N,)`, bool, *optional*):
            Items that may be given to anyone.
        chunk_size (`int`, *optional*):
            Items scored at once; by default as many as make 16 M scores. The result does not depend on it.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: scores (float32) and row indices (int64), both of shape `(B, min(k, N))`.
        Where fewer items are available, the rest has score -inf and index -1.

    Example:

    ```python
    >>> scores, indices = top_k(torch.tensor([[1.0]]), torch.tensor([[0.5], [0.75], [0.5]]), k=2)
    >>> indices.tolist(), scores.tolist()
    ([[1, 0]], [[0.75, 0.5]])

    ```
    """
    chunk_size = chunk_of(states, rows, chunk_size)
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}.")
    k = min(k, len(rows))
    best = torch.empty(len(states), 0, dtype=torch.int64, device=states.device)
    for start in range(0, len(rows), chunk_size):
        scores = _scores(states, rows[start : start + chunk_size])  # (B, chunk)
        if allowed is not None:
            scores.masked_fill_(~allowed[start : start + chunk_size], -math.inf)
        if excluded is not None:
            _exclude(scores, excluded, start)
        keys = torch.cat([best, _sort_keys(scores, start)], dim=1)
        best = keys.topk(min(k, keys.shape[1]), dim=1).values
    scores, indices = _read_keys(best)
    return scores, indices.masked_fill(scores == -math.inf, -1)


def normalise(vectors: torch.Tensor, similarity: str) -> torch.Tensor:
    """Vectors ready for a product, in float32: of length one for "cosine", as they are for "dot". Keeps the gradient.

    Args:
        vectors (`torch.Tensor` of shape `(..., d)`):
            Answer states or item rows.
        similarity (`str`):
            "cosine" or "dot".
    """
    if similarity not in SIMILARITIES:
        raise UserError(f"similarity is {similarity!r}; choose one of {', '.join(SIMILARITIES)}.")
    return F.normalize(vectors.float(), dim=-1) if similarity == "cosine" else vectors.float()


def exclusion_matrix(histories: list[list[int]], device: torch.device | str | None = None) -> torch.Tensor:
    """Row indices of each history as one (B, H) int64 matrix, padded with -1.

    ```python
    >>> exclusion_matrix([[3], [1, 2]]).tolist()
    [[3, -1], [1, 2]]

    ```
    """
    width = max(map(len, histories), default=0)
    padded = [[*history, *[-1] * (width - len(history))] for history in histories]
    return torch.tensor(padded, dtype=torch.int64, device=device).reshape(len(histories), width)


def chunk_of(states: torch.Tensor, rows: torch.Tensor, chunk_size: int | None = None) -> int:
    """Items scored at once: as given, or as many as bound the memory."""
    if states.ndim != 2 or rows.ndim != 2 or states.shape[1] != rows.shape[1] or len(rows) == 0:
        shapes = f"{tuple(states.shape)} and {tuple(rows.shape)}"
        raise ValueError(f"states and rows must be (B, d) and (N, d) with at least one row, got {shapes}.")
    if chunk_size is None:
        return max(1, SCORES_AT_ONCE // max(1, len(states)))
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")
    return chunk_size


def _scores(states: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Similarities, (B, chunk): float64 products, rounded once to float32."""
    states = states.double()
    tiles = rows.split(max(1, ROW_VALUES_AT_ONCE // max(1, rows.shape[1])))
    return torch.cat([(states @ tile.double().T).float() for tile in tiles], dim=1)


def _exclude(scores: torch.Tensor, excluded: torch.Tensor, start: int) -> None:
    """Set excluded items of the chunk that begins at row `start` to -inf, in place; entries outside it do nothing."""
    column = excluded - start  # (B, H)
    inside = (column >= 0) & (column < scores.shape[1])
    floor = torch.where(inside, -math.inf, math.inf).to(scores.dtype)
    scores.scatter_reduce_(1, column.clamp(0, scores.shape[1] - 1), floor, reduce="amin")


def _sort_keys(scores: torch.Tensor, start: int) -> torch.Tensor:
    """int64 keys that sort by score, then by lower row index, so that `topk` has no ties to break. NaN sorts last.

    The high half is the float's bit pattern, whose order is the float's once negative patterns are flipped. Adding 0.0
    turns -0.0 into the 0.0 that it equals.
    """
    bits = (torch.where(scores.isnan(), -math.inf, scores) + 0.0).view(torch.int32)
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
    index = torch.arange(start, start + scores.shape[1], device=scores.device)
    return (order << 32) | (0xFFFFFFFF - index)


def _read_keys(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and row indices of `_sort_keys`."""
    order = (keys >> 32).to(torch.int32)
    bits = torch.where(order < 0, order ^ 0x7FFFFFFF, order)
    return bits.view(torch.float32), 0xFFFFFFFF - (keys & 0xFFFFFFFF)
