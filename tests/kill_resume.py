"""
Kill -9 a training run at random moments, resume it each time, and compare its end with an unbroken run's.

    python tests/kill_resume.py --work FOLDER                             # 10 kills of 20-step runs of the demo
    python tests/kill_resume.py --work FOLDER --model MODEL --dataset DATASET --kills 3

Every other kill waits for a checkpoint that is being written. After each kill the newest whole checkpoint must be at
most one save interval behind the last step that was logged. Runs follow each other until there were enough kills;
metrics and ranks of each must be those of the unbroken run. The last line is one JSON object.
"""

import argparse
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import polars as pl

from r2ec_trl.training.checkpoints import checkpoints, is_whole

ROOT = Path(__file__).parent.parent
STEPS, SAVE_STEPS = 20, 3
SETTINGS = {
    "max_steps": STEPS,
    "save_steps": SAVE_STEPS,
    "save_strategy": "steps",
    "save_total_limit": 2,
    "eval_strategy": "steps",
    "eval_steps": 2 * SAVE_STEPS,
    "max_eval_users": 4,
    "max_test_users": 8,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_generations": 4,
    "max_completion_length": 8,
    "learning_rate": 1e-3,
    "item_fields": "title",
    "report_before": "false",
    "logging_steps": 1,
    "seed": 5,
    "report_to": "none",
    "use_cpu": "true",
}
DEADLINE = 900.0  # seconds one start may take


class Run:
    """One output folder, trained by as many processes after each other as kills ask for."""

    def __init__(self, model: str, dataset: str, output: Path):
        self.words = [sys.executable, str(ROOT / "recipes" / "recpo.py"), "--config", str(output.parent / "run.yaml")]
        self.words += ["--model_name_or_path", model, "--dataset", dataset, "--output_dir", str(output)]
        self.words += ["--resume_from_checkpoint", "latest"]
        self.output, self.log = output, output.parent / f"{output.name}.log"

    def start(self) -> subprocess.Popen:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
        with open(self.log, "a", encoding="utf-8") as log:
            return subprocess.Popen(
                self.words, stdout=log, stderr=log, cwd=ROOT, env=environment, start_new_session=True
            )

    def last_step(self) -> int:
        """The last step that was logged by any of the processes so far."""
        text = self.log.read_text(encoding="utf-8") if self.log.exists() else ""
        return max([0, *map(int, re.findall(rf"^step (\d+)/{STEPS} ", text, flags=re.MULTILINE))])

    def saved_step(self) -> int:
        """Step of the newest whole checkpoint."""
        return max([0, *(int(path.name.split("-")[1]) for path in checkpoints(self.output) if is_whole(path))])

    def half_written(self) -> set[tuple[str, int]]:
        """Checkpoints that are not whole at this moment: name and inode, which a folder made anew does not share."""
        found = set()
        for path in checkpoints(self.output):
            with contextlib.suppress(FileNotFoundError):  # deleted since it was listed
                if not is_whole(path):
                    found.add((path.name, path.stat().st_ino))
        return found

    def finish(self) -> None:
        """Train to the end."""
        process = self.start()
        if process.wait(DEADLINE):
            raise SystemExit(f"The run ended with status {process.returncode}:\n{self.log.read_text()[-3000:]}")

    def figures(self) -> tuple[dict, pl.DataFrame]:
        metrics = json.loads((self.output / "metrics.json").read_text())
        return metrics["after"], pl.read_parquet(self.output / "ranks.parquet")


def kill_once(run: Run, draw: random.Random, while_saving: bool) -> dict | None:
    """Start, kill at a random moment, and say what was left; `None` if the run came to its end before."""
    already, leftovers = run.last_step(), run.half_written()
    process = run.start()
    goal = draw.randint(min(STEPS, already + 1), min(STEPS, already + 6))  # near enough for several kills a run
    end, moment = time.monotonic() + DEADLINE, None
    while process.poll() is None:
        if time.monotonic() > end:
            raise SystemExit(f"No progress for {DEADLINE:.0f} s; see {run.log}.")
        if moment is None and run.last_step() >= goal:
            moment = time.monotonic() + draw.uniform(0.0, 0.5)
        if moment is not None and (run.half_written() - leftovers if while_saving else time.monotonic() > moment):
            break
        time.sleep(0.001 if while_saving and moment is not None else 0.02)
    if process.poll() is not None:
        if process.returncode:
            raise SystemExit(f"The run ended with status {process.returncode}:\n{run.log.read_text()[-3000:]}")
        return None
    saving = bool(run.half_written() - leftovers)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    left = {"last_step": run.last_step(), "saved_step": run.saved_step(), "while_saving": saving}
    left["half_written"] = sorted(name for name, _ in run.half_written())
    if left["last_step"] - left["saved_step"] > SAVE_STEPS:
        raise SystemExit(f"More than a save interval is lost: {left}")
    return left


def main(words: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="Folder for the runs and their logs.")
    parser.add_argument("--model", default="demo", help="Model folder.")
    parser.add_argument("--dataset", default="demo", help="Dataset folder.")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(words)
    args.work.mkdir(parents=True, exist_ok=True)
    lines = [f"{name}: {value}" for name, value in SETTINGS.items() if name != "item_fields"]
    (args.work / "run.yaml").write_text("\n".join([*lines, f"item_fields: [{SETTINGS['item_fields']}]"]) + "\n")
    draw = random.Random(args.seed)
    unbroken = Run(args.model, args.dataset, args.work / "unbroken")
    unbroken.finish()
    expected, ranks = unbroken.figures()
    kills: list[dict] = []
    number = 0
    while len(kills) < args.kills:
        number += 1
        run = Run(args.model, args.dataset, args.work / f"broken{number}")
        while len(kills) < args.kills:
            left = kill_once(run, draw, while_saving=len(kills) % 2 == 1)
            if left is None:
                break
            kills.append({"run": number, **left})
            print(kills[-1], flush=True)
        if not (run.output / "metrics.json").exists():
            run.finish()
        figures, others = run.figures()
        if figures != expected or not others.equals(ranks):
            raise SystemExit(f"Run {number} ended otherwise than the unbroken one: compare {run.output} with it.")
        print(f"run {number}: metrics and ranks equal the unbroken run's", flush=True)
    result = {"kills": len(kills), "runs": number, "while_saving": sum(kill["while_saving"] for kill in kills)}
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
