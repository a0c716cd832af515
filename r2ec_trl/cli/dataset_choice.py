"""The dataset that a recipe works on: a folder, or the generated demo."""

import os
from dataclasses import dataclass, field
from typing import Any

from accelerate import PartialState
from datasets import DatasetDict

from r2ec_trl.data.demo import make_demo
from r2ec_trl.data.schema import load_dataset_card, load_dataset_folder, save_dataset_folder
from r2ec_trl.errors import UserError
from r2ec_trl.policy.loading import DEMO


@dataclass
class DataArguments:
    """Where the dataset folder is."""

    dataset: str | None = field(
        default=None, metadata={"help": "Dataset folder, as recipes/prepare_data.py writes it; 'demo' generates one."}
    )


def load_dataset(name: str | None, output_dir: str | os.PathLike = ".") -> tuple[DatasetDict, dict[str, Any]]:
    """
    A dataset folder and its card; `"demo"` generates the demo's shop into `output_dir` unless it is there.

    Raises:
        [`UserError`]: without a name, or for a folder that breaks the contract.
    """
    if name is None:
        raise UserError("No dataset given; add `--dataset FOLDER` (recipes/prepare_data.py writes one).")
    if name == DEMO:
        name = os.path.join(output_dir, "demo_dataset")
        with PartialState().main_process_first():
            if not os.path.isdir(name):
                dataset, card = make_demo()
                save_dataset_folder(dataset, name, card)
    return load_dataset_folder(name), load_dataset_card(name)
