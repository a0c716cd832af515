"""Telemetry only looks: times, series, the drift of the table, which it never writes."""

import math
from types import SimpleNamespace

import pytest
import torch

from r2ec_trl.items.scoring import CatalogueScores
from r2ec_trl.items.table import ItemTable
from r2ec_trl.policy.rollouts import Rollout
from r2ec_trl.training.telemetry import Telemetry


@pytest.fixture
def telemetry():
    accelerator = SimpleNamespace(gather=lambda tensor: tensor, device=torch.device("cpu"))
    return Telemetry(accelerator, lambda: 4, watch_steps=2)


def test_parts_of_a_step_add_up_to_its_time(telemetry, monkeypatch):
    """Generation 3 s of a step of 10 s, in two parts; then a step of 4 s without any."""
    clock = iter([0.0, 1.0, 5.0, 7.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    for _ in range(2):
        with telemetry.timed("generate"):
            assert telemetry.phase == "generate"
    assert telemetry.phase == "train"
    for step_time in (10.0, 4.0):
        telemetry.series["step_time"].append(step_time)
        telemetry.on_step_end(None, None, None)
    assert telemetry.series["time/generate"] == [3.0, 0.0] and telemetry.series["time/train"] == [7.0, 4.0]


def test_an_error_leaves_the_phase_where_it_happened(telemetry):
    with pytest.raises(RuntimeError), telemetry.timed("score"):
        raise RuntimeError
    assert telemetry.phase == "score"


def test_phases_nest(telemetry, monkeypatch):
    """vLLM gets the weights for 3 s of a generation of 8 s: 5 s are generation's own, and 2 s of 10 are left."""
    clock = iter([0.0, 1.0, 4.0, 8.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    with telemetry.timed("generate"):
        with telemetry.timed("sync"):
            pass
        assert telemetry.phase == "generate"
    telemetry.series["step_time"].append(10.0)
    telemetry.on_step_end(None, None, None)
    assert [telemetry.series[f"time/{part}"] for part in ("generate", "sync", "train")] == [[5.0], [3.0], [2.0]]


def test_lengths_are_those_of_what_the_policy_wrote(telemetry):
    """Lengths 5 (cut at the limit), 1 (appended) and 3 (through a marker that overflows)."""
    for which in ("mean", "min", "max"):
        for what in ("length", "terminated_length"):
            telemetry.series[f"completions/{which}_{what}"].append(0.0)
    telemetry.series["completions/clipped_ratio"].append(0.0)
    telemetry.rollouts(
        [
            Rollout([5, 6, 7], [1, 1, 1], True, False, True),
            Rollout([5, 6, 7], [1, 0, 0], False, False, False),
            Rollout([5, 6, 7, 8, 9, 5], [1, 1, 1, 1, 1, 0], False, True, False),
        ]
    )
    figures = {name: values for name, values in telemetry.series.items()}
    assert figures["completions/mean_length"] == [3.0] and figures["completions/min_length"] == [1.0]
    assert figures["completions/max_length"] == [5.0]
    assert figures["completions/mean_terminated_length"] == [2.0]
    assert figures["completions/max_terminated_length"] == [3.0]
    assert figures["completions/clipped_ratio"] == pytest.approx([1 / 3])
    assert figures["rollout/missing_marker"] == pytest.approx([2 / 3])
    assert figures["rollout/marker_overflow"] == pytest.approx([1 / 3])


def test_ranks_are_of_all_processes_and_each_user_is_shown_once(telemetry):
    """
    Ranks 1 and 10 here, 11 and 100 on another process: two of four are hits, NDCG@10 is (1 + 1 / log2 11) / 4, and
    the mean of the logs is no log of a mean.
    """
    telemetry.accelerator.gather = lambda ranks: torch.cat([ranks, torch.tensor([11.0, 100.0])])
    telemetry.num_rollouts = 3
    users = [("u", "a", 4), ("u", "a", 9), ("v", "b", 1)]
    rows = [
        {"user_id": user, "history": ["b"], "target": target, "target_rank": rank, "top_item_ids": [target]}
        for user, target, rank in users
    ]
    scores = CatalogueScores(torch.tensor([1, 10]), torch.empty(0), torch.empty(0))
    telemetry.recommendations({"a": "A", "b": "B"}, rows, ["one", "two", "three"], scores)
    gain = (1 + 1 / math.log2(11)) / 4
    assert telemetry.series["recommendation/hit@10"] == [0.5]
    assert telemetry.series["recommendation/ndcg@10"] == telemetry.train_ndcg == [pytest.approx(gain)]
    assert telemetry.series["recommendation/mean_log_rank"] == [pytest.approx(math.log(1 * 10 * 11 * 100) / 4)]
    shown = [(one["user_id"], one["reasoning"], one["target_title"], one["rank"]) for one in telemetry.last_rollouts]
    assert shown == [("u", "one", "A", 4), ("v", "three", "B", 1)]
    assert [one["top_titles"] for one in telemetry.last_rollouts] == [["A"], ["B"]]


def test_a_micro_batch_without_an_item_has_a_loss_of_zero_and_no_other_figure(telemetry):
    telemetry.item(torch.tensor(0.0), None, None)
    telemetry.item(torch.tensor(2.0), torch.tensor(-1.5), torch.tensor(0.25))
    assert telemetry.series["item/loss"] == [0.0, 2.0]
    assert (telemetry.series["item/logprob"], telemetry.series["item/clip_ratio"]) == ([-1.5], [0.25])


def test_drift_and_gain_of_fresh_rows_leave_the_table_alone(telemetry):
    """The target's row turned by 90 degrees: drift 1. Ranks 4 and 1 became 2 and 1: mean log 2 / 2."""
    table = ItemTable(["a", "b", "c"], [[0], [1], [2]], "dot")
    table.refresh(lambda sequences: torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]))
    before = table.rows.clone()
    stale, ranks = torch.tensor([[0.0, 1.0]]), torch.tensor([4, 1])
    telemetry.table(table, [0], stale, ranks, torch.tensor([2, 1]))
    assert torch.equal(table.rows, before)
    assert telemetry.series["table/target_drift"] == pytest.approx([1.0])
    assert telemetry.series["table/fresh_rank_gain"] == pytest.approx([0.34657], abs=1e-4)
    assert telemetry.series["item/mean_pairwise_cosine"] == pytest.approx([1 / 3])
    telemetry.table(table, [0], None, None, ranks)
    assert telemetry.series["table/target_drift"][-1] == telemetry.series["table/fresh_rank_gain"][-1] == 0.0


def test_gradient_norms_are_each_losss_own_once_a_step(telemetry):
    weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    for _ in range(2):
        telemetry.gradient_norms(iter([weight]), token=weight.sum(), item=weight.square().sum())
    assert telemetry.series["grad_norm/token"] == pytest.approx([2**0.5])
    assert telemetry.series["grad_norm/item"] == pytest.approx([10.0])  # 2 (3, 4)
    assert telemetry.is_watched_step and not Telemetry(None, lambda: 3, watch_steps=2).is_watched_step
    assert not Telemetry(None, lambda: 0).is_watched_step
