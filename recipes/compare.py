"""
Compare evaluations of the same rows: paired differences with 95 % bootstrap intervals and permutation tests.

    python recipes/compare.py --before outputs/contrastive --after outputs/recpo
    python recipes/compare.py --before outputs/warm0 outputs/warm1 --after recpo=outputs/recpo0 recpo=outputs/recpo1 \\
        sasrec=outputs/baselines/sasrec --metrics ndcg@10 hit@10 --output comparison.json --figure comparison.png

Each folder holds the `ranks.parquet` that evaluate.py, recpo.py, contrastive.py or baselines.py wrote. Folders of one
name are seeds of one system: intervals are then over users and seeds. p values (sign flips over users) are corrected
by Holm for all that is shown. Split, catalogue and rows must be the same; what else differs in the protocols
(settings, seed, versions) is listed. Hardware: any; seconds.
"""

import os
from dataclasses import dataclass, field

from rich import get_console

from r2ec_trl.cli.comparison_figure import comparison_figure
from r2ec_trl.cli.parsing import parse, run
from r2ec_trl.cli.tables import comparison_table
from r2ec_trl.cli.terminal import say
from r2ec_trl.errors import UserError
from r2ec_trl.evaluation.comparison import check_rows, compare_runs, differences
from r2ec_trl.evaluation.report import read_ranks
from r2ec_trl.files import finite, write_json, write_with
from r2ec_trl.metrics import KINDS

METRICS = ("hit@10", "ndcg@10")


@dataclass
class CompareArguments:
    """What to compare."""

    before: list[str] = field(
        metadata={"help": "Folder of the reference; several are its seeds. NAME=FOLDER names it."}
    )
    after: list[str] = field(
        metadata={"help": "Folders, or NAME=FOLDER; several of one name are seeds of one system."}
    )
    metrics: list[str] = field(
        default_factory=list, metadata={"help": "hit, ndcg or mrr with a cutoff; hit@10 and ndcg@10 by default."}
    )
    cutoffs: list[int] = field(
        default_factory=list, metadata={"help": "k of Hit, NDCG and MRR, all three, in place of --metrics."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the bootstrap and of the sign flips."})
    output: str | None = field(default=None, metadata={"help": "Also write the comparison to this JSON file."})
    figure: str | None = field(default=None, metadata={"help": "Also draw it into this PNG file."})

    def __post_init__(self) -> None:
        if self.metrics and self.cutoffs:
            raise UserError("--metrics and --cutoffs both say what is compared; give one of them.")
        self.metrics = self.metrics or [f"{kind}@{k}" for k in self.cutoffs for kind in KINDS] or list(METRICS)
        if self.figure is not None and not self.figure.lower().endswith(".png"):
            raise UserError(f"--figure draws a PNG, and {self.figure} is named otherwise; let its name end in .png.")


def named(folders: list[str], default: str | None = None) -> dict[str, list[str]]:
    """Folders by the names of their systems; without one, by themselves."""
    systems: dict[str, list[str]] = {}
    for text in folders:
        name, equals, folder = text.partition("=")
        if not equals or "/" in name:
            name, folder = default or text, text
        if not name or not folder:
            raise UserError(f"{text!r} names no system or no folder; give NAME=FOLDER, or a folder.")
        if any(os.path.realpath(folder) == os.path.realpath(one) for one in systems.setdefault(name, [])):
            raise UserError(f"{folder} is given twice, and a run is no seed beside itself; give it once.")
        systems[name].append(folder)
    return systems


def main() -> None:
    (args,) = parse((CompareArguments,), description=__doc__)
    references = named(args.before, "before")
    if len(references) > 1:
        raise UserError(f"--before is one system, not {', '.join(references)}; give the others to --after.")
    ((reference, folders),) = references.items()
    systems = named(args.after)
    if clash := {reference, "before"} & set(systems):
        raise UserError(f"--after names a system {clash.pop()!r} as well as --before; give it another name.")
    frames, protocols = {}, {}
    for folder in [*folders, *(one for runs in systems.values() for one in runs)]:
        frames[folder], protocols[folder] = read_ranks(folder)
        both = f"{folders[0]} and {folder}"
        differing = differences(protocols[folders[0]], protocols[folder], both)
        check_rows(frames[folders[0]], frames[folder], both)
        for key, (one, other) in differing.items():
            say(f"{folder}: {key}: {one} -> {other}")
    comparison = compare_runs(
        [frames[folder] for folder in folders],
        {name: [frames[folder] for folder in runs] for name, runs in systems.items()},
        args.metrics,
        args.seed,
    )
    get_console().print(comparison_table(comparison, reference))
    if args.output is not None:
        found = {folder: differences(protocols[folders[0]], protocol) for folder, protocol in protocols.items()}
        whole = {**comparison, "reference": reference, "folders": {reference: folders, **systems}}
        write_json(args.output, finite({**whole, "protocol_differences": found}))
    if args.figure is not None:
        picture = comparison_figure(comparison, reference)
        write_with(args.figure, lambda file: picture.savefig(file, dpi=110, format="png"))


if __name__ == "__main__":
    run(main)
