"""Learnt baselines by RecTools and a sentence encoder (extra `baselines`), each with the small grid it is tuned over.

The libraries count, train and encode; here their scores become ranks by our rules. Every function yields the settings
of its grid and what ranks by them; [`tune`] chooses among them on validation rows.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from functools import partial
from itertools import product
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from r2ec_trl.errors import UserError
from r2ec_trl.evaluation.baselines import Baseline, Rows, ScoredBaseline, baseline_frame, popularity, positions
from r2ec_trl.metrics import ndcg_at_k

Tried: TypeAlias = tuple[dict[str, Any], Baseline]
Paths: TypeAlias = Iterator[Iterable[Tried]]  # each from less training to more

EASE: dict[str, tuple] = {"regularization": (20.0, 100.0, 500.0, 2000.0, 10_000.0), "history_items": (1, 5, 20)}
SASREC: dict[str, tuple] = {"n_factors": (64,), "dropout_rate": (0.2, 0.5)}
HSTU: dict[str, tuple] = {"n_factors": (64,), "dropout_rate": (0.2,), "logits_t": (0.05, 0.1)}
TEXT = {"decay": (0.0, 1.0), "history_items": (1, 5, 20)}  # a purchase k steps back weighs 1 / k^decay
STEP_EPOCHS, MAX_EPOCHS, PATIENCE = 10, 100, 2  # neural ones: validated every so many epochs, patience in such steps
_FIXED = {"n_blocks": 2, "n_heads": 2, "lr": 1e-3, "batch_size": 128, "loss": "softmax"}


def grid_of(grid: dict[str, tuple]) -> list[dict[str, Any]]:
    """
    Every combination of a grid's values.

    >>> grid_of({"a": (1, 2), "b": (3,)})
    [{'a': 1, 'b': 3}, {'a': 2, 'b': 3}]
    """
    return [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]


def tune(
    paths: Iterable[Iterable[Tried]], validation: Rows, tell: Callable[[dict[str, Any], float], None]
) -> tuple[Baseline, list[dict[str, Any]]]:
    """
    The best of what was tried, by NDCG@10 of validation rows, history not masked. A path is left after two steps that
    were no better than the best of the same path.

    Args:
        paths (`Iterable`):
            What a function of this module yields.
        validation ([`~datasets.Dataset`]):
            Rows.
        tell (`Callable`):
            Called with settings and figure of each try.

    Returns:
        `tuple`: what ranks best, and all tries, best first: `settings`, `ndcg@10`.
    """
    tries: list[dict[str, Any]] = []
    best: tuple[float, Baseline] | None = None
    for path in paths:
        highest, worse = -1.0, 0
        for settings, baseline in path:
            value = float(ndcg_at_k(baseline_frame(baseline, validation)["rank"], 10).mean())
            tell(settings, value)
            tries.append({"settings": settings, "ndcg@10": value})
            if best is None or value > best[0]:
                best = (value, baseline)
            highest, worse = (value, 0) if value > highest else (highest, worse + 1)
            if worse == PATIENCE:
                break
    if best is None:
        raise UserError("The grid is empty, so there is nothing to choose; give each setting a value to try.")
    return best[1], sorted(tries, key=lambda one: -one["ndcg@10"])


def train_sequences(rows: Sequence[tuple[list[int], int]], users: Sequence[str]) -> list[list[int]]:
    """
    What users bought, in order, each purchase once: a row whose history ends with the same user's target before goes
    on where that left off, any other starts anew.

    >>> train_sequences([([0], 1), ([0, 1], 2), ([7], 8)], ["u", "u", "u"])
    [[0, 1, 2], [7, 8]]
    """
    sequences: list[list[int]] = []
    last: tuple[str, int] | None = None
    for (history, target), user in zip(rows, users, strict=True):
        if last == (user, history[-1] if history else -1):
            sequences[-1].append(target)
        else:
            sequences.append([*history, target])
        last = (user, target)
    return sequences


def pieces(sequence: list[int], length: int) -> list[list[int]]:
    """
    A sequence in pieces of at most `length`, each beginning half a piece after the one before.

    >>> pieces([1, 2, 3, 4, 5], 4), pieces([1, 2], 4)
    ([[1, 2, 3, 4], [3, 4, 5]], [[1, 2]])
    """
    starts = range(0, max(1, len(sequence) - length // 2), max(1, length // 2))
    return [sequence[start : start + length] for start in starts]


def recent_popularity(train: Rows, item_ids: Sequence[str]) -> Paths:
    """Popularity among the newest train rows alone, those last by `timestamp`."""
    if "timestamp" not in train.column_names:
        raise UserError("The train rows have no `timestamp`, so none of them is recent; leave out recent_popularity.")
    targets = np.array(train["target"][:])[np.argsort(np.array(train["timestamp"][:]), kind="stable")]
    for share in (0.02, 0.05, 0.1, 0.2, 0.5):
        newest = targets[-max(1, round(share * len(targets))) :].tolist()
        counts = popularity({"history": [[]] * len(newest), "target": newest}, item_ids)
        yield [({"share": share}, counts)]


def ease(train: Rows, item_ids: Sequence[str]) -> Paths:
    """
    EASE: a linear item-item model in closed form, fed with the newest `history_items` purchases of a user. Scores are
    the paper's, x B; RecTools' own `recommend` multiplies with the transpose of its weights (0.19).
    """
    from rectools.models import EASEModel

    popular = popularity(train, item_ids)
    index, counts = popular.index, popular.popularity
    dataset = _dataset(train_sequences(positions(train, index), train["user_id"][:]))
    for regularization in EASE["regularization"]:
        model = EASEModel(regularization=regularization).fit(dataset)
        known = dataset.item_id_map.external_ids.astype(np.int64)
        for newest in EASE["history_items"]:
            score = partial(_linear_scores, model.weight, known, newest, len(index))
            settings = {"regularization": regularization, "history_items": newest}
            yield [(settings, ScoredBaseline(index, partial(_or_popularity, score, set(known.tolist()), counts)))]


def sasrec(train: Rows, item_ids: Sequence[str], max_history_items: int, seed: int) -> Paths:
    """SASRec of RecTools, with a softmax over the whole catalogue; see [`transformers`] for the arguments."""
    from rectools.models import SASRecModel

    return transformers(SASRecModel, SASREC, train, item_ids, max_history_items, seed)


def hstu(train: Rows, item_ids: Sequence[str], max_history_items: int, seed: int) -> Paths:
    """HSTU of RecTools, without its attention over times, which not all datasets have; see [`transformers`]."""
    from rectools.models import HSTUModel

    def make(logits_t: float, **settings: Any) -> Any:  # cosines need a temperature, which is 1 by default
        return HSTUModel(relative_time_attention=False, lightning_module_kwargs={"logits_t": logits_t}, **settings)

    return transformers(make, HSTU, train, item_ids, max_history_items, seed)


def transformers(
    kind: Callable[..., Any],
    grid: dict[str, tuple],
    train: Rows,
    item_ids: Sequence[str],
    max_history_items: int,
    seed: int,
    max_epochs: int = MAX_EPOCHS,
) -> Paths:
    """
    Sequence models of RecTools, each as it stands after every few epochs.

    Args:
        kind (`Callable`):
            Makes the model.
        grid (`dict[str, tuple]`):
            Values of each setting.
        train ([`~datasets.Dataset`]), item_ids (`Sequence[str]`):
            Train rows and the catalogue.
        max_history_items (`int`):
            Newest purchases that are read; longer sequences are trained on in pieces.
        seed (`int`):
            Of weights and batches.
        max_epochs (`int`, *optional*, defaults to 100):
            Of each model.
    """
    popular = popularity(train, item_ids)
    index, counts = popular.index, popular.popularity
    sequences = train_sequences(positions(train, index), train["user_id"][:])
    dataset = _dataset([piece for one in sequences for piece in pieces(one, max_history_items + 1)])

    def path(settings: dict[str, Any]) -> Iterator[Tried]:
        seed_everything(seed, verbose=False)
        model = kind(session_max_len=max_history_items, deterministic=True, **_FIXED, **settings)
        for epochs in range(STEP_EPOCHS, max_epochs + 1, STEP_EPOCHS):
            model.fit_partial(dataset, STEP_EPOCHS, STEP_EPOCHS)
            known = model.data_preparator.get_known_item_ids().astype(np.int64)
            extra = model.data_preparator.n_item_extra_tokens
            frozen = deepcopy(model.torch_model).eval()
            score = partial(_session_scores, frozen, known, extra, max_history_items, len(index))
            answer = partial(_or_popularity, score, set(known.tolist()), counts)
            yield {**settings, "epochs": epochs}, ScoredBaseline(index, answer)

    from pytorch_lightning import seed_everything

    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    return map(path, grid_of(grid))


def text_neighbours(train: Rows, items: Any, encoder: str) -> Paths:
    """
    Items whose texts are nearest (cosine) to those of the newest purchases; the sentence encoder saw no purchase.

    Args:
        train ([`~datasets.Dataset`]), items ([`~datasets.Dataset`]):
            Train rows (popularity answers users without purchases) and the catalogue with its text columns.
        encoder (`str`):
            Name or folder of a sentence encoder.
    """
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(encoder)
    popular = popularity(train, items["item_id"][:])
    index, counts = popular.index, popular.popularity
    more = [
        name for name, kind in items.features.items() if kind.dtype == "string" and name not in ("item_id", "title")
    ]
    for fields in [("title",), ("title", *more)] if more else [("title",)]:
        texts = [
            ". ".join(text for text in row if text) for row in zip(*(items[name][:] for name in fields), strict=True)
        ]
        rows = model.encode(texts, normalize_embeddings=True, show_progress_bar=False)  # (N, d)
        for one in grid_of(TEXT):
            if one["history_items"] == 1 and one["decay"]:
                continue  # a single purchase has no order
            score = partial(_text_scores, rows, one["history_items"], one["decay"])
            baseline = ScoredBaseline(index, partial(_or_popularity, score, set(index.values()), counts))
            yield [({"fields": list(fields), **one}, baseline)]


def _dataset(sequences: list[list[int]]) -> Any:
    """Sequences as a RecTools dataset, a user each, a day a purchase."""
    import pandas as pd
    from rectools.dataset import Dataset

    frame = pd.DataFrame(
        {
            "user_id": np.repeat(np.arange(len(sequences)), [len(one) for one in sequences]),
            "item_id": [item for one in sequences for item in one],
            "weight": 1.0,
            "datetime": pd.to_datetime([day for one in sequences for day in range(len(one))], unit="D"),
        }
    )
    return Dataset.construct(frame)


def _or_popularity(
    score: Callable, known: set[int], counts: NDArray[np.int64], histories: list[list[int]]
) -> NDArray[np.float64]:
    """A model's scores; popularity for users of whose purchases it knows none."""
    kept = [[item for item in history if item in known] for history in histories]
    scores = np.tile(counts.astype(np.float64), (len(histories), 1))
    answered = [row for row, history in enumerate(kept) if history]
    if answered:
        scores[answered] = score([kept[row] for row in answered])
    return scores


def _spread(scores: NDArray, known: NDArray[np.int64], items: int) -> NDArray[np.float64]:
    """Scores of the known items as scores of all: the others tie below, since the model cannot tell them apart."""
    every = np.tile(scores.min(axis=1, keepdims=True) - 1.0, (1, items)).astype(np.float64)
    every[:, known] = scores
    return every


def _linear_scores(
    weight: NDArray, known: NDArray[np.int64], newest: int, items: int, histories: list[list[int]]
) -> NDArray[np.float64]:
    place = {item: row for row, item in enumerate(known.tolist())}
    scores = [weight[sorted({place[item] for item in history[-newest:]})].sum(axis=0) for history in histories]
    return _spread(np.stack(scores), known, items)


@torch.no_grad()
def _session_scores(
    model: Any, known: NDArray[np.int64], extra: int, length: int, items: int, histories: list[list[int]]
) -> NDArray[np.float64]:
    place = {item: row + extra for row, item in enumerate(known.tolist())}
    sessions = torch.zeros(len(histories), length, dtype=torch.int64)  # padded on the left, as in training
    for row, history in enumerate(histories):
        newest = [place[item] for item in history[-length:]]
        sessions[row, length - len(newest) :] = torch.tensor(newest)
    rows = model.item_model.get_all_embeddings()
    states = model.encode_sessions({"x": sessions}, rows)[:, -1, :]
    scores = model.similarity_module(states, rows)
    return _spread(scores[:, extra:].numpy(), known, items)


def _text_scores(rows: NDArray, newest: int, decay: float, histories: list[list[int]]) -> NDArray[np.float64]:
    users = []
    for history in histories:
        bought = history[: -newest - 1 : -1]  # newest first
        weights = np.arange(1, len(bought) + 1, dtype=np.float64) ** -decay
        users.append(weights @ rows[bought])
    return np.stack(users) @ rows.T
