"""`report.html` of a run: one file that needs no network, made from what the run left in its folder."""

import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import polars as pl
from datasets import Dataset
from markupsafe import Markup
from matplotlib.figure import Figure

from r2ec_trl.bundle.meta import read_json
from r2ec_trl.cli.learning_curve import LearningCurveCallback
from r2ec_trl.cli.reasoning_audit import draw_audit
from r2ec_trl.errors import UserError, first_line
from r2ec_trl.evaluation.comparison import differences
from r2ec_trl.evaluation.report import MASKS, METRICS_FILE, flat, read_ranks
from r2ec_trl.files import write_text
from r2ec_trl.metrics import PERCENT
from r2ec_trl.training.health import selection_figure

REPORT_FILE = "report.html"
METRICS = ("hit@5", "ndcg@5", "hit@10", "ndcg@10")
BEST, WORST, CHANGED = 3, 3, 4  # users whose reasonings are shown


def write_run_report(
    folder: str | os.PathLike, items: Dataset, users: Dataset | None = None, audit: str | os.PathLike | None = None
) -> Path:
    """
    Write `report.html` into a run's folder: figures with intervals beside the baselines, slices, curves, the audit of
    the reasoning, ten users to read, protocol, versions and command.

    Args:
        folder (`str` or `os.PathLike`):
            Output folder of recipes/recpo.py or recipes/contrastive.py.
        items ([`~datasets.Dataset`]):
            The catalogue.
        users ([`~datasets.Dataset`], *optional*):
            The test rows, whose purchases are then shown.
        audit (`str` or `os.PathLike`, *optional*):
            `reasoning_audit.json` of recipes/evaluate.py, of the same dataset folder and split.

    Raises:
        [`UserError`]: where the folder holds no finished run.
    """
    folder = Path(folder)
    result = _read(folder / METRICS_FILE, "recipes/recpo.py writes one when it ends")
    if "after" not in result:
        raise UserError(f"{folder / METRICS_FILE} is of no finished run; `report.html` shows one.")
    named = [folder / METRICS_FILE, folder / "log_history.json", *([] if audit is None else [Path(audit)])]
    try:
        page = _page(folder, result, items, users, named)
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, jinja2.UndefinedError) as error:
        files = ", ".join(map(str, named))
        raise UserError(f"One of {files} is not as a run writes it ({first_line(error)}); make it again.") from error
    write_text(folder / REPORT_FILE, page)
    return folder / REPORT_FILE


def _page(
    folder: Path, result: Mapping[str, Any], items: Dataset, users: Dataset | None, named: Sequence[Path]
) -> str:
    titles = dict(zip(items["item_id"][:], items["title"][:], strict=True))
    frames = {"after": read_ranks(folder)[0]}
    if "before" in result:  # a run before this one may have left its own there
        frames = {"before": read_ranks(folder / "before")[0], **frames}
    history, *audits = named[1:]
    audit = _read(audits[0], "evaluate.py --audit true writes one") if audits else {"modes": {}}
    if audits:  # of other rows it says nothing of this run
        differences(result["protocol"], audit["protocol"], f"{folder / METRICS_FILE} and {audits[0]}")
    modes = audit["modes"]
    logs = json.loads(history.read_text(encoding="utf-8")) if history.is_file() else []
    after, curve = result["after"], None
    if logs:
        chosen_by = selection_figure(result["training"]["arguments"].get("metric_for_best_model"))
        curve = _svg(LearningCurveCallback().draw(logs, *chosen_by))
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(Path(__file__).with_name("run_report.html").read_text(encoding="utf-8")).render(
        title=f"R²ec: {folder.resolve().name}",
        after={"slices": {}, "beyond_accuracy": {}, **after},
        percent=PERCENT,
        masks=list(MASKS),
        metrics=METRICS,
        systems=lambda mask: _systems(result, mask),
        difference=result.get("difference"),
        names=_name,
        curve=curve,
        audit=modes,
        audit_picture=_svg(draw_audit(modes)) if modes else None,
        users=[_user(frames, row, why, titles, users) for row, why in shown_rows(frames)],
        command=result["training"].get("command", "not recorded"),
        protocol=list(flat(result["protocol"]).items()),
    )


def shown_rows(frames: Mapping[str, pl.DataFrame]) -> list[tuple[int, str]]:
    """Rows to read, each once with its reason: the best and worst ranks, then those that changed most."""
    rank = frames["after"]["rank"].to_numpy()
    order = np.argsort(rank, kind="stable").tolist()
    rows = [(row, "ranked best") for row in order[:BEST]] + [(row, "ranked worst") for row in order[::-1][:WORST]]
    if "before" in frames:
        change = np.abs(np.log(frames["before"]["rank"].to_numpy() / rank))
        rows += [(row, "changed most") for row in np.argsort(-change, kind="stable").tolist()]
    first: dict[int, str] = {}
    for row, why in rows:
        first.setdefault(row, why)
    return list(first.items())[: BEST + WORST + CHANGED]


def _name(system: str) -> str:
    return "after" if system == "model" else system.replace("_", " ")


def _systems(result: Mapping[str, Any], mask: str) -> list[tuple[str, Any]]:
    after = [(_name(name), one) for name, one in result["after"][mask].items() if name != "model"]
    before = [("before", result["before"][mask]["model"])] if "before" in result else []
    return [*after, *before, ("after", result["after"][mask]["model"])]


def _user(
    frames: Mapping[str, pl.DataFrame], row: int, why: str, titles: Mapping[str, str], users: Dataset | None
) -> dict[str, Any]:
    rows = []
    for name, frame in frames.items():
        one = frame.row(row, named=True)
        first = next(iter(one["top_item_ids"]), "")
        rows.append(
            (name, {**one, "first": titles.get(first, first), "reasoning": " ".join(one["reasoning"].split())})
        )
    last = rows[-1][1]
    bought = " | ".join(titles[item] for item in users[row]["history"]) if users is not None else ""
    target = titles.get(last["target"], last["target"])
    return {"why": why, "user_id": last["user_id"], "target": target, "rows": rows, "bought": bought}


def _svg(figure: Figure) -> Markup:
    """The figure as an element; matplotlib escapes what it writes."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return Markup(text.getvalue()[text.getvalue().index("<svg") :])


def _read(file: Path, hint: str) -> dict[str, Any]:
    if not file.is_file():
        raise UserError(f"There is no {file}; {hint}.")
    return read_json(file)
