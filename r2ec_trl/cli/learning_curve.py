"""The learning curve of a run on disk: a picture and the log, written whole at each evaluation."""

import json
import math
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from transformers import TrainerCallback

from r2ec_trl.files import write_text, write_with
from r2ec_trl.training.health import VALIDATION_NDCG, finite_number, selection_figure


class LearningCurveCallback(TrainerCallback):
    """
    Writes `learning_curve.png` and `log_history.json` to the output folder at each evaluation and at the end:
    validation NDCG@10, reward, share of missing markers, tokens a rollout. A file is written beside, then renamed.
    """

    PANELS = {  # beside the validation figure
        "reward": "training reward",
        "rollout/missing_marker": "share of missing markers",
        "completions/mean_length": "tokens a rollout",
    }

    def on_evaluate(self, args, state, control, **kwargs) -> None:
        self._write(args, state)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self._write(args, state)

    def _write(self, args, state) -> None:
        if not state.is_world_process_zero or not state.log_history:
            return
        folder = Path(args.output_dir)
        no_number = (math.inf, -math.inf)  # JSON has none of them, nor NaN
        history = [
            {key: None if value != value or value in no_number else value for key, value in row.items()}
            for row in state.log_history
        ]
        write_text(folder / "log_history.json", json.dumps(history, indent=1, default=float, allow_nan=False) + "\n")
        figure = self.draw(history, *selection_figure(getattr(args, "selection_metric", None)))
        write_with(folder / "learning_curve.png", lambda path: figure.savefig(path, dpi=110, format="png"))

    def draw(
        self, history: list[dict[str, Any]], metric: str = VALIDATION_NDCG, title: str = "validation NDCG@10"
    ) -> Figure:
        """
        The figure of a `log_history`.

        Args:
            history (`list[dict]`):
                `state.log_history`, or the content of `log_history.json`.
            metric, title (`str`, *optional*):
                The validation figure of the first panel, and its name; see
                [`~r2ec_trl.training.health.selection_figure`].

        Returns:
            `matplotlib.figure.Figure`: One panel a series, the validation figure with its intervals; a series that was
            never logged says so.
        """
        figure = Figure(figsize=(9, 6), layout="constrained")
        for axes, (name, title) in zip(figure.subplots(2, 2).flat, {metric: title, **self.PANELS}.items()):
            points = [
                (row["step"], number)
                for row in history
                if "step" in row and (number := finite_number(row.get(name))) is not None
            ]
            axes.set_title(title)
            axes.set_xlabel("optimizer step")
            axes.grid(alpha=0.3)
            if not points:
                axes.text(0.5, 0.5, "not logged", ha="center", va="center", transform=axes.transAxes)
                continue
            steps, values = zip(*points)
            axes.plot(steps, values, marker="o" if name == metric else None, markersize=4)
            bounds = [
                (row["step"], row[f"{name}_low"], row[f"{name}_high"]) for row in history if f"{name}_low" in row
            ]
            if bounds:
                axes.fill_between(*zip(*bounds, strict=True), alpha=0.2)
            if name == "rollout/missing_marker":
                axes.set_ylim(-0.02, 1.02)
        return figure
