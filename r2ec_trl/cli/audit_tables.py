"""The audit as rich tables: rendering alone, no figure is computed here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from r2ec_trl.cli.terminal import printable
from r2ec_trl.data.audit import LEAKS
from r2ec_trl.data.schema import ITEMS, SPLITS
from r2ec_trl.evaluation.report import flat

_ROWS = {
    "rows": "rows",
    "users": "users",
    "cold_users": "users not in train",
    "rows_of_cold_users": "rows of users not in train",
    "targets": "distinct targets",
    "rows_with_unseen_target": "rows whose target train never shows",
    "rows_with_target_never_trained": "rows whose target is no train target",
    "repeat_targets": "rows whose target is in the history",
    "hit_cap_under_mask": "highest Hit under the history mask",
    "duplicate_rows": "duplicate rows",
    "target_tied_with_history": "rows whose target shares its second with the history",
    "first_target": "first target",
    "last_target": "last target",
}


def audit_tables(audit: Mapping[str, Any], card: Mapping[str, Any]) -> Iterator[Table]:
    """Tables of [`~r2ec_trl.data.audit.audit_dataset`], and of the dataset card or what is known of it."""
    yield _splits(audit, card)
    yield _pairs("catalogue", flat(audit["catalogue"], joint=": "))
    if facts := flat(card.get("facts", {}), joint=": "):
        yield _pairs("interactions", facts)
    if card.get("dropped"):
        yield _pairs("left out, by cause", card["dropped"])
    if card.get("published"):
        yield _published(card["published"])
    if card.get("prompt_lengths"):
        yield _prompts(card["prompt_lengths"])
    yield _leakage(audit)


def _splits(audit: Mapping[str, Any], card: Mapping[str, Any]) -> Table:
    title = _text(f"{card.get('source', 'dataset')}, split {card.get('split_rule', '?')}")
    table = Table(title=title, title_justify="left")
    table.add_column(f"{audit['users']:,} users")
    for split in SPLITS:
        table.add_column(split, justify="right")
    figures = audit["splits"]
    for key, name in _ROWS.items():
        if any(key in figures[split] for split in SPLITS):
            table.add_row(name, *(_cell(figures[split].get(key, "")) for split in SPLITS))
    for key in ("mean", "median", "max"):
        table.add_row(f"history length, {key}", *(_cell(figures[split]["history_length"][key]) for split in SPLITS))
    buckets = dict.fromkeys(name for split in SPLITS for name in figures[split]["history_length"]["histogram"])
    for name in sorted(buckets, key=lambda bucket: int(bucket.split("-")[0].rstrip("+"))):
        counts = (figures[split]["history_length"]["histogram"].get(name, 0) for split in SPLITS)
        table.add_row(f"history of {name}", *map(_cell, counts))
    if "sha256" in card:
        table.add_row("SHA-256", *(card["sha256"][split][:12] for split in SPLITS))
    return table


def _leakage(audit: Mapping[str, Any]) -> Table:
    table = Table("check", "rows", "", title="leakage", title_justify="left")
    for cause, count in audit["leakage"].items():
        table.add_row(LEAKS[cause], _cell(count), "[bold red]LEAK[/]" if count else "[green]none[/]")
    for note, value in audit["notes"].items():
        table.add_row(_text(note.replace("_", " ")), _cell(value), "note")
    return table


def _published(published: Mapping[str, Mapping[str, int]]) -> Table:
    table = Table(
        "count", "published", "here", "difference", title="against the published counts", title_justify="left"
    )
    for name, counts in published.items():
        difference = counts["here"] - counts["published"]
        share = difference / counts["published"]
        table.add_row(
            _text(name), _cell(counts["published"]), _cell(counts["here"]), f"{difference:+,} ({share:+.1%})"
        )
    return table


def _prompts(lengths: Mapping[str, Any]) -> Table:
    table = Table(title=_text(f"prompt tokens ({lengths['tokenizer']})"), title_justify="left")
    for name in ("split", "p50", "p90", "p99", "max", "over the limit", "histogram"):
        table.add_column(name, justify="left" if name in ("split", "histogram") else "right")
    for split in (*SPLITS, ITEMS):
        figures = lengths[split]
        histogram = "  ".join(f"{name}: {count}" for name, count in figures["histogram"].items())
        quantiles = (_cell(figures[name]) for name in ("p50", "p90", "p99", "max"))
        table.add_row(split, *quantiles, f"{figures['over_limit']:.1%}", histogram)
    return table


def _pairs(title: str, pairs: Mapping[str, Any]) -> Table:
    table = Table(show_header=False, title=title, title_justify="left")
    table.add_column()
    table.add_column(justify="right")
    for name, value in pairs.items():
        table.add_row(_text(str(name).replace("_", " ")), _cell(value))
    return table


def _cell(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else _text(value)


def _text(value: Any) -> str:
    """Text of data: no terminal code, no markup."""
    return escape(printable(value))
