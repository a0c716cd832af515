"""
Ends of the ranges in setup.cfg. `lower`: constraints for pip, one a line. `show`: installed versions, and what moved since
the run that .ci/tested.txt records. `record`: that file's lines, after a green `.ci/run newest`.
"""

import configparser
import re
import sys
from importlib.metadata import distributions
from pathlib import Path

HERE = Path(__file__).parent


def declared():
    """Requirement lines of the package and of the extras that are tested."""
    setup = configparser.RawConfigParser()
    setup.read(HERE.parent / "setup.cfg", encoding="utf-8")
    texts = [setup["options"]["install_requires"]]
    texts += [setup["options.extras_require"][name] for name in ("deepspeed", "bitsandbytes", "test")]
    return [line for text in texts for line in text.split("\n") if line and not line.startswith("#")]


def plain(name):
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def moved(found, before):
    """Sentences on packages that were recorded in another version, or not at all; the build (`+cpu`) is no version."""
    said = []
    for name in sorted(found.keys() | before.keys()):
        now, was = (versions.get(name, "missing").split("+")[0] for versions in (found, before))
        if now != was:
            said.append(f"moved: {name} {was} -> {now}")
    return said


def main(word, file=HERE / "tested.txt"):
    from packaging.requirements import Requirement

    requirements = [Requirement(line) for line in declared()]
    found = {plain(each.metadata["Name"]): each.version for each in distributions() if each.metadata["Name"]}
    found = {name: number for name, number in found.items() if name not in ("r2ec-trl", "pip", "setuptools", "wheel")}
    if word == "lower":
        for requirement in requirements:
            for bound in requirement.specifier:
                if bound.operator in (">=", "=="):
                    print(f"{requirement.name}=={bound.version}")
    elif word == "record":
        print(*(f"{name}=={found[name].split('+')[0]}" for name in sorted(found)), sep="\n")
    elif word == "show":
        for name in sorted({plain(requirement.name) for requirement in requirements} & found.keys()):
            print(f"{name}=={found[name]}")
        before = dict(line.split("==") for line in Path(file).read_text(encoding="utf-8").split())
        print(*(moved(found, before) or ["all versions as recorded"]), sep="\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
