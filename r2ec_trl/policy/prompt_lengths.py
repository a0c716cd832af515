"""How long the prompts of a dataset are under a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from datasets import DatasetDict
from transformers import AutoTokenizer

from r2ec_trl.data.schema import ITEMS, SPLITS
from r2ec_trl.errors import UserError, first_line
from r2ec_trl.policy.prompts import PromptConfig, Prompts


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a folder or a hub name; [`UserError`] if there is none."""
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--tokenizer '{path}' cannot be loaded ({first_line(error)}): name another.") from error


def prompt_lengths(dataset: DatasetDict, tokenizer_path: str, category: str, rows: int = 500) -> dict[str, Any]:
    """
    Token counts of whole prompts under a tokenizer (folder or hub name): of `rows` evenly spaced rows of each split.
    `category` are the singular words of the card.
    """
    tokenizer = load_tokenizer(tokenizer_path)
    limits = PromptConfig()
    whole = PromptConfig(category=category, max_prompt_length=1 << 30, max_item_length=1 << 30)
    prompts = Prompts(tokenizer, whole, dataset[ITEMS])
    result: dict[str, Any] = {"tokenizer": Path(tokenizer_path).name}
    for split in (*SPLITS, ITEMS):
        part = dataset[split]
        chosen = np.unique(np.linspace(0, len(part) - 1, min(rows, len(part))).astype(int))
        make = prompts.item_ids if split == ITEMS else prompts.user_ids
        counts = np.array([len(make(part[int(index)])) for index in chosen])
        limit = limits.max_item_length if split == ITEMS else limits.max_prompt_length
        quantiles = {f"p{share}": int(np.quantile(counts, share / 100)) for share in (50, 90, 99)}
        result[split] = {**quantiles, "max": int(counts.max()), "over_limit": float((counts > limit).mean())}
        result[split]["histogram"] = _token_histogram(counts)
    return result


def _token_histogram(counts: np.ndarray) -> dict[str, int]:
    edges = [0, *(64 << power for power in range(8))]
    found = np.histogram(counts, bins=[*edges, max(int(counts.max()) + 1, edges[-1] + 1)])[0]
    names = [f"<{edge}" for edge in edges[1:]] + [f">={edges[-1]}"]
    return {name: int(count) for name, count in zip(names, found) if count}
