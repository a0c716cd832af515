"""The bundle's model card: TRL's, with how to use the recommender, its data, protocol and figures."""

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from r2ec_trl.bundle.meta import BundleMeta
from r2ec_trl.evaluation.report import flat

BEGIN, END = "<!-- recommendation -->", "<!-- end of recommendation -->"
SHOWN_METRICS = ("hit@5", "ndcg@5", "hit@10", "ndcg@10", "hit@20", "ndcg@20")
_TAGS = ("recommendation", "recpo", "trl")


def write_card(card: str | None, meta: BundleMeta) -> str:
    """
    Text of a README: TRL's model card, or one written here before, whose example of a chat gives way to ours;
    everything else stays.
    """
    section = recommendation_section(meta)
    try:
        parsed = ModelCard(card, ignore_metadata_errors=True) if card else _plain_card()
    except (ValueError, TypeError, AttributeError, yaml.YAMLError):  # its head was damaged by hand
        parsed = _plain_card()
    base, data = meta.base_model, parsed.data
    data["base_model"] = base if "/" in base and not os.path.exists(base) else None  # the hub takes no folders
    data["library_name"] = "peft" if meta.adapter else "transformers"
    tags = data.get("tags")
    data["tags"] = sorted({*map(str, tags if isinstance(tags, list) else []), *_TAGS})
    text = parsed.text.strip().replace("[None](https://huggingface.co/None)", "a model in a local folder")
    if BEGIN in text:
        text = re.sub(f"{BEGIN}.*?{END}", lambda _: section, text, flags=re.DOTALL)
    elif "## Quick start" in text:
        text = re.sub(r"## Quick start\n.*?(?=\n## |\Z)", lambda _: section + "\n", text, count=1, flags=re.DOTALL)
    else:
        text = f"{text}\n\n{section}"
    return f"---\n{data.to_yaml()}\n---\n\n{text}\n"


def recommendation_section(meta: BundleMeta) -> str:
    """How to use it, what it recommends, the protocol of its figures, and the figures."""
    card, category = meta.dataset_card, meta.prompts.category
    data: dict[str, Any] = {key: card[key] for key in ("source", "split_rule", "synthetic", "counts") if key in card}
    parts = [
        BEGIN,
        "## Recommendation",
        f"This bundle reasons about a user's purchases, then ranks its whole catalogue of {meta.num_items:,} items "
        f"(category: {category}).",
        "```python\nfrom r2ec_trl import Recommender\n\n"
        'recommender = Recommender.from_pretrained("THIS_FOLDER_OR_HUB_ID")\n'
        'for user in recommender.recommend([{"history_titles": ["something bought before"]}], k=5):\n'
        "    print(user.reasoning)\n    for item in user.items:\n        print(item.score, item.title)\n```",
        "### Data",
        _table(flat(data, joint=": ")) or "Not recorded.",
        "### Protocol",
        _table(dataclasses.asdict(meta.protocol)),
    ]
    if "after" in meta.metrics:
        parts += ["### Results on the test split, with 95 % intervals", _metrics_table(meta.metrics)]
    return "\n\n".join([*parts, END])


def _metrics_table(metrics: Mapping[str, Any]) -> str:
    """Rows: metrics, with the history masked and not. Columns: the model at each stage, then the other systems."""
    columns = {(stage, "model"): stage for stage in ("before", "after") if stage in metrics}
    columns |= {("after", name): name for name in metrics["after"]["unmasked"] if name != "model"}
    lines = [f"| metric | {' | '.join(columns.values())} |", f"|---|{'---|' * len(columns)}"]
    for mask, words in (("unmasked", ""), ("masked", ", history masked")):
        for name in SHOWN_METRICS:
            values = [_figure(metrics[stage][mask][system][name]) for stage, system in columns]
            lines.append(f"| {name}{words} | {' | '.join(values)} |")
    return "\n".join(lines)


def _figure(value: Mapping[str, float]) -> str:
    return f"{value['value']:.4f} [{value['low']:.4f}, {value['high']:.4f}]"


def _table(values: Mapping[str, Any]) -> str:
    if not values:
        return ""
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in values.items())])


def _plain_card() -> ModelCard:
    return ModelCard(f"---\n{ModelCardData().to_yaml()}\n---\n\n# A recommender that reasons")
