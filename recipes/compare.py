"""
Compare two evaluations of the same rows: paired differences with 95 % bootstrap intervals.

    python recipes/compare.py --before outputs/contrastive --after outputs/recpo [--output comparison.json]

Both folders hold the `ranks.parquet` that evaluate.py, recpo.py or contrastive.py wrote. Split, catalogue and rows
must be the same; what else differs in the protocols (settings, seed, versions) is listed. Hardware: any; seconds.
"""

from dataclasses import dataclass, field

from rich import get_console

from r2ec_trl.cli.parsing import parse, run
from r2ec_trl.cli.tables import comparison_table
from r2ec_trl.cli.terminal import say
from r2ec_trl.evaluation.report import compare_frames, differences, finite, read_ranks
from r2ec_trl.files import write_json
from r2ec_trl.metrics import CUTOFFS


@dataclass
class CompareArguments:
    """What to compare."""

    before: str = field(metadata={"help": "Folder of the first evaluation."})
    after: str = field(metadata={"help": "Folder of the second evaluation."})
    cutoffs: list[int] = field(default_factory=lambda: list(CUTOFFS), metadata={"help": "k of Hit, NDCG and MRR."})
    seed: int = field(default=0, metadata={"help": "Seed of the bootstrap."})
    output: str | None = field(default=None, metadata={"help": "Also write the comparison to this JSON file."})


def main() -> None:
    (args,) = parse((CompareArguments,), description=__doc__)
    (before, before_protocol), (after, after_protocol) = read_ranks(args.before), read_ranks(args.after)
    protocols = differences(before_protocol, after_protocol)
    comparison = compare_frames(before, after, args.cutoffs, args.seed)
    get_console().print(comparison_table(comparison))
    for key, (one, other) in protocols.items():
        say(f"{key}: {one} -> {other}")
    if args.output is not None:
        write_json(args.output, finite({**comparison, "protocol_differences": protocols}))


if __name__ == "__main__":
    run(main)
