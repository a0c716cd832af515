"""
Compare two evaluations of the same rows: paired differences with 95 % bootstrap intervals.

    python recipes/compare.py --before outputs/contrastive --after outputs/recpo [--output comparison.json]

Both folders hold the `ranks.parquet` that evaluate.py, recpo.py or contrastive.py wrote. Split, catalogue and rows
must be the same; what else differs in the protocols (settings, seed, versions) is listed. Hardware: any; seconds.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from r2ec_trl.cli.parsing import parse, run
from r2ec_trl.cli.tables import comparison_table
from r2ec_trl.errors import UserError
from r2ec_trl.evaluation.report import compare_frames, differences, read_ranks
from r2ec_trl.metrics import CUTOFFS


@dataclass
class CompareArguments:
    """What to compare."""

    before: str = field(metadata={"help": "Folder of the first evaluation."})
    after: str = field(metadata={"help": "Folder of the second evaluation."})
    cutoffs: list[int] = field(default_factory=lambda: list(CUTOFFS), metadata={"help": "k of Hit, NDCG and MRR."})
    output: str | None = field(default=None, metadata={"help": "Also write the comparison to this JSON file."})


def main() -> None:
    (args,) = parse((CompareArguments,), description=__doc__)
    (before, before_protocol), (after, after_protocol) = read_ranks(args.before), read_ranks(args.after)
    protocols = differences(before_protocol, after_protocol)
    comparison = compare_frames(before, after, args.cutoffs)
    console = Console()
    console.print(comparison_table(comparison))
    for key, (one, other) in protocols.items():
        console.print(f"{key}: {one} -> {other}", markup=False)
    if args.output is not None:
        try:
            Path(args.output).write_text(
                json.dumps({**comparison, "protocol_differences": protocols}, indent=2) + "\n"
            )
        except OSError as error:
            raise UserError(f"{args.output} cannot be written ({error.strerror}); choose another --output.") from error


if __name__ == "__main__":
    run(main)
