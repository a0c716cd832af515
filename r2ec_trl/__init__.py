"""R²ec and RecPO on TRL: a language model that reasons, then ranks the whole catalogue.

Names are imported when first used, so that `import r2ec_trl` stays quick and data tools load no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from r2ec_trl.moved import install as _install_moved_names

if TYPE_CHECKING:
    from r2ec_trl.data.schema import load_dataset_folder
    from r2ec_trl.errors import UserError
    from r2ec_trl.items.table import ItemTable
    from r2ec_trl.serving.recommender import Recommender
    from r2ec_trl.training.recpo_config import RecPOConfig
    from r2ec_trl.training.recpo_trainer import RecPOTrainer

__version__ = "0.1.0"
__all__ = ["ItemTable", "RecPOConfig", "RecPOTrainer", "Recommender", "UserError", "load_dataset_folder"]

_HOMES = {
    "ItemTable": "items.table",
    "RecPOConfig": "training.recpo_config",
    "RecPOTrainer": "training.recpo_trainer",
    "Recommender": "serving.recommender",
    "UserError": "errors",
    "load_dataset_folder": "data.schema",
}

_install_moved_names()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
