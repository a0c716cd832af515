"""The report of a run: every figure of metrics.json in it, texts as texts, no address of the network."""

import json
import re

import polars as pl
import pytest

from r2ec_trl.cli.run_report import shown_rows, write_run_report
from r2ec_trl.errors import UserError
from r2ec_trl.evaluation.comparison import compare_frames
from r2ec_trl.evaluation.report import report, write_report

PROTOCOL = {"seed": 3, "settings": {"model": "<b>tiny</b>"}, "versions": {"torch": "2"}}


def frame(ranks, shop):
    count = len(ranks)
    columns = {"user_id": shop["test"]["user_id"][:count], "target": shop["test"]["target"][:count], "rank": ranks}
    texts = [f"<script>alert({i})</script>" for i in range(count)]
    tops = [[shop["items"]["item_id"][0]]] * count
    return pl.DataFrame({**columns, "rank_masked": ranks, "reasoning": texts, "top_item_ids": tops})


@pytest.fixture
def finished(tmp_path, shop):
    """A run's folder as recipes leave it."""
    before, after = frame([9, 9, 40, 2], shop), frame([1, 9, 8, 7], shop)
    after = after.with_columns(
        history_items=pl.Series([1, 2, 3, 9]), target_popularity=pl.Series(["cold"] + ["head"] * 3)
    )
    counts = dict.fromkeys(shop["items"]["item_id"], 1)
    baselines = {"item_to_item": frame([3] * 4, shop)}
    result = {
        "protocol": PROTOCOL,
        "before": report(before, {}, PROTOCOL),
        "after": report(after, baselines, PROTOCOL, counts=counts),
        "difference": compare_frames(before, after),
        "training": {"command": "recpo.py --x '<i>'", "arguments": {"metric_for_best_model": "eval_x/ndcg@10"}},
    }
    write_report(tmp_path, result, after)
    write_report(tmp_path / "before", {"protocol": PROTOCOL}, before)
    logs = [{"step": step, "eval_x/ndcg@10": 0.1 * step, "reward": 0.2} for step in (1, 2)]
    (tmp_path / "log_history.json").write_text(json.dumps(logs))
    return tmp_path, result


def test_everything_is_in_one_file(finished, shop):
    folder, result = finished
    text = write_run_report(folder, shop["items"], shop["test"]).read_text(encoding="utf-8")
    for mask in ("unmasked", "masked"):
        for part, system in (("after", "model"), ("after", "item_to_item"), ("before", "model")):
            assert f"{result[part][mask][system]['ndcg@10']['value']:.4f}" in text
        assert f"{result['difference'][mask]['hit@5']['difference']:+.4f}" in text
        assert f"{result['after']['slices']['history']['5+'][mask]['model']['ndcg@10']['value']:.4f}" in text
    assert "gini@10" in text and "item to item" in text and "<td>cold</td>" in text
    assert text.count("<svg") == 1 and "<script" not in text and "&lt;script&gt;alert(0)" in text
    assert "&lt;b&gt;tiny&lt;/b&gt;" in text and "--x &#39;&lt;i&gt;&#39;" in text
    titles = dict(zip(shop["items"]["item_id"], shop["items"]["title"], strict=True))
    assert titles[shop["test"][0]["target"]] in text and titles[shop["test"][0]["history"][0]] in text
    assert not re.findall(r'(?:src|href)="(?!#)', text.replace("xlink:", ""))


def test_the_audit_is_taken_in(finished, shop, tmp_path):
    folder, _ = finished
    figure = {"value": 0.12345, "low": 0.1, "high": 0.2}
    change = {"difference": 0.05432, "low": 0.01, "high": 0.09}
    one = {"tokens": 3.0, "seconds": 0.5, "unmasked": {**figure, "minus_none": change}, "masked": figure}
    plain = write_run_report(folder, shop["items"]).read_text(encoding="utf-8")
    assert "Does the reasoning help?" not in plain
    (folder / "audit").mkdir()
    audit = folder / "audit" / "reasoning_audit.json"
    other = {**PROTOCOL, "split_sha256": "another's"}
    audit.write_text(json.dumps({"protocol": other, "modes": {"first:3": one}}))
    with pytest.raises(UserError, match="their protocols differ in split_sha256"):
        write_run_report(folder, shop["items"], audit=audit)
    audit.write_text(json.dumps({"protocol": {**PROTOCOL, "seed": 4}, "modes": {"first:3": one}}))
    text = write_run_report(folder, shop["items"], audit=audit).read_text(encoding="utf-8")
    assert "Does the reasoning help?" in text and "+0.0543" in text and text.count("<svg") == 2
    with pytest.raises(UserError, match="There is no .*nowhere"):
        write_run_report(folder, shop["items"], audit=tmp_path / "nowhere")


def test_what_an_earlier_run_left_in_the_folder_is_not_this_runs(finished, shop):
    """Another `before/` (of more rows) and another audit."""
    folder, result = finished
    write_report(folder, {key: value for key, value in result.items() if key != "before"}, frame([1, 9, 8, 7], shop))
    write_report(folder / "before", {"protocol": PROTOCOL}, frame([9, 9, 40, 2, 5], shop))
    (folder / "audit").mkdir()
    (folder / "audit" / "reasoning_audit.json").write_text("{}")
    text = write_run_report(folder, shop["items"]).read_text(encoding="utf-8")
    assert "changed most" not in text and "Does the reasoning help?" not in text


def test_the_best_the_worst_and_those_that_changed(shop):
    frames = {"before": frame([1, 2, 3, 4, 5, 6, 7, 800], shop), "after": frame([1, 2, 3, 4, 50, 6, 7, 8], shop)}
    rows = shown_rows(frames)
    assert rows[:7] == [
        *((row, "ranked best") for row in (0, 1, 2)),
        *((row, "ranked worst") for row in (4, 7, 6)),
        (3, "changed most"),
    ]
    assert len({row for row, _ in rows}) == len(rows) == 8
    assert shown_rows({"after": frames["after"]})[-1][1] == "ranked worst"


def test_no_finished_run(tmp_path, shop):
    with pytest.raises(UserError, match="There is no .*metrics.json"):
        write_run_report(tmp_path, shop["items"])
    (tmp_path / "metrics.json").write_text('{"protocol": {}}')
    with pytest.raises(UserError, match="no finished run"):
        write_run_report(tmp_path, shop["items"])


@pytest.mark.parametrize(
    "name, text",
    [
        ("log_history.json", "{"),
        ("log_history.json", "[3]"),
        ("metrics.json", '{"after": [], "training": {}, "protocol": {}}'),
        ("metrics.json", '{"after": {"unmasked": {}}, "training": {"arguments": {}}, "protocol": 3}'),
        ("audit.json", "{}"),
        ("audit.json", '{"modes": {"full": 3}}'),
    ],
)
def test_a_file_of_another_kind_is_one_sentence(finished, shop, name, text):
    folder, _ = finished
    (folder / name).write_text(text)
    with pytest.raises(UserError, match=f"One of .*{name}.* is not as a run writes it .*; make it again") as caught:
        write_run_report(folder, shop["items"], audit=folder / name if name == "audit.json" else None)
    assert "\n" not in str(caught.value) and not (folder / "report.html").exists()
