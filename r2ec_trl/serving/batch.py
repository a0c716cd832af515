"""Recommend for a file of any length: shared out over processes, in whole parts, and it goes on where it stopped."""

import hashlib
import itertools
import json
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import torch
import xxhash
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from r2ec_trl import progress
from r2ec_trl.bundle.bundle import Bundle
from r2ec_trl.bundle.meta import read_json
from r2ec_trl.data.fingerprint import sha256_of
from r2ec_trl.data.schema import arrow_batches
from r2ec_trl.data.sources.delimited import is_index, named_columns, open_parquet
from r2ec_trl.data.sources.jsonl import refuse_no_text
from r2ec_trl.errors import UserError
from r2ec_trl.files import remove_leftovers, write_json, write_with
from r2ec_trl.serving.recommender import Question, Recommendation, Recommender

PLAN_FILE, SUMMARY_FILE, PART_FILE = "plan.json", "summary.json", "part-{:06d}.parquet"
SCHEMA: dict[str, Any] = {
    "row": pl.Int64,
    "user_id": pl.String,
    "item_ids": pl.List(pl.String),
    "scores": pl.List(pl.Float32),
    "reasoning": pl.String,
    "has_marker": pl.Boolean,
    "reasoning_tokens": pl.Int64,
    "error": pl.String,
}


def recommend_file(
    recommender: Recommender, source: str, folder: str, part_users: int = 1000, **options: Any
) -> dict[str, Any]:
    """
    Recommend for every user of a file. Call it on every process; each takes whole parts of `part_users` users, and
    holds one of them in memory. A part is written whole or not at all, and what a part holds does not depend on the
    processes: a run that was killed goes on with any number of them and gives what it would have given.

    Args:
        recommender ([`~r2ec_trl.serving.recommender.Recommender`]):
            The same on every process.
        source (`str`):
            JSON lines, or Parquet with a user's keys as columns; see
            [`~r2ec_trl.serving.recommender.Recommender.recommend`].
        folder (`str`):
            Gets `part-*.parquet` (a row a user: its row in `source`, items, scores, reasoning, or the sentence that
            says why there is none), `plan.json` and, at the end, `summary.json`. All processes must see it.
        part_users (`int`, *optional*, defaults to `1000`):
            Users a part.
        options:
            Further arguments of [`~r2ec_trl.serving.recommender.Recommender.prepare`].

    Returns:
        `dict`: users, those answered now, errors, seconds, users and reasoning tokens a second.
    """
    if part_users < 1:
        raise UserError(f"`part_users` is {part_users}; give 1 at least.")
    state, start, target = Accelerator(), time.monotonic(), Path(folder)
    plan, missing = _plan(recommender, Path(source), target, part_users, options, state)
    mine = set(missing[state.process_index :: state.num_processes])
    parts = -(-plan["users"] // part_users)
    users = tokens = errors = 0
    progress.report("users", min(plan["users"], _parts_in(target) * part_users), plan["users"])
    for number, rows in _chunks(Path(source), part_users, mine):
        progress.watch(_quiet)  # the users are the progress, not the tokens within a part
        try:
            frame = _answer(recommender, rows, number * part_users, options)
        finally:
            progress.unwatch(_quiet)
        write_with(target / PART_FILE.format(number), lambda scratch: frame.write_parquet(scratch))
        users, errors = users + frame.height, errors + frame["error"].count()
        tokens += int(frame["reasoning_tokens"].sum())
        progress.report("users", min(plan["users"], _parts_in(target) * part_users), plan["users"])
    state.wait_for_everyone()
    progress.report("users", plan["users"], plan["users"])
    seconds = time.monotonic() - start
    users, tokens, errors = (sum(values) for values in zip(*gather_object([(users, tokens, errors)]), strict=True))
    if state.is_main_process and _parts_in(target) != parts:
        raise UserError(f"{folder} holds {_parts_in(target)} of {parts} parts; start it again to make the others.")
    summary = {
        "users": plan["users"],
        "answered_now": users,
        "errors_now": errors,
        "processes": state.num_processes,
        "seconds": round(seconds, 2),
        "users_a_second": round(users / seconds, 2),
        "reasoning_tokens_a_second": round(tokens / seconds, 2),
    }
    if state.is_main_process:
        write_json(target / SUMMARY_FILE, summary)
    return summary


def _plan(
    recommender: Recommender, source: Path, folder: Path, part_users: int, options: Mapping[str, Any], state: Any
) -> tuple[dict[str, Any], list[int]]:
    """What decides the answers, written at the first start and compared at the next ones; the parts still to make."""
    found: list[Any] = [None]
    if state.is_main_process:
        try:  # the others wait for what becomes of it
            plan = _checked_plan(recommender, source, folder, part_users, options)
            parts = range(-(-plan["users"] // part_users))
            found = [(plan, [number for number in parts if not (folder / PART_FILE.format(number)).exists()])]
        except UserError as error:
            found = [error]
    [result] = broadcast_object_list(found)
    if isinstance(result, UserError):
        raise result
    return result


def _checked_plan(
    recommender: Recommender, source: Path, folder: Path, part_users: int, options: Mapping[str, Any]
) -> dict[str, Any]:
    recommender.prepare([], **options)  # what is wrong with the options is no error of each user
    users, digest = _measure(source)
    plan = {"source": source.name, "sha256": digest, "users": users, "part_users": part_users, "options": options}
    plan |= {"hashes": _hashes(recommender.bundle), "engine": "transformers" if recommender.engine is None else "vllm"}
    plan = json.loads(json.dumps(plan, default=list))
    file = folder / PLAN_FILE
    if file.is_file():
        old = read_json(file)
        changed = [name for name, value in plan.items() if old.get(name) != value]
        if changed:
            raise UserError(f"{folder} was begun with another {changed[0]}; give the same, or another --output.")
        remove_leftovers(folder)
    elif folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty and holds no {PLAN_FILE}; choose another --output.")
    else:
        write_json(file, plan)
    return plan


def _hashes(bundle: Bundle) -> dict[str, Any]:
    """What tells one recommender from another: the hashes of a bundle, or the same of one that was never saved."""
    if bundle.meta.hashes:
        return bundle.meta.hashes
    weights = xxhash.xxh3_128()
    for parameter in bundle.model.parameters():  # not the rows, whose last bits depend on the number of processes
        weights.update(parameter.detach().cpu().flatten().view(torch.uint8).numpy())
    catalogue = sha256_of(arrow_batches(bundle.items))
    prompts = bundle.prompts.rendered_fingerprint()
    return {"weights": weights.hexdigest(), "catalogue": catalogue, "prompts": prompts, **bundle.settings()}


def _measure(source: Path) -> tuple[int, str]:
    """Users of a file and its SHA-256."""
    digest, lines, last = hashlib.sha256(), 0, b"\n"
    try:
        with open(source, "rb") as stream:
            while block := stream.read(2**20):
                if not lines and last == b"\n" and not _is_parquet(source):
                    refuse_no_text(block, source)
                digest.update(block)
                lines, last = lines + block.count(b"\n"), block[-1:]
    except OSError as error:
        raise UserError(f"{source} cannot be read ({error.strerror}); give JSON lines or Parquet.") from error
    return (
        open_parquet(source).metadata.num_rows if _is_parquet(source) else lines + (last != b"\n")
    ), digest.hexdigest()


def _is_parquet(source: Path) -> bool:
    return source.suffix in (".parquet", ".pq")


def _chunks(source: Path, size: int, mine: Collection[int]) -> Iterator[tuple[int, list[Any]]]:
    """The users of each part that is this process's to answer, as they stand in the file, and its number."""
    if _is_parquet(source):
        rows: Iterator[Any] = itertools.chain.from_iterable(
            zip(itertools.repeat(batch), range(batch.num_rows)) for batch in _batches(source, size)
        )
    else:
        rows = zip(itertools.repeat(None), open(source, "rb"))
    for number in itertools.count():
        taken = list(itertools.islice(rows, size))
        if not taken:
            return
        if number in mine:
            yield number, [line if batch is None else _row(batch, line) for batch, line in taken]


def _batches(source: Path, size: int) -> Iterator[pa.RecordBatch]:
    """Whole batches, the columns named as a header would be; what pandas leaves behind is no key of a user."""
    with open_parquet(source) as file:
        names = named_columns(file.schema_arrow.names, source)
        kept = [name for name in names if not is_index(name)]
        try:
            for batch in file.iter_batches(batch_size=size):
                batch.validate(full=True)
                yield batch.rename_columns(list(names)).select(kept)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{source} is damaged ({str(error).splitlines()[0]}): write it again.") from error


def _row(batch: Any, row: int) -> dict[str, Any]:
    return {name: value for name, [value] in batch.slice(row, 1).to_pydict().items() if value is not None}


def _answer(recommender: Recommender, rows: list[Any], first: int, options: Mapping[str, Any]) -> pl.DataFrame:
    """One part; a user who cannot be answered gets the sentence that says why."""
    found: dict[int, Recommendation | str] = {}
    questions: dict[int, Question] = {}
    for row, user in enumerate(rows, start=first):
        try:
            question = recommender.prepare(_user(user), name=row, **options)
            recommender.bundle.prompts.user_ids({"user_id": row, **question.user})  # too long is an error of this row
            questions[row] = question
        except UserError as error:
            found[row] = str(error).encode("utf-8", "backslashreplace").decode()
    found |= zip(questions, recommender.answer(list(questions.values())), strict=True)
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA}
    for row in range(first, first + len(rows)):
        one = found[row]
        if isinstance(one, str):
            values: tuple[Any, ...] = (row, None, None, None, None, None, 0, one)
        else:
            ids, scores = [item.item_id for item in one.items], [item.score for item in one.items]
            values = (row, one.user_id, ids, scores, one.reasoning, one.has_marker, one.reasoning_tokens, None)
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)
    return pl.DataFrame(columns, schema=SCHEMA)


def _user(row: Any) -> Any:
    if not isinstance(row, bytes):
        return row
    try:
        return json.loads(row.removeprefix(b"\xef\xbb\xbf"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"The line is not JSON: {error}.") from error


def _quiet(what: str, done: int, total: int) -> None:
    pass


def _parts_in(folder: Path) -> int:
    return sum(1 for _ in folder.glob(PART_FILE.replace("{:06d}", "*")))
