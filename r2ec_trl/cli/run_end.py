"""How a run goes on: the start evaluated, training, then the test split once, baselines beside it, all written."""

import dataclasses
import logging
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
from datasets import Dataset, DatasetDict
from rich import get_console
from rich.console import Console, Group
from rich.markup import escape
from rich.panel import Panel
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from r2ec_trl.bundle.bundle import Bundle, save_bundle
from r2ec_trl.bundle.meta import Protocol
from r2ec_trl.cli.bundle_choice import BundleArguments
from r2ec_trl.cli.run_report import write_run_report
from r2ec_trl.cli.run_start import RunArguments
from r2ec_trl.cli.tables import beyond_table, report_table, run_table, slice_table
from r2ec_trl.cli.terminal import printable
from r2ec_trl.data.demo import oracle_ranks, right_reasoning
from r2ec_trl.evaluation.baselines import baseline_frame, item_to_item, popularity
from r2ec_trl.evaluation.comparison import compare_frames
from r2ec_trl.evaluation.report import protocol, report, write_report
from r2ec_trl.evaluation.slices import TOP, describe_rows, target_counts
from r2ec_trl.evaluation.users import gather_rows, without_histories
from r2ec_trl.items.sliced_table import SlicedTable
from r2ec_trl.policy.settings import RecommendationArguments
from r2ec_trl.training.greedy_evaluation import GreedyEvaluation

logger = logging.getLogger(__name__)


def baseline_frames(dataset: DatasetDict, test: Dataset, synthetic: bool) -> dict[str, pl.DataFrame]:
    """The rows ranked by popularity, item-to-item counts and, in the generated shop, the generator itself."""
    item_ids = dataset["items"]["item_id"][:]
    frames = {
        "popularity": baseline_frame(popularity(dataset["train"], item_ids), test),
        "item_to_item": baseline_frame(item_to_item(dataset["train"], item_ids), test),
    }
    if synthetic and "true_stage" in test.column_names:
        frames["oracle"] = pl.DataFrame({"rank": oracle_ranks(test), "rank_masked": oracle_ranks(test, masked=True)})
    return frames


def full_report(
    frame: pl.DataFrame,
    baselines: Mapping[str, pl.DataFrame],
    facts: Mapping[str, Any],
    dataset: DatasetDict,
    test: Dataset,
    strangers: pl.DataFrame | None = None,
) -> dict[str, Any]:
    """
    All figures of one evaluation.

    Args:
        frame (`polars.DataFrame`):
            The model's rows, with the columns of [`~r2ec_trl.evaluation.slices.describe_rows`].
        baselines (`Mapping[str, polars.DataFrame]`):
            See [`baseline_frames`].
        facts (`Mapping[str, Any]`):
            The protocol.
        dataset, test:
            The dataset folder and the rows.
        strangers (`polars.DataFrame`, *optional*):
            The same rows answered without any purchase; popularity, which knows none either, stands beside them.
    """
    counts = target_counts(dataset["train"], dataset["items"]["item_id"][:])
    result = report(frame, baselines, facts, seed=facts["seed"], counts=counts)
    if "reasoning" in frame.columns:
        result["reasoning"] = reasoning_shares(frame, test)
    if strangers is not None:
        alone = report(strangers, {"popularity": baselines["popularity"]}, {}, ks=(TOP,), seed=facts["seed"])
        result["no_history"] = {"rows": alone["rows"], **alone["unmasked"]}
    return result


def described(frame: pl.DataFrame, dataset: DatasetDict, test: Dataset) -> pl.DataFrame:
    """The frame with the columns that slices are made by."""
    return describe_rows(frame, test, target_counts(dataset["train"], dataset["items"]["item_id"][:]))


def reasoning_shares(frame: pl.DataFrame, test: Dataset) -> dict[str, float]:
    """Share of marker-ended reasonings and, in the generated shop, of those that name the right family and stage."""
    shares = {"has_marker": float(frame["has_marker"].cast(pl.Float64).to_numpy().mean())}
    if "true_stage" in test.column_names:
        judged = [right_reasoning(text, row) for text, row in zip(frame["reasoning"], test, strict=True)]
        for name in ("family", "stage"):
            shares[f"right_{name}"] = sum(verdict[name] for verdict in judged) / len(judged)
    return shares


def train_and_finish(
    trainer: GreedyEvaluation, dataset: DatasetDict, card: Mapping[str, Any], test: Dataset, run_args: RunArguments
) -> None:
    """
    Evaluate the start on the test rows, to be looked at when training is over, train, and [`finish_run`]. What the
    start reached is on disk before training begins.
    """
    before = None
    if run_args.report_before:
        before = trainer.evaluate_frame(test)
        if trainer.accelerator.is_main_process:
            _write_before(trainer, dataset, card, test, before)
    else:
        trainer.check_prompts(test)
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    finish_run(trainer, dataset, card, test, before, run_args.shown_rollouts)


def _write_before(
    trainer: GreedyEvaluation, dataset: DatasetDict, card: Mapping[str, Any], test: Dataset, before: pl.DataFrame
) -> dict[str, Any]:
    before = described(before, dataset, test)
    result = full_report(before, {}, _facts(trainer, card), dataset, test)
    write_report(Path(trainer.args.output_dir) / "before", result, before)
    return result


def finish_run(
    trainer: GreedyEvaluation,
    dataset: DatasetDict,
    card: Mapping[str, Any],
    test: Dataset,
    before: pl.DataFrame | None,
    num_examples: int = 2,
) -> None:
    """
    Save the trained policy and its bundle, evaluate the bundle on the test rows, write the figures and print them.

    Args:
        trainer ([`GreedyEvaluation`]):
            A trainer of ours after `train`, with the best weights loaded.
        dataset, card:
            The dataset folder and its card.
        test ([`~datasets.Dataset`]):
            The test rows.
        before (`polars.DataFrame`, *optional*):
            The same rows evaluated before training.
        num_examples (`int`, *optional*, defaults to 2):
            Users whose reasoning is shown before and after.
    """
    folder = Path(trainer.args.output_dir)
    main = trainer.accelerator.is_main_process
    trainer.model.eval()
    trainer.save_model(str(folder))
    with trainer.frozen_policy() as model:
        trainer.refresh_whole_table(model)
        table = trainer.table.whole()
        if main and table is not None:
            trainer.create_model_card(model_name=folder.name)
            bundle = save_bundle(
                folder / "bundle",
                model,
                trainer.prompts,
                table,
                dataset["items"],
                protocol=_bundle_protocol(trainer),
                dataset_card=card,
                model_card=(folder / "README.md").read_text(encoding="utf-8"),
            )
    facts = _facts(trainer, card)
    result: dict[str, Any] = {"protocol": facts}
    if main and before is not None:
        result["before"] = _write_before(trainer, dataset, card, test, before)
    trainer.accelerator.wait_for_everyone()
    try:
        after, strangers, without = evaluate_bundle(trainer, folder / "bundle", test)
        after = described(after, dataset, test)
    except Exception:
        logger.error(
            "%s is whole, its figures are missing: recipes/evaluate.py --bundle gives them.", folder / "bundle"
        )
        raise
    if main:
        write_report(folder, result, after)  # whatever fails from here on, the ranks are kept
        result |= _result(trainer, dataset, card, test, before, after, facts, strangers)
        if without is not None:  # what leaving the reasoning out costs
            facts = _facts(trainer, card, "none")
            result["reasoning_none"] = report(without, {}, facts, seed=facts["seed"])
        write_report(folder, result, after)
        logger.info("%s", write_run_report(folder, dataset["items"], test))
        kept = ("before", "after", "reasoning_none")
        bundle.record_metrics({name: result[name] for name in kept if name in result})
        _print(get_console(), result, dataset, test, before, after, num_examples)


def _bundle_protocol(trainer: GreedyEvaluation) -> Protocol:
    args: Any = trainer.args
    return Protocol(
        reasoning=trainer.reasoning,
        max_completion_length=(BundleArguments if trainer.reasoning == "none" else args).max_completion_length,
        item_temperature=args.item_temperature,
        forward_token_budget=args.forward_token_budget,
        mixed_precision=trainer.accelerator.mixed_precision if trainer.accelerator.native_amp else "no",
    )


def evaluate_bundle(
    trainer: GreedyEvaluation, folder: Path, dataset: Dataset
) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame | None]:
    """
    As [`~r2ec_trl.training.greedy_evaluation.GreedyEvaluation.evaluate_frame`], but by the bundle that a run wrote:
    weights, prompts and item table are read back from disk. Reasonings come from vLLM where the run uses it. The
    second frame is of the same rows without any purchase, the third without reasoning where the policy reasons.

    To make room, the trained model is left in main memory, unless it is quantised or DeepSpeed's.
    """
    users, rollouts = trainer.own_users(dataset, trainer.reasoning)
    if not (getattr(trainer.model, "is_quantized", False) or trainer.is_deepspeed_enabled):
        trainer.model.to("cpu")
    unset_hf_deepspeed_config()  # under ZeRO-3 the bundle's weights would be shared out as they are loaded
    bundle = Bundle.load(
        folder,
        device=str(trainer.accelerator.device),
        table_device="cpu" if isinstance(trainer.table, SlicedTable) else None,
        trust_remote_code=trainer.args.trust_remote_code,
    )
    frame = gather_rows(bundle.evaluate(users, rollouts=rollouts), len(dataset))
    without = None
    if trainer.reasoning != "none":
        without = gather_rows(bundle.evaluate(users, reasoning="none"), len(dataset))
    return frame, bundle.evaluate(without_histories(dataset)), without


def _facts(trainer: GreedyEvaluation, card: Mapping[str, Any], reasoning: str | None = None) -> dict[str, Any]:
    """The protocol of a training run: prompts, scoring and reasoning are what decides a figure."""
    args: Any = trainer.args
    reasoning = reasoning or trainer.reasoning
    settings = {one.name: getattr(args, one.name) for one in dataclasses.fields(RecommendationArguments)}
    length = 0 if reasoning == "none" else args.max_completion_length
    more = {"reasoning": reasoning, "max_completion_length": length, "model": trainer.model.config._name_or_path}
    return protocol(card, {**settings, **more}, args.seed)


def _result(
    trainer: GreedyEvaluation,
    dataset: DatasetDict,
    card: Mapping[str, Any],
    test: Dataset,
    before: pl.DataFrame | None,
    after: pl.DataFrame,
    facts: Mapping[str, Any],
    strangers: pl.DataFrame,
) -> dict[str, Any]:
    """What `metrics.json` of a training run holds besides the protocol and `before`."""
    args: Any = trainer.args
    baselines = baseline_frames(dataset, test, card["synthetic"])
    result: dict[str, Any] = {"after": full_report(after, baselines, facts, dataset, test, strangers)}
    if before is not None:
        result["difference"] = compare_frames(before, after, seed=args.seed)
    if getattr(trainer, "reasoning_report", None) is not None:
        result["reasoning_on_validation"] = trainer.reasoning_report
    result["training"] = {
        "steps": trainer.state.global_step,
        "best_step": trainer.state.best_global_step,
        "best_validation": trainer.state.best_metric,
        "command": shlex.join(without_tokens(sys.argv)),
        "seconds": next((log["train_runtime"] for log in trainer.state.log_history if "train_runtime" in log), None),
        "arguments": {name: value for name, value in args.to_dict().items() if value is not None},
    }
    return result


def without_tokens(words: Sequence[str]) -> list[str]:
    """
    A command line without the secrets in it.

    >>> without_tokens(["recpo.py", "--hub_token", "hf_1", "--push_to_hub-token=hf_1", "--seed", "0"])
    ['recpo.py', '--hub_token', '<hidden>', '--push_to_hub-token=<hidden>', '--seed', '0']
    """
    shown, secret = [], False
    for word in words:
        name, equals, _ = word.partition("=")
        is_token = name.startswith("--") and name.endswith(("_token", "-token"))
        shown.append("<hidden>" if secret else f"{name}=<hidden>" if is_token and equals else word)
        secret = is_token and not equals
    return shown


def write_evaluation(
    folder: str | os.PathLike,
    frame: pl.DataFrame,
    dataset: DatasetDict,
    card: Mapping[str, Any],
    test: Dataset,
    facts: Mapping[str, Any],
    strangers: pl.DataFrame | None = None,
) -> dict[str, Any]:
    """Write, print and return one report of one reasoning mode for recipes/evaluate.py; see [`full_report`]."""
    frame = described(frame, dataset, test)
    write_report(folder, {"protocol": facts}, frame)  # whatever fails from here on, the ranks are kept
    baselines = baseline_frames(dataset, test, card["synthetic"])
    result = full_report(frame, baselines, facts, dataset, test, strangers)
    write_report(folder, result, frame)
    console = get_console()
    console.print(f"[bold]reasoning: {facts['settings']['reasoning']}[/bold]", result["reasoning"])
    for table in (report_table, slice_table, beyond_table):
        console.print(table(result))
    return result


def _print(
    console: Console,
    result: Mapping[str, Any],
    dataset: DatasetDict,
    test: Dataset,
    before: pl.DataFrame | None,
    after: pl.DataFrame,
    num_examples: int,
) -> None:
    titles = dict(zip(dataset["items"]["item_id"], dataset["items"]["title"], strict=True))
    if before is not None:
        for row in range(min(num_examples, len(test))):
            console.print(_example(test[row], before.row(row, named=True), after.row(row, named=True), titles))
    console.print(run_table(result))
    for name in ("before", "after"):
        if name in result:
            shares = [f"{key.replace('_', ' ')} {share:.0%}" for key, share in result[name]["reasoning"].items()]
            console.print(f"{name:6} reasoning: {', '.join(shares)}")
    if found := result.get("reasoning_on_validation"):
        change = found["none_to_full"]["unmasked"]["ndcg@10"]
        console.print(
            f"validation NDCG@10 without reasoning {change['before']:.3f}, with {change['after']:.3f}: "
            f"{change['difference']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}]; "
            f"marker missing {found['missing_marker']:.0%}",
            markup=False,
        )


def _example(
    user: Mapping[str, Any], before: Mapping[str, Any], after: Mapping[str, Any], titles: Mapping[str, str]
) -> Panel:
    """One user's purchases, and the reasoning with its first item and the target's rank, before and after."""

    def text(words: Any) -> str:
        return escape(printable(words))

    lines = [f"[dim]bought[/dim] {text(' | '.join(titles[item] for item in user['history']))}"]
    lines.append(f"[dim]next  [/dim] {text(titles[user['target']])}")
    for name, row in (("before", before), ("after ", after)):
        lines.append(f"[bold]{name}[/bold] {text(' '.join(row['reasoning'].split()))}")
        lines.append(f"       first: {text(titles[row['top_item_ids'][0]])}; the target is at rank {row['rank']}")
    return Panel(Group(*lines), title=text(user["user_id"]), title_align="left")
