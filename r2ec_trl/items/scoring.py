"""Exact ranks, probabilities and best items over a whole catalogue, streamed in chunks of items.

Nothing larger than (B, chunk_size) is ever built: a rank is counted, and the softmax denominator is a running
log-sum-exp. A score is a float64 product, rounded once to float32. A float32 product alone depends on the shape of the
matrices it is part of (on one CPU, two identical rows get different scores when B is 1): ranks would change with the
chunk size, the batch and the device, and rounding would break ties.
Large catalogues get there at float32's price: one float32 product a chunk decides every pair that is further from the
target (or from the k-th best) than rounding can carry it, and the few others are settled by float64 products of their
own. The bound is twice that of a dot product of d terms in any order, d * 2^-24 * |u| |v|. Small catalogues, chunks
with many near ties (a collapsed table), broken numbers and reduced float32 precision (TF32) take float64 throughout.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from r2ec_trl.errors import UserError
from r2ec_trl.policy import linear
from r2ec_trl.policy.settings import SIMILARITIES

SCORES_AT_ONCE = 2**24  # bounds the memory of one chunk whatever the number of states: 64 MB
CACHED_SHARE = 32  # a CPU takes a 32nd of that: what a core's cache holds
ROW_VALUES_AT_ONCE = 2**20  # bounds the rows held in float64: 8 MB
FLOAT64_PRODUCTS = 2**24  # below this many multiplications settling costs more than float64
BLOCK = 64  # rows whose nearest score is looked at first
_LONGEST = WeakTensorKeyDictionary()  # table -> its version, length of its longest row


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
            Items scored at once; by default what suits the device's memory. Ranks and scores do not depend on it.

    Returns:
        [`CatalogueScores`]: rank, log-probability and score of each target.

    Example: scores .6, .8, .6 and the first as the target: one is better, one equal, so the rank is 3. At temperature
    .2 the log-probability is .6/.2 - log(2 exp(.6/.2) + exp(.8/.2)) = -1.5514.

    ```python
    >>> states, rows = torch.tensor([[1.0]]), torch.tensor([[0.6], [0.8], [0.6]])
    >>> scores = target_rank_and_logprob(states, rows, torch.tensor([0]), temperature=0.2)
    >>> scores.rank.item(), round(scores.logprob.item(), 4)
    (3, -1.5514)

    ```
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}.")
    chunk_size = chunk_of(states, rows, chunk_size)
    if any(not 0 <= row < len(rows) for row in targets.tolist()):
        raise ValueError(f"targets must be row indices in 0..{len(rows) - 1}.")
    if excluded is None:
        excluded = targets.new_empty(len(targets), 0)
    same = excluded == targets[:, None]  # (B, H)
    missed = same.any(dim=1) & (not keep_target)
    if keep_target:
        excluded = excluded.masked_fill(same, -1)
    score = target_scores(states, rows, targets)
    rank, normaliser = count_against(states, rows, targets, score, temperature, excluded, chunk_size)
    logprob = (score.double() / temperature - normaliser).float()
    return CatalogueScores(
        rank=rank.masked_fill(missed, len(rows) + 1), logprob=logprob.masked_fill(missed, -math.inf), score=score
    )


def target_scores(states: torch.Tensor, rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Score of each state's target, `(B,)` float32; NaN where the target is -1."""
    score = states.new_full((len(states),), math.nan, dtype=torch.float32)
    known = (targets >= 0).nonzero()[:, 0]
    score[known] = _settle(states, rows, known, targets[known])
    return score


def count_against(
    states: torch.Tensor,
    rows: torch.Tensor,
    targets: torch.Tensor,
    score: torch.Tensor,
    temperature: float,
    excluded: torch.Tensor,
    chunk_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    How many rows score no worse than `score`, int64, the target (-1 where it is elsewhere) among them, and the
    log-sum-exp of all scores over the temperature, float64; both `(B,)`, over the rows that are not excluded.
    """
    count = torch.zeros(len(states), dtype=torch.int64, device=states.device)
    total = torch.zeros_like(count, dtype=torch.float64)  # of exponents relative to the target's
    normaliser = score.new_full(score.shape, -math.inf, dtype=torch.float64)
    fast = _Float32(states, rows, 1 / temperature)
    bound = fast.bound(score)
    pairs: list[tuple[torch.Tensor, ...]] = []
    for start in range(0, len(rows), chunk_size):
        chunk = rows[start : start + chunk_size]
        found = None
        if bound is not None:
            scores = fast.product(chunk, score)  # (chunk, B), relative to the target's
            _bound(scores.T, excluded - start, -math.inf, "amin")
            found = _at_most(torch.abs(scores, out=fast.room[1, : len(scores)]), bound)
        if found is not None:
            row, state = found
            signs = scores[row, state].sign()
            signed = torch.sign(scores, out=fast.room[1, : len(scores)]).sum(dim=0)
            exponents = scores.exp_().sum(dim=0)
            if bool(exponents.sum() < math.inf):  # float32 holds e^88
                total += exponents
                # of +1 for better and -1 for worse, those in question taken out, twice the number that is better
                count += (signed + len(scores)).long()
                pairs.append((row + start, state, signs))
                continue
        scores = _scores(states, chunk)  # (B, chunk)
        own = torch.where(score.isnan(), -math.inf, score)
        _bound(scores, (targets - start)[:, None], own[:, None], "amax")  # never below itself
        _bound(scores, excluded - start, -math.inf, "amin")
        count += 2 * (scores.shape[1] - (scores < score[:, None]).sum(dim=1))  # not worse: better, equal, itself
        normaliser = torch.logaddexp(normaliser, torch.logsumexp(scores.double() / temperature, dim=1))
    if pairs:
        row, state, signs = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        exact = torch.where(row == targets[state], score[state], _settle(states, rows, state, row))
        count.index_add_(0, state, 2 * (exact >= score[state]).long() - 1 - signs.long())
    return count // 2, torch.logaddexp(normaliser, total.log() + score.double() / temperature)


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
        states, rows, chunk_size:
            As in [`target_rank_and_logprob`].
        k (`int`):
            How many; a catalogue of fewer items gives fewer.
        excluded (`torch.Tensor` of shape `(B, H)`, *optional*):
            Row indices that one state must not get, padded with -1.
        allowed (`torch.Tensor` of shape `(N,)`, bool, *optional*):
            Items that may be given to anyone.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: scores (float32) and row indices (int64), both of shape `(B, min(k, N))`.
        Where fewer items are available, the rest has score -inf and index -1.

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
    best = torch.empty(len(states), 0, dtype=torch.int64, device=states.device)  # keys
    fast = _Float32(states, rows)
    for start in range(0, len(rows), chunk_size):
        chunk = rows[start : start + chunk_size]
        barred = None if allowed is None else ~allowed[start : start + chunk_size]
        least = _read_keys(best[:, k - 1])[0] if best.shape[1] == k else None  # (B,), what it takes
        hidden = None if excluded is None else excluded - start
        found = None if least is None else fast.at_least(chunk, least, hidden, barred)
        if found is not None:
            row, state = found
            keys = _by_state(_sort_keys(_settle(states, chunk, state, row), row + start), state, len(states))
        else:
            scores = _scores(states, chunk)  # (B, chunk)
            if barred is not None:
                scores.masked_fill_(barred, -math.inf)
            if hidden is not None:
                _bound(scores, hidden, -math.inf, "amin")
            keys = _sort_keys(scores, torch.arange(start, start + len(chunk), device=rows.device))
        keys = torch.cat([best, keys], dim=1)
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
    shapes = f"{tuple(states.shape)} and {tuple(rows.shape)}"
    if states.ndim != 2 or rows.ndim != 2 or states.shape[1] != rows.shape[1] or len(rows) == 0:
        raise ValueError(f"states and rows must be (B, d) and (N, d) with at least one row, got {shapes}.")
    if chunk_size is None:
        at_once = SCORES_AT_ONCE // (CACHED_SHARE if rows.device.type == "cpu" else 1)
        return max(1, at_once // max(1, len(states)))
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")
    return chunk_size


class _Float32:
    """One float32 product a chunk of rows, and which scores are too near to call. They stand as (chunk, B): faster."""

    def __init__(self, states: torch.Tensor, rows: torch.Tensor, scale: float = 1.0):
        self.states, self.scale = states.float(), scale
        self.room = self.states.new_empty(2, 0, len(states))  # (2, largest chunk, B), used again for each chunk
        self.usable = len(states) * rows.numel() > FLOAT64_PRODUCTS and _full_precision()
        if self.usable:
            self.largest = self.states.double().norm(dim=1) * _longest(rows)  # (B,), that a score can be
            self.factor = (self.states * scale).T  # (d, B)

    def bound(self, origin: torch.Tensor) -> torch.Tensor | None:
        """Twice what [`product`] may be off, `(B,)`; `None` where there is no bound and float64 has to say it all."""
        if not self.usable:
            return None
        largest = torch.maximum(self.largest, origin.double().abs())
        if not bool((largest < 1e30).all()):  # NaN, infinite, or near overflow
            return None
        terms = self.states.shape[1] + 8  # scaling, shifting and the origin itself are rounded too
        return ((2 * terms * 2.0**-24 * largest + 1e-35) * self.scale).float()  # 1e-35: products that underflow

    def product(self, chunk: torch.Tensor, origin: torch.Tensor) -> torch.Tensor:
        """(scores - origin) * scale, `(rows, B)`, in whole blocks of rows: -inf behind the chunk."""
        size = -(-len(chunk) // BLOCK) * BLOCK
        if self.room.shape[1] < size:
            self.room = self.room.new_empty(2, size, len(origin))
        if len(chunk) == size and linear.pays(chunk) and len(origin):
            return linear.product(chunk, self.factor.T, origin * -self.scale)
        scores = self.room[0, :size]
        scores[len(chunk) :] = -math.inf
        with torch.autocast(chunk.device.type, enabled=False):
            torch.addmm(origin * -self.scale, chunk.float(), self.factor, out=scores[: len(chunk)])
        return scores

    def at_least(
        self, chunk: torch.Tensor, least: torch.Tensor, excluded: torch.Tensor | None, barred: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...] | None:
        """Row and state of each pair whose score may be `least` or more, by state; `None`: float64 has to say."""
        bound = self.bound(least)
        if bound is None:
            return None
        scores = self.product(chunk, least)
        if barred is not None:
            scores[: len(chunk)].masked_fill_(barred[:, None], -math.inf)
        if excluded is not None:
            _bound(scores.T, excluded, -math.inf, "amin")
        found = _at_most(scores.neg_(), bound)
        if found is None:
            return None
        order = found[1].argsort(stable=True)
        return found[0][order], found[1][order]


def _longest(rows: torch.Tensor) -> float:
    """Length of the longest row; a table is measured once, until it is written to. NaN where a row is broken."""
    version = None if rows.is_inference() else rows._version
    known = _LONGEST.get(rows)
    if known is None or known[0] != version or version is None:
        tiles = rows.split(max(1, ROW_VALUES_AT_ONCE // max(1, rows.shape[1])))
        lengths = torch.stack([torch.linalg.vector_norm(tile.float(), dim=1).amax() for tile in tiles])
        known = _LONGEST[rows] = (version, lengths.amax().item())
    return known[1]


def _full_precision() -> bool:
    """Whether float32 products are float32 throughout: TF32 and bfloat16 kernels are not."""
    backends: Any = torch.backends
    said = (backends.fp32_precision, backends.cuda.matmul.fp32_precision, backends.mkldnn.matmul.fp32_precision)
    return not {"tf32", "bf16"} & {*said}


def _at_most(values: torch.Tensor, bound: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Row and column of each of the (rows, B) values up to the column's bound; `None` where they are too many."""
    blocks = values.view(-1, BLOCK, values.shape[1])
    block, column = (blocks.amin(dim=1) <= bound).nonzero(as_tuple=True)
    if 2 * len(block) * BLOCK > values.numel() and len(block) > values.shape[1]:
        return None
    hit, offset = (blocks[block, :, column] <= bound[column, None]).nonzero(as_tuple=True)
    if 8 * len(hit) > values.numel():  # float64 is cheaper then
        return None
    return block[hit] * BLOCK + offset, column[hit]


def _scores(states: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Similarities, (B, chunk): float64 products, rounded once to float32."""
    tiles, states = rows.split(max(1, ROW_VALUES_AT_ONCE // max(1, rows.shape[1]))), states.double()
    return torch.cat([(states @ tile.double().T).float() for tile in tiles], dim=1)


def _settle(states: torch.Tensor, rows: torch.Tensor, state: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """As [`_scores`], of pairs: `(pairs,)`."""
    at_once = max(1, ROW_VALUES_AT_ONCE // max(1, rows.shape[1]))
    pairs = zip(state.split(at_once), row.split(at_once), strict=True)
    return torch.cat([(states[i].double() * rows[j].double()).sum(dim=1).float() for i, j in pairs])


def _bound(scores: torch.Tensor, column: torch.Tensor, value: torch.Tensor | float, reduce: str) -> None:
    """Raise ("amax") or lower ("amin") some columns of each row to a value, in place; columns outside do nothing."""
    inside = (column >= 0) & (column < scores.shape[1])
    value = torch.where(inside, value, -math.inf if reduce == "amax" else math.inf).to(scores.dtype)
    scores.scatter_reduce_(1, column.clamp(0, scores.shape[1] - 1), value, reduce=reduce)


def _sort_keys(scores: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """
    int64 keys that sort by score, then by lower row index, so that `topk` has no ties to break; NaN sorts last. The
    high half is the float's bits, negative ones flipped; adding 0.0 turns -0.0 into the 0.0 that it equals.
    """
    bits = (torch.where(scores.isnan(), -math.inf, scores) + 0.0).view(torch.int32)
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
    return (order << 32) | (0xFFFFFFFF - index)


def _by_state(keys: torch.Tensor, state: torch.Tensor, num_states: int) -> torch.Tensor:
    """Keys of pairs, sorted by state, as one row a state: (B, most a state has); the rest sorts behind every score."""
    counts = torch.bincount(state, minlength=num_states)
    table = keys.new_full((num_states, int(counts.max())), torch.iinfo(torch.int64).min)
    table[state, torch.arange(len(state), device=state.device) - (counts.cumsum(0) - counts)[state]] = keys
    return table


def _read_keys(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and row indices of `_sort_keys`."""
    order = (keys >> 32).to(torch.int32)
    bits = torch.where(order < 0, order ^ 0x7FFFFFFF, order)
    return bits.view(torch.float32), 0xFFFFFFFF - (keys & 0xFFFFFFFF)
