"""What the server takes and gives, its limits, and what it counts."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StringConstraints

from r2ec_trl.errors import UserError

Id = Annotated[str, StringConstraints(min_length=1, max_length=512)]
Text = Annotated[str, StringConstraints(max_length=10_000)]
Value = Text | int | float | bool | None
Number = Annotated[float, Field(strict=True)]  # no "4", no true
Seconds = Annotated[float, Field(strict=True, ge=0, lt=2**33)]


@dataclass
class Limits:
    """What one request and all together may take."""

    window: float = field(default=0.005, metadata={"help": "Seconds that a batch's first user waits for others."})
    max_batch: int = field(default=32, metadata={"help": "Users answered together."})
    max_queue: int = field(default=256, metadata={"help": "Users that wait; more are refused with 429."})
    deadline: float = field(default=30.0, metadata={"help": "Seconds after which a request is given up with 504."})
    max_body: int = field(default=2**20, metadata={"help": "Bytes of a request; a longer one is refused with 413."})
    body_seconds: float = field(default=10.0, metadata={"help": "Seconds a request may take to arrive, else 408."})

    def __post_init__(self):
        for name, value in asdict(self).items():
            if not (0 < value < 2**40 or (name == "window" and value == 0)):
                raise UserError(f"`{name}` is {value}; give a number above 0.")


class Strict(BaseModel):
    """No unknown keys, no NaN: what is not understood is refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class User(Strict):
    """Purchases, oldest first: item ids, or titles, which may lie outside the catalogue; null is unknown."""

    user_id: Annotated[str, StringConstraints(max_length=512)] | StrictInt | None = None
    history: list[Id] | None = Field(None, max_length=1000, examples=[["i00012", "i00431"]])
    history_titles: list[Text] | None = Field(None, max_length=1000)
    history_ratings: list[Number | None] | None = Field(None, max_length=1000)
    history_timestamps: list[Seconds | None] | None = Field(None, max_length=1000)
    timestamp: Seconds | None = None


class RecommendRequest(Strict):
    """Users and the options that hold for all of them."""

    users: list[User] = Field(min_length=1, max_length=64)
    k: int = Field(10, strict=True, ge=1, le=1000)
    exclude_history: StrictBool = True
    reasoning: Text | None = Field(
        None, description="'full': the model reasons; 'none': it answers at once; else the reasoning itself."
    )
    where: str | None = Field(None, max_length=2000, examples=["price < 50"])
    allow: list[Id] | None = Field(None, max_length=10_000)
    exclude: list[Id] = Field([], max_length=10_000)

    def asks(self) -> list[dict[str, Any]]:
        """Arguments of [`~r2ec_trl.serving.recommender.Recommender.prepare`], a dict a user."""
        options = self.model_dump(exclude={"users"})
        users = [user.model_dump(exclude_none=True) for user in self.users]
        return [{"history": user, "name": number, **options} for number, user in enumerate(users)]


class Item(Strict):
    """One recommended item."""

    item_id: str
    title: str
    score: float


class Answer(BaseModel):
    """What one user gets; `timings` are seconds, and the users that were answered together."""

    items: list[Item]
    reasoning: str
    has_marker: bool
    reasoning_tokens: int
    user_id: str | None
    timings: dict[str, float]


class RecommendResponse(BaseModel):
    """In the order of the request's users; `price` says what leaving the reasoning out costs, where it was."""

    users: list[Answer]
    price: str | None = None


class Ready(BaseModel):
    """What is answered when a request does not say, and what leaving the reasoning out costs."""

    status: str
    reasoning: str
    price: str


class ItemRows(Strict):
    """Rows of the catalogue: `item_id`, `title` and any of its columns."""

    items: list[dict[Id, Value | list[Text]]] = Field(min_length=1, max_length=1000)


class Changed(BaseModel):
    """How large the catalogue is now, and how many items were encoded for it."""

    num_items: int
    encoded: int


class FoundItem(BaseModel):
    """An item of the catalogue."""

    item_id: str
    title: str


class Failure(BaseModel):
    """What is wrong, in one sentence."""

    error: str


ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"model": Failure} for code in (400, 401, 403, 408, 413, 422, 429, 500, 503, 504)
}


class Metrics:
    """What `/metrics` shows."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        on: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("r2ec_requests_total", "Requests.", ("path", "status"), **on)
        self.seconds = Histogram("r2ec_request_seconds", "Time to the end of the answer.", ("path",), **on)
        self.batch = Histogram("r2ec_batch_users", "Users a batch.", buckets=(1, 2, 4, 8, 16, 32, 64, 128), **on)
        self.batch_seconds = Histogram("r2ec_batch_seconds", "Time a batch took.", **on)
        self.users = Counter("r2ec_users_total", "Users answered.", **on)
        self.tokens = Counter("r2ec_reasoning_tokens_total", "Reasoning tokens written.", **on)
        self.waiting = Gauge("r2ec_waiting_users", "Users in the queue.", **on)
        self.items = Gauge("r2ec_catalogue_items", "Items that can be recommended.", **on)

    def of_batch(self, users: int, tokens: int, seconds: float) -> None:
        """Count a batch."""
        self.batch.observe(users)
        self.batch_seconds.observe(seconds)
        self.users.inc(users)
        self.tokens.inc(tokens)

    def of_request(self, path: str, status: int, seconds: float) -> None:
        """Count a request."""
        self.requests.labels(path, status).inc()
        self.seconds.labels(path).observe(seconds)


def reasoning_price(metrics: Mapping[str, Any]) -> str:
    """What leaving the reasoning out costs in NDCG@10, from the figures that a bundle holds."""
    found = {}
    for report in metrics.values():  # the later ones count, "after" over "before"
        try:
            found[report["protocol"]["settings"]["reasoning"]] = report["unmasked"]["model"]["ndcg@10"]["value"]
        except (KeyError, TypeError):
            continue
    if {"full", "none"} <= set(found):
        return f"NDCG@10 on the test split is {found['full']:.3f} with reasoning and {found['none']:.3f} without."
    return (
        "The bundle does not hold figures with and without reasoning; `recipes/evaluate.py --bundle BUNDLE "
        "--dataset DATASET --reasoning full none --record` measures what it costs."
    )
