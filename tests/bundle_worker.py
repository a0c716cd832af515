"""Changes a bundle until it is stopped, and reports each change once it is done: for tests that kill it."""

import sys

import torch

torch.set_num_threads(1)

from r2ec_trl.bundle.bundle import Bundle  # noqa: E402


def step(name: str, number: int) -> tuple[str, str]:
    """The `number`-th change: items are added, updated and removed in turn."""
    kind = ("add", "add", "update", "add", "remove")[number % 5]
    return kind, f"{name}{number if kind == 'add' else number - number % 5}"


def change(folder: str, name: str, times: int) -> None:
    """Make changes, and report each."""
    bundle = Bundle.load(folder)
    print("loaded", flush=True)
    for number in range(times):
        kind, item_id = step(name, number)
        if kind == "remove":
            bundle.remove_items([item_id])
        else:
            getattr(bundle, f"{kind}_items")([{"item_id": item_id, "title": f"oboe {number}"}])
        print("done", kind, item_id, flush=True)


def save(target: str, name: str, times: int, source: str) -> None:
    """Writes the whole bundle over another again and again."""
    bundle = Bundle.load(source)
    print("loaded", flush=True)
    for number in range(times):
        bundle.save(target)
        print("done save", number, flush=True)


if __name__ == "__main__":
    job, folder, name, times, *rest = sys.argv[1:]
    {"change": change, "save": save}[job](folder, name, int(times), *rest)
