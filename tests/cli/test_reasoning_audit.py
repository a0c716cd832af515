"""The audit's table and picture show every way to reason."""

from rich.console import Console

from r2ec_trl.cli.reasoning_audit import audit_table, draw_audit

FIGURE = {"value": 0.25, "low": 0.2, "high": 0.3}
CHANGE = {"difference": 0.1, "low": 0.05, "high": 0.15}
AUDIT = {
    "none": {"tokens": 0.0, "seconds": 0.01, "unmasked": FIGURE, "masked": FIGURE},
    "full": {"tokens": 8.0, "seconds": 0.5, "unmasked": {**FIGURE, "minus_none": CHANGE}, "masked": FIGURE},
    "best:4": {"tokens": 9.0, "seconds": 2.0, "unmasked": {**FIGURE, "minus_mean": CHANGE}, "masked": FIGURE},
    "contrastive": {"tokens": 0.0, "seconds": None, "unmasked": FIGURE, "masked": FIGURE},
}


def test_table():
    console = Console(width=160, record=True, file=None)
    with console.capture() as capture:
        console.print(audit_table(AUDIT))
    text = capture.get()
    assert all(name in text for name in AUDIT) and text.count("+0.100 [+0.050, +0.150]") == 2


def test_picture():
    axes = draw_audit(AUDIT, "masked").axes[0]
    assert {text.get_text() for text in axes.texts} == set(AUDIT)
    assert list(axes.lines[0].get_xdata()) == [0.0, 8.0] and "masked" in axes.get_ylabel()
    assert draw_audit({"best:4": AUDIT["best:4"]}).axes[0].texts[0].get_text() == "best:4"
