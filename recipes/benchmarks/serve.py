"""
The server under load: open-loop arrivals at shares of its capacity and above, reasoning on and off, batch sizes. On a
machine with other work only the server's CPU time a user means much.
"""

from __future__ import annotations

import asyncio
import os
import random
import socket
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterator

import httpx
from benchmarks.timing import header

from r2ec_trl.bundle.bundle import Bundle
from r2ec_trl.cli.parsing import parse
from r2ec_trl.errors import UserError

SERVE = Path(__file__).parents[1] / "serve.py"


@dataclass
class ServeArguments:
    """How long, and how much."""

    bundle: str = field(default="outputs/demo/bundle", metadata={"help": "Bundle folder."})
    seconds: float = field(default=15.0, metadata={"help": "Length of each load."})
    shares: list[float] = field(
        default_factory=lambda: [0.25, 0.5, 0.9, 2.0], metadata={"help": "Rates as shares of the measured capacity."}
    )
    batches: list[int] = field(default_factory=lambda: [1, 32], metadata={"help": "Values of --max_batch."})
    reasoning: list[str] = field(default_factory=lambda: ["full", "none"], metadata={"help": "Modes."})
    deadline: float = field(default=30.0, metadata={"help": "The server's --deadline."})
    probe: int = field(default=128, metadata={"help": "Requests, all at once, that measure the capacity."})
    most: int = field(default=20_000, metadata={"help": "Most requests of one load."})


@contextmanager
def server(bundle: str, max_batch: int, deadline: float) -> Iterator[tuple[str, int]]:
    """A server in a process of its own: its address and process id."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["--bundle", bundle, "--port", str(port), "--max_batch", str(max_batch), "--page", "false"]
    words += ["--deadline", str(deadline)]
    process = subprocess.Popen([sys.executable, str(SERVE), *words], stderr=subprocess.DEVNULL)
    try:
        address, end = f"http://127.0.0.1:{port}", time.monotonic() + 120
        while True:
            try:
                httpx.get(f"{address}/readyz").raise_for_status()
                break
            except httpx.HTTPError as error:
                if process.poll() is not None or time.monotonic() > end:
                    raise UserError(f"recipes/serve.py --bundle {bundle} did not start; run it to see why.") from error
                time.sleep(0.2)
        yield address, process.pid
    finally:
        process.terminate()
        process.wait()


async def load(address: str, bodies: list[dict[str, Any]], rate: float | None) -> dict[str, Any]:
    """Send each body, at random moments with this rate a second whatever the answers do; all at once without one."""
    draw, taken, statuses = random.Random(0), [], Counter[Any]()
    limits, gate = httpx.Limits(max_connections=1000), asyncio.Semaphore(64 if rate is None else 10**6)

    async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> None:
        async with gate:
            start = time.perf_counter()
            try:
                status: Any = (await client.post("/v1/recommend", json=body)).status_code
            except httpx.HTTPError as error:
                status = type(error).__name__
            statuses[status] += 1
            if status == 200:
                taken.append(time.perf_counter() - start)

    async with httpx.AsyncClient(base_url=address, timeout=600, limits=limits) as client:
        start, due, tasks = time.perf_counter(), 0.0, []
        for body in bodies:
            if rate is not None:
                due += draw.expovariate(rate)
                await asyncio.sleep(max(0.0, start + due - time.perf_counter()))
            tasks.append(asyncio.create_task(ask(client, body)))
        await asyncio.gather(*tasks)
        seconds = time.perf_counter() - start
    taken.sort()
    quantiles = {f"p{q}_ms": round(1000 * taken[min(len(taken) - 1, q * len(taken) // 100)], 1) for q in (50, 95, 99)}
    answers = {
        "answered": len(taken),
        "users_a_second": round(len(taken) / seconds, 1),
        **(quantiles if taken else {}),
    }
    refused = statuses.pop(429, 0)
    return {**answers, "refused": refused, "failed": sum(statuses.values()) - len(taken)}


def cpu_seconds(process: int) -> float:
    """CPU time of the server so far: what other work on the machine does not stretch."""
    times = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK")


def memory(process: int) -> float:
    """Resident memory in MiB."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)


def run(words: list[str]) -> dict[str, Any]:
    """The case, from its command line."""
    [args] = parse((ServeArguments,), words, description=__doc__)
    ids = Bundle.load(args.bundle, device="cpu").table.item_ids
    draw, rows = random.Random(0), []
    for max_batch in args.batches:
        with server(args.bundle, max_batch, args.deadline) as (address, process):
            for mode in args.reasoning:

                def bodies(count: float) -> list[dict[str, Any]]:
                    sizes = [draw.randint(1, 8) for _ in range(max(8, min(args.most, round(count))))]
                    return [{"users": [{"history": draw.sample(ids, size)}], "reasoning": mode} for size in sizes]

                asyncio.run(load(address, bodies(min(32, args.probe)), None))  # warms up
                capacity = asyncio.run(load(address, bodies(args.probe), None))["users_a_second"]
                for share in args.shares:
                    rate, spent = share * capacity, cpu_seconds(process)
                    result = asyncio.run(load(address, bodies(rate * args.seconds), rate))
                    answered = result.pop("answered")
                    result["cpu_ms_a_user"] = round(1000 * (cpu_seconds(process) - spent) / max(1, answered), 1)
                    start = time.perf_counter()
                    again = httpx.post(f"{address}/v1/recommend", json=bodies(1)[0], timeout=600).is_success
                    took = round(1000 * (time.perf_counter() - start), 1) if again else None
                    after = {"after_ms": took, "mib": memory(process)}
                    row = {"reasoning": mode, "max_batch": max_batch, "capacity": capacity, "share": share}
                    rows.append({**row, "offered": round(rate, 1), **result, **after})
                    print(rows[-1], file=sys.stderr)
    return {"comparisons": [], "loads": rows, "load_of_machine": header()["load"]}
