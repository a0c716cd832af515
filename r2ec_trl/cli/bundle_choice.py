"""The recommender that a recipe works on: a bundle, or a model or adapter with a dataset folder's catalogue."""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from datasets import Dataset, DatasetDict

from r2ec_trl.bundle.bundle import Bundle
from r2ec_trl.bundle.meta import Protocol
from r2ec_trl.cli.dataset_choice import DataArguments
from r2ec_trl.errors import UserError
from r2ec_trl.evaluation.users import first_rows
from r2ec_trl.items.encoding import make_encoder, make_table, share_encoding
from r2ec_trl.policy.checks import check_start
from r2ec_trl.policy.loading import NEW_ADAPTER, PolicyArguments, checked_device, load_policy
from r2ec_trl.policy.prompts import Prompts
from r2ec_trl.policy.rollouts import MarkerReader
from r2ec_trl.policy.settings import RecommendationArguments
from r2ec_trl.vllm.async_engine import AsyncWriter
from r2ec_trl.vllm.engine import load_engine


@dataclass
class BundleArguments(DataArguments, RecommendationArguments):
    """Which recommender, and what writes its reasonings."""

    bundle: str | None = field(
        default=None, metadata={"help": "Bundle folder or hub id; it decides model, prompts and catalogue."}
    )
    max_completion_length: int = field(default=512, metadata={"help": "Longest reasoning in tokens."})
    bf16: bool = field(default=False, metadata={"help": "Run forwards in bfloat16 (the scores stay float32)."})
    engine: str = field(
        default="transformers", metadata={"help": "What writes the reasonings.", "choices": ["transformers", "vllm"]}
    )
    device: str | None = field(default=None, metadata={"help": "Device; the GPU if there is one, by default."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Let code that comes with the model run."})


def load_bundle(args: BundleArguments, policy_args: PolicyArguments) -> Bundle:
    """The bundle that is named; [`UserError`] for flags that a bundle decides."""
    mine = {one.name for one in dataclasses.fields(RecommendationArguments)} - {"max_eval_users"}
    theirs = {one.name for one in dataclasses.fields(PolicyArguments)} - {"model_name_or_path"}
    given = _changed(args, BundleArguments(), mine | {"max_completion_length", "bf16"})
    given += _changed(policy_args, PolicyArguments(), theirs)
    if given:
        raise UserError(f"--{given[0]} is decided by the bundle; leave it out.")
    return Bundle.load(
        args.bundle or "", policy_args.model_name_or_path, _device(args), trust_remote_code=args.trust_remote_code
    )


def bundle_and_rows(
    args: Any, policy_args: PolicyArguments, dataset: DatasetDict, card: Mapping[str, Any]
) -> tuple[Bundle, Dataset]:
    """
    The recommender, and the first `--max_eval_users` rows of `--split`; [`UserError`] where there are none, or where
    rows know an item that a bundle's catalogue does not hold.
    """
    users = first_rows(dataset[args.split], args.max_eval_users)
    if not len(users):
        raise UserError(f"--split {args.split} of {args.dataset} gives no rows; choose another, or more users.")
    bundle = load_bundle(args, policy_args) if args.bundle else make_bundle(args, policy_args, dataset, card)
    if args.bundle and bundle.meta.hashes["catalogue"] != card["sha256"]["items"]:
        check_catalogue(bundle, dataset, users)
    return bundle, users


def check_catalogue(bundle: Bundle, dataset: DatasetDict, users: Dataset) -> None:
    """[`UserError`] where the rows know an item that the bundle's catalogue does not hold: before anything is done."""
    for name, rows in (("train", dataset["train"]), ("evaluated", users)):
        for item in chain(rows["target"][:], *rows["history"][:]):
            if item not in bundle.table.index:
                raise UserError(
                    f"Item {item!r} of the {name} rows is not in the bundle's catalogue (removed since?); add it "
                    "there (`add_items`), or give a --dataset without it."
                )


def make_bundle(
    args: BundleArguments, policy_args: PolicyArguments, dataset: DatasetDict, card: Mapping[str, Any]
) -> Bundle:
    """A bundle in memory: the catalogue encoded by the model or adapter that is named, by all processes together."""
    of_training = [one.name for one in dataclasses.fields(PolicyArguments) if one.name.startswith(NEW_ADAPTER)]
    given = _changed(args, BundleArguments(), ["selection_mask"])
    if given := given + _changed(policy_args, PolicyArguments(), of_training):
        raise UserError(f"--{given[0]} is of training and decides nothing here; leave it out.")
    args.category = args.category or card["category"]
    device = _device(args)
    model, tokenizer = load_policy(policy_args, trust_remote_code=args.trust_remote_code)
    if not (policy_args.load_in_4bit or policy_args.load_in_8bit):
        model.to(device)
    prompts = Prompts(tokenizer, args.prompt_config(), dataset["items"])
    table = make_table(prompts, dataset["items"], args.similarity, model.device)
    protocol = Protocol(
        reasoning="full",
        max_completion_length=args.max_completion_length,
        item_temperature=args.item_temperature,
        forward_token_budget=args.forward_token_budget,
        mixed_precision="bf16" if args.bf16 else "no",
    )
    bundle = Bundle(model.eval(), prompts, table, dataset["items"], protocol=protocol, dataset_card=card)
    check_start(model, prompts, table.token_ids, args.max_completion_length)
    encoder = make_encoder(model, prompts, args.forward_token_budget)
    with torch.no_grad(), bundle.precision():
        table.refresh(share_encoding(encoder, Accelerator(), table))
    return bundle


def engine_of(args: BundleArguments, bundle: Bundle) -> Any:
    """The vLLM engine that writes the bundle's reasonings; `None` where transformers does."""
    if args.engine == "transformers":
        return None
    with bundle.precision():
        return load_engine(bundle.model, _length(bundle), trust_remote_code=args.trust_remote_code)


def writer_of(args: BundleArguments, bundle: Bundle) -> AsyncWriter | None:
    """The same for a server: vLLM's async engine, which begins a reasoning while others are being written."""
    if args.engine == "transformers":
        return None
    reader = MarkerReader(bundle.tokenizer, bundle.prompts.config.marker)
    most = bundle.meta.protocol.max_completion_length
    with bundle.precision():
        return AsyncWriter(bundle.model, reader, most, _length(bundle), trust_remote_code=args.trust_remote_code)


def _length(bundle: Bundle) -> int:
    """The longest prompt and reasoning together; vLLM refuses more than the model's positions."""
    longest = bundle.prompts.config.max_prompt_length + bundle.meta.protocol.max_completion_length
    return min(longest, getattr(bundle.model.config.get_text_config(), "max_position_embeddings", longest))


def _changed(args: Any, defaults: Any, names: Iterable[str]) -> list[str]:
    return [name for name in sorted(names) if getattr(args, name) != getattr(defaults, name)]


def _device(args: BundleArguments) -> str:
    return str(checked_device(args.device or str(PartialState().device)))
