"""
A catalogue encoded: the instruction that all item prompts start with computed once and few paddings, against each
prompt by itself in batches as full as they can be.

    python recipes/benchmark.py --case item_table
    python recipes/benchmark.py --case item_table --model FOLDER --num_items 500

Parity: the table's rows. Lengths are spread as product titles with descriptions are: log-normal, from 8 tokens to 8
times the median.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Iterator

import torch
from benchmarks.replayed import model as small_model
from benchmarks.timing import compare
from transformers import AutoModelForCausalLM

from r2ec_trl.cli.parsing import parse
from r2ec_trl.errors import UserError
from r2ec_trl.items.table import ItemTable
from r2ec_trl.policy import answer_state
from r2ec_trl.policy.answer_state import add_answer_state, encode_states


@dataclass
class ItemTableArguments:
    """Sizes of the case."""

    model: str | None = field(default=None, metadata={"help": "Folder of a model; without one, a random small Llama."})
    num_items: int = field(default=500, metadata={"help": "N, size of the catalogue."})
    prefix_tokens: int = field(default=28, metadata={"help": "Tokens of the instruction."})
    item_tokens: int = field(default=100, metadata={"help": "Median tokens of what follows."})
    token_budget: int = field(default=16_384, metadata={"help": "Most tokens a forward."})
    rounds: int = field(default=3, metadata={"help": "Rounds of A B B A."})


@contextmanager
def plain() -> Iterator[None]:
    """Each prompt by itself."""
    kept = answer_state.MOST_WASTE, answer_state.PREFIX_TOKENS
    answer_state.MOST_WASTE, answer_state.PREFIX_TOKENS = float("inf"), 10**9
    try:
        yield
    finally:
        answer_state.MOST_WASTE, answer_state.PREFIX_TOKENS = kept


def run(words: Sequence[str]) -> dict[str, Any]:
    """The ratio, the tokens forwarded on either side, and the paddings among them."""
    (args,) = parse((ItemTableArguments,), list(words), description=__doc__)
    loaded = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32) if args.model else small_model()
    policy = loaded.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    add_answer_state(policy)
    draw = torch.Generator().manual_seed(0)
    spread = torch.randn(args.num_items, generator=draw).mul(0.5).exp() * args.item_tokens
    lengths = spread.long().clamp(8, 8 * args.item_tokens).tolist()
    ids = torch.randint(20, 2000, (args.prefix_tokens + sum(lengths),), generator=draw).tolist()
    instruction, rest = ids[: args.prefix_tokens], iter(ids[args.prefix_tokens :])
    prompts = [instruction + [next(rest) for _ in range(length)] for length in lengths]
    table = ItemTable([f"i{n}" for n in range(len(prompts))], prompts, device=policy.device)
    tokens: list[int] = []
    policy.model.register_forward_pre_hook(
        lambda module, words, given: tokens.append(given["input_ids"].numel()), with_kwargs=True
    )

    def refresh() -> torch.Tensor:
        tokens.clear()
        table.refresh(lambda sequences: encode_states(policy, sequences, 0, args.token_budget))
        return table.rows

    def flat() -> torch.Tensor:
        with plain():
            return refresh()

    def parity() -> None:
        if not torch.allclose(refresh(), flat(), atol=1e-4):
            raise UserError("The rows differ from those of each prompt by itself; no timing is given.")

    forwarded = [(way(), sum(tokens))[1] for way in (refresh, flat)]
    least = args.prefix_tokens + sum(lengths)
    names = {"what": f"table of {args.num_items} items, {args.prefix_tokens} + {args.item_tokens} tokens"}
    names["against"] = "each prompt by itself, full batches"
    formula = forwarded[0] / forwarded[1]
    comparison = compare(refresh, flat, parity=parity, rounds=args.rounds, formula=formula, bar=0.85, **names)
    return {
        "comparisons": [comparison],
        "tokens_forwarded": forwarded,
        "waste": [round(forwarded[0] / least, 4), round(forwarded[1] / sum(map(len, prompts)), 4)],
    }
