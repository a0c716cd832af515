"""A generated shop for the demo: customers set up an instrument step by step, so good reasoning can be *known*.

Everything here is synthetic. A customer sets up one instrument (the project's *family*) and buys its accessories in
the order of `STAGES`, mostly of one liked brand, in any colour; stray purchases lie in between. The next purchase is
the project's next stage, except for some stray ones. Ratings and times are drawn apart from all this and carry no
signal. Because the world is ours, `oracle_ranks` can say what the best possible scorer would reach and
`right_reasoning` whether a reasoning names the right family and stage.
"""

import itertools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, Features, List, Value

from r2ec_trl.errors import UserError

FAMILIES = ("guitar", "banjo", "ukulele", "mandolin", "violin", "cello")
STAGES = ("strings", "tuner", "strap", "stand", "case")  # the order in which every project buys
BRANDS = ("fenta", "orrin", "velka", "tamro", "luxen")
COLOURS = ("blue", "red", "black", "white")

DEMO_POLICY = Path(__file__).parents[1] / "demo_policy"  # made by recipes/make_demo_policy.py
DEMO_SETTINGS: dict[str, Any] = {  # of PromptConfig, with few tokens: the demo runs on a laptop
    "category": "instrument accessory",
    "user_template": "Purchases:\n{history}\nWhat is next?",
    "item_template": "{fields}",
    "item_fields": ("title",),
    "max_history_items": 8,
    "max_prompt_length": 128,
    "max_item_length": 32,
    "use_ratings": False,
    "use_times": False,
}

_STREAMS = {"policy": 0, "train": 1, "validation": 2, "test": 3}  # a random stream each, so that users are all apart
_USER_FEATURES = Features(
    {
        "user_id": Value("string"),
        "history": List(Value("string")),
        "target": Value("string"),
        "history_ratings": List(Value("float64")),
        "history_timestamps": List(Value("int64")),
        "timestamp": Value("int64"),
        "true_family": Value("string"),
        "true_stage": Value("string"),
        "true_brand": Value("string"),
        "true_strays": List(Value("int64")),
    }
)
_FAMILY_CLAIM = re.compile(r"the project is (\w+)")
_STAGE_CLAIM = re.compile(r"the next step is (\w+)")


@dataclass(frozen=True)
class DemoWorld:
    """
    The probabilities of the generated shop.

    Args:
        brand_loyalty (`float`, *optional*, defaults to `0.85`):
            Probability that a project purchase is of the liked brand; the other brands share the rest equally.
        stray_target (`float`, *optional*, defaults to `0.1`):
            Probability that the target is any item of the shop instead of the project's next stage.
        stray_counts (`tuple[float, ...]`, *optional*, defaults to `(0.2, 0.5, 0.3)`):
            Probability of 0, 1, 2, ... stray purchases in a history, each any item of the shop, at any position.
    """

    brand_loyalty: float = 0.85
    stray_target: float = 0.1
    stray_counts: tuple[float, ...] = (0.2, 0.5, 0.3)

    def __post_init__(self) -> None:
        probabilities = (self.brand_loyalty, self.stray_target, *self.stray_counts)
        if not all(0 <= value <= 1 for value in probabilities) or not math.isclose(sum(self.stray_counts), 1):
            raise UserError(
                f"{self} holds a value that is no probability, or stray_counts that do not sum to 1; mend these."
            )

    def brand_probabilities(self) -> np.ndarray:
        """Probability of each bought brand (columns) given the liked one (rows)."""
        other = (1 - self.brand_loyalty) / (len(BRANDS) - 1)
        return np.where(np.eye(len(BRANDS), dtype=bool), self.brand_loyalty, other)


def demo_items() -> Dataset:
    """The 600 items, one for each family, stage, brand and colour, in this order (the colour changes fastest)."""
    rows = []
    for number, (family, stage, brand, colour) in enumerate(itertools.product(FAMILIES, STAGES, BRANDS, COLOURS)):
        rows.append(
            {
                "item_id": f"d{number:03d}",
                "title": f"{brand} {colour} {family} {stage}",
                "description": f"{colour} {stage} for the {family} , made by {brand} .",
                "family": family,
                "stage": stage,
                "brand": brand,
                "colour": colour,
            }
        )
    return Dataset.from_list(rows)


def _item_number(family: int, stage: int, brand: int, colour: int) -> int:
    return ((family * len(STAGES) + stage) * len(BRANDS) + brand) * len(COLOURS) + colour


def _item_attributes(item_id: str) -> tuple[int, int, int]:
    """Family, stage and brand of an item, read from its number."""
    family, stage, brand, _ = np.unravel_index(
        int(item_id[1:]), (len(FAMILIES), len(STAGES), len(BRANDS), len(COLOURS))
    )
    return int(family), int(stage), int(brand)


def _draw_user(user_id: str, world: DemoWorld, brand_probabilities: np.ndarray, rng: np.random.Generator) -> dict:
    family, liked = int(rng.integers(len(FAMILIES))), int(rng.integers(len(BRANDS)))
    done = int(rng.integers(1, len(STAGES)))  # project purchases so far: the next stage is STAGES[done]
    strays = int(rng.choice(len(world.stray_counts), p=world.stray_counts))

    def project_item(stage: int) -> int:
        brand = int(rng.choice(len(BRANDS), p=brand_probabilities[liked]))
        return _item_number(family, stage, brand, int(rng.integers(len(COLOURS))))

    def stray_item() -> int:
        return int(rng.integers(len(FAMILIES) * len(STAGES) * len(BRANDS) * len(COLOURS)))

    stray_positions = set(rng.choice(done + strays, size=strays, replace=False).tolist())
    stages = iter(range(done))
    history = [stray_item() if i in stray_positions else project_item(next(stages)) for i in range(done + strays)]
    target = stray_item() if rng.random() < world.stray_target else project_item(done)
    times = (
        1_600_000_000
        + int(rng.integers(365 * 86_400))
        + np.cumsum(rng.integers(3_600, 40 * 86_400, done + strays + 1))
    )
    return {
        "user_id": user_id,
        "history": [f"d{number:03d}" for number in history],
        "target": f"d{target:03d}",
        "history_ratings": rng.integers(3, 6, len(history)).astype(float).tolist(),
        "history_timestamps": times[:-1].tolist(),
        "timestamp": int(times[-1]),
        "true_family": FAMILIES[family],
        "true_stage": STAGES[done],
        "true_brand": BRANDS[liked],
        "true_strays": sorted(stray_positions),
    }


def demo_users(split: str, count: int, seed: int = 0, world: DemoWorld | None = None) -> Dataset:
    """
    Draw the users of one split.

    Args:
        split (`str`):
            `"train"`, `"validation"`, `"test"`, or `"policy"`: the users that only make the demo policy. Each has a
            random stream and user ids of its own.
        count (`int`):
            Number of users.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the shop.
        world ([`DemoWorld`], *optional*):
            Probabilities of the shop.

    Returns:
        `datasets.Dataset`: one row a user. The columns `true_family`, `true_stage`, `true_brand` (what the customer is
        up to) and `true_strays` (the positions of stray purchases in the history) are hidden from the policy.
    """
    if split not in _STREAMS:
        raise UserError(f"The demo has no split {split!r}; choose one of {', '.join(_STREAMS)}.")
    world = world or DemoWorld()
    rng = np.random.default_rng([seed, _STREAMS[split]])
    brand_probabilities = world.brand_probabilities()
    return Dataset.from_list(
        [_draw_user(f"{split}-{number:05d}", world, brand_probabilities, rng) for number in range(count)],
        features=_USER_FEATURES,
    )


def make_demo(
    seed: int = 0,
    world: DemoWorld | None = None,
    train_users: int = 2000,
    validation_users: int = 200,
    test_users: int = 500,
) -> tuple[DatasetDict, dict[str, Any]]:
    """
    Generate the demo's dataset and its card, ready for [`~r2ec_trl.data.schema.save_dataset_folder`].

    Args:
        seed (`int`, *optional*, defaults to `0`):
            Seed of the users; the catalogue is always the same.
        world ([`DemoWorld`], *optional*):
            Probabilities of the shop.
        train_users, validation_users, test_users (`int`, *optional*):
            Users in each split. All splits, and the users that made the demo policy, are drawn apart.

    Returns:
        `tuple[datasets.DatasetDict, dict]`: the dataset (`train`, `validation`, `test`, `items`) and its card.
    """
    world = world or DemoWorld()
    counts = {"train": train_users, "validation": validation_users, "test": test_users}
    dataset = DatasetDict({split: demo_users(split, count, seed, world) for split, count in counts.items()})
    dataset["items"] = demo_items()
    card = {
        "source": "generated by r2ec_trl.data.demo",
        "category": DEMO_SETTINGS["category"],
        "category_plural": "instrument accessories",
        "dropped": {},
        "split_rule": "users of each split drawn apart from a random stream of its own",
        "synthetic": True,
        "seed": seed,
        "world": asdict(world) | {"stray_counts": list(world.stray_counts)},
    }
    return dataset, card


def next_item_probabilities(history: list[str], world: DemoWorld | None = None) -> np.ndarray:
    """
    The generator's exact probability of each item being the target, given the history.

    Sums over everything hidden: which purchases belong to the project (every choice of positions whose items are of
    one family and in the order of the stages) and the liked brand. A stray purchase is any item with equal
    probability, so a choice of `m` project positions among `L` weighs `P(L - m strays) / C(L, m)` times the
    probability of its items.

    Args:
        history (`list[str]`):
            Item ids, oldest first.
        world ([`DemoWorld`], *optional*):
            Probabilities of the shop that drew the history.

    Returns:
        `np.ndarray` of shape `(600,)`, float64, in the order of [`demo_items`]; sums to 1.
    """
    world = world or DemoWorld()
    brand_probabilities = world.brand_probabilities()
    length, attributes = len(history), [_item_attributes(item_id) for item_id in history]
    shape = (len(FAMILIES), len(STAGES), len(BRANDS), len(COLOURS))
    next_purchase = np.zeros(shape)  # unnormalised, the project's next stage alone
    for done in range(max(1, length - len(world.stray_counts) + 1), min(length, len(STAGES) - 1) + 1):
        prior = world.stray_counts[length - done] / math.comb(length, done)
        for chosen in itertools.combinations(attributes, done):
            families = {family for family, _, _ in chosen}
            if len(families) > 1 or any(stage != place for place, (_, stage, _) in enumerate(chosen)):
                continue
            # Against a stray purchase (1 item of 600), a project purchase is one of its colours and brands.
            ratio = (math.prod(shape) / len(COLOURS)) ** done
            liked = np.prod(brand_probabilities[:, [brand for _, _, brand in chosen]], axis=1)
            next_brand = prior * ratio * (liked @ brand_probabilities)  # (brands,)
            next_purchase[families.pop(), done] += next_brand[:, None] / len(COLOURS)
    if not next_purchase.any():
        raise UserError(f"The history {history} cannot come from the demo's shop; give one that demo_users drew.")
    expected = (1 - world.stray_target) * next_purchase / next_purchase.sum()
    return (expected + world.stray_target / expected.size).ravel()


def oracle_ranks(
    rows: Iterable[Mapping[str, Any]], world: DemoWorld | None = None, masked: bool = False
) -> np.ndarray:
    """
    Rank of each row's target under the exact posterior of the generator: the best that any scorer can do on average.

    Ties (the colours of one product, say) are broken by the order of the catalogue, which the generator knows nothing
    of: an honest scorer's guess, so that the mean metric is that of a best possible ranking.

    Args:
        rows (`Iterable[Mapping]`):
            Rows with `history` and `target`, such as a split of [`make_demo`].
        world ([`DemoWorld`], *optional*):
            Probabilities of the shop that drew the rows.
        masked (`bool`, *optional*, defaults to `False`):
            Leave each row's purchases out; a target among them is ranked last plus one.

    Returns:
        `np.ndarray` of shape `(rows,)`, int64: 1-based ranks among the 600 items.
    """
    ranks = []
    for row in rows:
        scores, target = next_item_probabilities(row["history"], world), int(row["target"][1:])
        # Sums in another order differ in the last bits; what is equal on paper must tie.
        scores = np.round(scores, 12)
        if masked and row["target"] in row["history"]:
            ranks.append(len(scores) + 1)
            continue
        if masked:
            scores[[int(item[1:]) for item in row["history"]]] = -1.0
        ranks.append(1 + np.sum(scores > scores[target]) + np.sum(scores[:target] == scores[target]))
    return np.array(ranks, dtype=np.int64)


def write_reasoning(family: str, stage: str, brand: str) -> str:
    """The demo's way of reasoning, as the policy is taught it and as [`right_reasoning`] reads it."""
    return f"the project is {family} . the next step is {stage} . the brand is {brand} ."


def right_reasoning(reasoning: str, example: Mapping[str, Any]) -> dict[str, bool]:
    """
    Judge a reasoning by what the generator knows: does it name the customer's family, and the project's next stage?

    The truth is the customer's project also where the target is a stray purchase. A reasoning that names none, or
    several different ones, is not right.

    Args:
        reasoning (`str`):
            Text of a rollout.
        example (`Mapping`):
            Row of the demo with `true_family` and `true_stage`.

    Returns:
        `dict[str, bool]`: `family` and `stage`.

    Example:

    >>> text = write_reasoning("guitar", "strap", "fenta")
    >>> right_reasoning(text, {"true_family": "guitar", "true_stage": "stand"})
    {'family': True, 'stage': False}
    """
    return {
        "family": set(_FAMILY_CLAIM.findall(reasoning)) == {example["true_family"]},
        "stage": set(_STAGE_CLAIM.findall(reasoning)) == {example["true_stage"]},
    }


def __getattr__(name: str) -> Any:
    """`DEMO_PROMPTS`, the settings as the room above takes them."""
    if name != "DEMO_PROMPTS":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module("r2ec_trl.policy.prompts").PromptConfig(**DEMO_SETTINGS)
