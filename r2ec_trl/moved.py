"""Module names of 0.1.0 that still import: each finds its names where they live now, with a DeprecationWarning."""

import sys
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

HOMES: dict[str, tuple[str, ...]] = {
    "adapters": ("policy.adapters",),
    "answer_state": ("policy.answer_state",),
    "baselines": ("evaluation.baselines",),
    "callbacks": ("cli.live", "cli.learning_curve", "training.health"),
    "console": ("cli.tables",),
    "contrastive_trainer": ("training.contrastive_trainer",),
    "data.amazon": ("data.sources.amazon",),
    "data.delimited": ("data.sources.delimited",),
    "data.download": ("data.sources.download",),
    "data.movielens": ("data.sources.movielens",),
    "data.readers": ("data.sources.jsonl",),
    "data.recbole": ("data.sources.recbole",),
    "data.sequences": ("data.sources.sequences",),
    "data.source": ("data.sources.source",),
    "data.tables": ("cli.audit_tables",),
    "data.tabular": ("data.sources.table",),
    "evaluation_report": ("evaluation.report",),
    "loading": ("policy.loading", "cli.dataset_choice"),
    "objective": ("training.objective",),
    "prompts": ("policy.prompts", "policy.chat"),
    "recommender": ("serving.recommender", "serving.where"),
    "recpo_config": ("training.recpo_config", "policy.settings"),
    "recpo_trainer": ("training.recpo_trainer",),
    "rollouts": ("policy.rollouts", "policy.generation"),
    "vllm_engine": ("vllm.engine",),
}


class _Moved(MetaPathFinder, Loader):
    """Finds the modules of [`HOMES`]; appended to `sys.meta_path`, so that real modules win."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        return ModuleSpec(fullname, self) if package == __package__ and name in HOMES else None

    def exec_module(self, module: ModuleType) -> None:
        homes = [f"{__package__}.{home}" for home in HOMES[module.__name__.partition(".")[2]]]
        warnings.warn(f"{module.__name__} has moved: use {' or '.join(homes)}.", DeprecationWarning, stacklevel=2)

        def find(name: str) -> Any:
            for home in homes:
                if not name.startswith("__") and hasattr(found := import_module(home), name):
                    return getattr(found, name)
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}; it moved to {homes[0]}")

        module.__getattr__ = find  # type: ignore[method-assign]


def install() -> None:
    """Let the old names import."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.append(_Moved())


def imported_when_used(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """A package's `__getattr__`: a public name is imported from its module, `homes[name]`, when it is first used."""

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        home = homes[name]
        return getattr(import_module(home if home.startswith(".") else f".{home}", package), name)

    return find
