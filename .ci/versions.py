"""Ends of the ranges in setup.cfg. `lower`: constraints for pip, one a line. `show`: installed versions, and which moved since .ci/tested.txt."""

import configparser
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HERE = Path(__file__).parent


def declared():
    """Requirement lines of the package and of the extras that are tested."""
    setup = configparser.RawConfigParser()
    setup.read(HERE.parent / "setup.cfg", encoding="utf-8")
    texts = [setup["options"]["install_requires"]]
    texts += [setup["options.extras_require"][name] for name in ("deepspeed", "bitsandbytes", "test")]
    return [line for text in texts for line in text.split("\n") if line and not line.startswith("#")]


def main():
    from packaging.requirements import Requirement

    requirements = [Requirement(line) for line in declared()]
    if sys.argv[1:] == ["lower"]:
        for requirement in requirements:
            for bound in requirement.specifier:
                if bound.operator in (">=", "=="):
                    print(f"{requirement.name}=={bound.version}")
        return
    before = dict(line.split("==") for line in (HERE / "tested.txt").read_text().split() if "==" in line)
    for name in sorted({requirement.name for requirement in requirements}):
        try:
            found = version(name)
        except PackageNotFoundError:
            continue
        moved = f"   <- moved, was {before[name]}" if name in before and before[name] != found else ""
        print(f"{name}=={found}{moved}")


main()
