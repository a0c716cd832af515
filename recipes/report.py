"""
Write `report.html` of a run anew: one file to show, which needs no network.

    python recipes/report.py --run outputs/demo --dataset outputs/demo/demo_dataset [--audit FILE]

recipes/recpo.py and recipes/contrastive.py write it when they end. Afterwards this recipe takes in the reasoning audit
of `recipes/evaluate.py --audit true --output_dir RUN/audit` (or of the file that `--audit` names). Hardware: any;
seconds.
"""

from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from r2ec_trl.cli.dataset_choice import DataArguments, load_dataset
from r2ec_trl.cli.parsing import parse, run
from r2ec_trl.cli.run_report import write_run_report
from r2ec_trl.cli.terminal import say
from r2ec_trl.evaluation.comparison import check_rows
from r2ec_trl.evaluation.report import read_ranks


@dataclass
class ReportArguments(DataArguments):
    """Which run."""

    run: str = field(default="outputs/demo", metadata={"help": "Output folder of a run."})
    audit: str | None = field(
        default=None, metadata={"help": "reasoning_audit.json; that of RUN/audit, if there is one, by default."}
    )


def main() -> None:
    (args,) = parse((ReportArguments,), description=__doc__)
    frame = read_ranks(args.run)[0]  # first: a demo's dataset is made in the folder of its run alone
    dataset, _ = load_dataset(args.dataset, args.run)
    test = dataset["test"]
    rows = pl.DataFrame({name: test[name][: frame.height] for name in ("user_id", "target")})
    check_rows(rows, frame, f"The run {args.run} and the test rows of {args.dataset}")
    audit = Path(args.run) / "audit" / "reasoning_audit.json"
    report = write_run_report(args.run, dataset["items"], test, args.audit or (audit if audit.is_file() else None))
    say(f"{report} is written.")


if __name__ == "__main__":
    run(main)
