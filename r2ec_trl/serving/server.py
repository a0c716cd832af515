"""A recommender over HTTP: answers in batches, reasonings as they are written, a catalogue that changes meanwhile."""

import asyncio
import contextlib
import json
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Mapping
from functools import partial
from typing import Annotated, Any

import polars as pl
from fastapi import Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from r2ec_trl.errors import UserError
from r2ec_trl.serving.batching import Batcher, Job, Refused, Writer
from r2ec_trl.serving.guard import Guard
from r2ec_trl.serving.messages import (
    ERRORS,
    Changed,
    FoundItem,
    Id,
    ItemRows,
    Limits,
    Metrics,
    Ready,
    RecommendRequest,
    RecommendResponse,
    reasoning_price,
)
from r2ec_trl.serving.recommender import Recommendation, Recommender

logger = logging.getLogger(__name__)

TOKEN_VARIABLE = "R2EC_TRL_TOKEN"


def make_app(
    recommender: Recommender,
    limits: Limits | None = None,
    token: str | None = None,
    mount: Callable[..., FastAPI] | None = None,
    writer: Writer | None = None,
) -> Guard:
    """
    The server as an ASGI application.

    Args:
        recommender ([`~r2ec_trl.serving.recommender.Recommender`]):
            Answers; from here on only the application may use it.
        limits ([`Limits`], *optional*):
            Sizes and times.
        token (`str`, *optional*):
            Who sends it as a bearer token may change the catalogue; without one nobody may.
        mount (`Callable`, *optional*):
            Adds a page to the application.
        writer ([`~r2ec_trl.serving.batching.Writer`], *optional*):
            Writes the reasonings in the recommender's place; ended with the application.
    """
    limits, metrics = limits or Limits(), Metrics()
    batcher = Batcher(recommender, limits.max_batch, limits.window, limits.max_queue, metrics.of_batch, writer)
    metrics.waiting.set_function(lambda: batcher.waiting)
    metrics.items.set_function(lambda: len(recommender.bundle.items))

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(batcher.close)  # what is waiting is answered first

    app = FastAPI(
        title="r2ec_trl", description=(__doc__ or "").strip(), lifespan=lifespan, responses=ERRORS, redoc_url=None
    )
    _handle_errors(app)
    _add_answers(app, batcher, limits)
    _add_catalogue(app, batcher, token)
    _add_state(app, batcher, metrics)
    if mount is not None:
        app = mount(app, batcher)
    return Guard(app, limits.max_body, limits.body_seconds, limits.deadline, metrics.of_request)


def _failure(status: int, sentence: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    sentence = " ".join(sentence.split())[:1000].encode("utf-8", "backslashreplace").decode()
    return JSONResponse({"error": sentence}, status, headers)


def _failure_of(error: BaseException) -> JSONResponse:
    """Status and sentence of an error."""
    if isinstance(error, Refused):
        after = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
        return _failure(error.status, str(error), after)
    if isinstance(error, UserError):
        return _failure(422, str(error))
    logger.error("A request failed.", exc_info=error)
    sentence = f"The server failed ({type(error).__name__}); its log says where."
    return _failure(500, sentence, {"Connection": "close"})  # as uvicorn does; unsaid, the next request meets that


def _handle_errors(app: FastAPI) -> None:
    async def invalid(request: Request, error: Any) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return _failure(400, f"The body is no JSON: {first.get('ctx', {}).get('error', first['msg'])}.")
        return _failure(422, f"{'.'.join(map(str, first['loc']))}: {first['msg']}.")

    async def http(request: Request, error: Any) -> JSONResponse:
        return _failure(error.status_code, f"{str(error.detail).rstrip('.')}.", error.headers)

    async def other(request: Request, error: Exception) -> JSONResponse:
        return _failure_of(error)

    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    for kind in (Refused, UserError, Exception):
        app.add_exception_handler(kind, other)


def _add_answers(app: FastAPI, batcher: Batcher, limits: Limits) -> None:
    @app.post("/v1/recommend", response_model=RecommendResponse)
    async def recommend(body: RecommendRequest, request: Request) -> Any:
        """Recommend items to one or many users, with the reasoning beside them."""
        jobs = batcher.submit(body.asks(), limits.deadline)
        _end_in_time(jobs, limits.deadline)
        results = await _results(jobs, request)
        pairs = zip(results, jobs)
        answer: dict[str, Any] = {"users": [{**result.to_dict(), "timings": job.timings} for result, job in pairs]}
        meta = batcher.recommender.bundle.meta
        if (meta.protocol.reasoning if body.reasoning is None else body.reasoning) == "none":
            answer["price"] = reasoning_price(meta.metrics)
        return JSONResponse(answer)

    @app.post("/v1/recommend/stream", response_class=StreamingResponse)
    async def stream(body: RecommendRequest, request: Request) -> Any:
        """
        The same as server-sent events: `reasoning` with each new piece of text, then `items` with the whole answer,
        for every user by number; `error` where one fails.
        """
        loop, events = asyncio.get_running_loop(), asyncio.Queue[tuple[str, int, Any]]()

        def tell(kind: str, number: int, value: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(events.put_nowait, (kind, number, value))

        count = len(body.users)
        jobs = batcher.submit(body.asks(), limits.deadline, [partial(tell, "reasoning", i) for i in range(count)])
        _end_in_time(jobs, limits.deadline)
        for number, job in enumerate(jobs):
            job.future.add_done_callback(partial(tell, "items", number))
        first: asyncio.Future[Any] = asyncio.ensure_future(events.get())
        left: asyncio.Future[Any] = asyncio.ensure_future(_left(request))
        try:
            await asyncio.wait([first, left], return_when=asyncio.FIRST_COMPLETED)
        except BaseException:
            _leave(jobs)
            raise
        finally:
            first.cancel()  # nothing, if it is done
            left.cancel()
        if not first.done():  # the client left
            _leave(jobs)
            return Response(status_code=499)
        kind, _, value = first.result()
        if kind == "items" and (error := value.exception()) is not None:
            _leave(jobs)  # nothing is sent yet: the status can still say it
            return _failure_of(error)
        return StreamingResponse(_events(first.result(), events, jobs), media_type="text/event-stream")


async def _events(first: tuple[str, int, Any], events: "asyncio.Queue[Any]", jobs: list[Job]) -> AsyncIterator[str]:
    """Server-sent events, until every job has ended or the client leaves."""
    open_jobs, event = len(jobs), first
    try:
        while True:
            kind, number, value = event
            data: dict[str, Any] = {"user": number}
            if kind == "reasoning":
                data["text"] = value
            else:
                open_jobs -= 1
                if (error := value.exception()) is not None:
                    kind, data = "error", data | json.loads(bytes(_failure_of(error).body))
                else:
                    data |= {**value.result().to_dict(), "timings": jobs[number].timings}
            yield f"event: {kind}\ndata: {json.dumps(data)}\n\n"
            if not open_jobs:
                return
            event = await events.get()
    finally:
        _leave(jobs)


def _end_in_time(jobs: list[Job], seconds: float) -> None:
    """Let the deadline end them even while the model's thread is busy with others."""
    asyncio.get_running_loop().call_later(seconds + 0.01, lambda: [job.over() for job in jobs])


def _leave(jobs: list[Job]) -> None:
    for job in jobs:
        job.future.cancel()


async def _results(jobs: list[Job], request: Request) -> list[Recommendation]:
    """Answers of all jobs; an error or a client that leaves (nothing, then) ends all of them."""
    answers = asyncio.gather(*(asyncio.wrap_future(job.future) for job in jobs))
    left = asyncio.ensure_future(_left(request))
    try:
        waits: list[asyncio.Future[Any]] = [answers, left]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        return answers.result() if answers.done() else []
    finally:
        left.cancel()
        answers.cancel()
        _leave(jobs)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _add_catalogue(app: FastAPI, batcher: Batcher, token: str | None) -> None:
    bundle = batcher.recommender.bundle
    lowered: dict[str, Any] = {"of": None}

    def authorised(request: Request) -> None:
        if not token:
            raise HTTPException(403, f"Changes are off; start the server with {TOKEN_VARIABLE} in its environment.")
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not secrets.compare_digest(given.strip().encode("latin-1"), token.encode()):
            raise HTTPException(401, "This needs the right bearer token.", {"WWW-Authenticate": "Bearer"})

    async def change(function: Callable[[], Any]) -> Changed:
        """On the model's thread; shielded: a change that has begun ends whole, whoever leaves."""
        encoded = await asyncio.shield(asyncio.wrap_future(batcher.call(function)))
        return Changed(num_items=len(bundle.items), encoded=encoded)

    def rows(body: ItemRows) -> list[dict[str, Any]]:
        return [dict(row) for row in body.items]

    @app.get("/v1/items", response_model=list[FoundItem])
    def search_items(
        search: Annotated[str, Query(max_length=200)] = "", limit: Annotated[int, Query(ge=1, le=1000)] = 20
    ) -> Any:
        """Items whose title contains the words as they stand, or whose id is that."""
        items = bundle.items
        if lowered["of"] is not items:
            columns = {name: items[name][:] for name in ("item_id", "title")}
            lowered.update(frame=pl.DataFrame(columns).with_columns(low=pl.col("title").str.to_lowercase()), of=items)
        frame: pl.DataFrame = lowered["frame"]
        found = pl.col("low").str.contains(search.lower(), literal=True) | (pl.col("item_id") == search)
        return frame.lazy().filter(found).head(limit).select("item_id", "title").collect().to_dicts()

    allowed = [Depends(authorised)]

    @app.post("/v1/items", response_model=Changed, status_code=201, dependencies=allowed)
    async def add_items(body: ItemRows) -> Any:
        """Add items; once this answers they are on disk and recommended."""

        def add() -> int:
            bundle.add_items(rows(body))
            return len(body.items)

        return await change(add)

    @app.put("/v1/items", response_model=Changed, dependencies=allowed)
    async def update_items(body: ItemRows) -> Any:
        """Change columns of items that are there."""
        return await change(lambda: bundle.update_items(rows(body)))

    @app.delete("/v1/items", response_model=Changed, dependencies=allowed)
    async def remove_items(item_id: Annotated[list[Id], Query(max_length=1000)]) -> Any:
        """Take items out of the catalogue."""

        def remove() -> int:
            bundle.remove_items(item_id)
            return 0

        return await change(remove)


def _add_state(app: FastAPI, batcher: Batcher, metrics: Metrics) -> None:
    @app.get("/healthz", response_model=dict[str, str])
    async def health() -> Any:
        """200 while the model's thread lives."""
        return {"status": "alive"} if batcher.alive else _failure(503, "The model's thread has ended.")

    @app.get("/readyz", response_model=Ready)
    async def ready() -> Any:
        """200 while there is room in the queue; with it, what is answered by default and what no reasoning costs."""
        if not batcher.alive:
            return _failure(503, "The model's thread has ended.")
        if batcher.waiting >= batcher.max_queue:
            return _failure(503, "The queue is full.")
        meta = batcher.recommender.bundle.meta
        return Ready(status="ready", reasoning=meta.protocol.reasoning, price=reasoning_price(meta.metrics))

    @app.get("/metrics", response_class=Response)
    async def show_metrics() -> Any:
        """For Prometheus."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)
