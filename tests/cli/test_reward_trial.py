"""What rewards made of rollouts, as tables; texts are shown as texts."""

from rich.console import Console

from r2ec_trl.cli.reward_trial import examples, trial_table

ROW = {"user_id": "u", "completion": "[red]a\x1b", "rank": 7, "reward": 0.5, "advantage": 0.25}
FOUND = {"mean": 0.5, "spread": 0.1, "without_signal": 0.25, "not_applicable": 0.0, "with_fused": None}
FOUND |= {"with_rank": -0.5, "up": [ROW], "down": [{**ROW, "advantage": -0.25}]}


def test_tables():
    console = Console(width=160)
    with console.capture() as capture:
        console.print(trial_table({"mine": FOUND}), examples("mine", FOUND))
    text = capture.get()
    assert "25%" in text and "-0.50" in text and "–" in text
    assert "+0.250" in text and "-0.250" in text and "[red]a" in text and "\x1b[31m" not in text
