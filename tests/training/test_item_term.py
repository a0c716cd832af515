"""The item term without a trainer: worked numbers for credit, ratio, clipping and gradient."""

import math
from types import SimpleNamespace

import pytest
import torch

from r2ec_trl.items.table import ItemTable
from r2ec_trl.policy.rollouts import Rollout
from r2ec_trl.training.generation_batch import GenerationBatch
from r2ec_trl.training.item_term import ItemTerm
from r2ec_trl.training.objective import cispo_objective

ROWS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])  # of the items whose only token is 0, 1, 2
ALL = slice(0, 4)


@pytest.fixture
def make():
    """`make(**settings)` gives an item term over three items and a batch: two users, two rollouts each."""

    def build(rows=None, every_process=False, **settings):
        weight = torch.nn.Parameter(ROWS.clone()) if rows is None else rows
        table = ItemTable(["a", "b", "c"], [[0], [1], [2]], "dot")
        table.refresh(lambda sequences: ROWS[[ids[0] for ids in sequences]])
        defaults = {
            "item_credit_count": 1,
            "num_generations": 2,
            "num_iterations": 1,
            "steps_per_generation": 1,
            "gradient_accumulation_steps": 1,
            "item_gradient": "candidates",
            "item_temperature": 1.0,
            "loss_type": "dapo",
            "epsilon": 0.2,
            "epsilon_high": 0.28,
        }
        term = ItemTerm(
            table,
            SimpleNamespace(**{**defaults, **settings}),
            lambda sequences: weight[[ids[0] for ids in sequences]],
            every_process,
        )
        batch = GenerationBatch(
            prompts=[[9]] * 4,
            rollouts=[Rollout([8], [1], True, False, False)] * 4,
            targets=torch.tensor([0, 0, 1, 1]),
            candidates=[0, 1],
            states=torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]]),
            target_rows=ROWS[:2],
            catalogue_rows=table.rows if settings.get("negatives") == "catalogue" else None,
            rewards=torch.zeros(4, 1),
        )
        return term, batch, weight

    return build


def prepared(term, batch, advantages, eligible=(True,) * 4):
    advantages = torch.tensor(advantages)
    return {**term.prepare(batch, advantages, torch.tensor(eligible), ALL), "advantages": advantages}


def test_the_best_of_each_group_carries_the_term_and_a_masked_one_cannot(make):
    term, batch, _ = make()
    inputs = prepared(term, batch, [1.0, -1.0, 0.5, 0.5])
    assert inputs["item_weights"].tolist() == [1, 0, 1, 0] and inputs["item_positions"].tolist() == [0, 0, 1, 1]
    assert "old_item_logprobs" not in inputs
    inputs = prepared(term, batch, [1.0, -1.0, 0.5, 0.5], (False, True, True, True))
    assert inputs["item_weights"].tolist() == [0, 1, 1, 0]


def test_a_process_gets_its_own_rows_of_groups_that_straddle(make):
    term, batch, _ = make()
    everyone = torch.tensor([3.0, 0.0, 0.0, 0.0, 1.0, 2.0])
    inputs = term.prepare(batch, everyone, torch.ones(6, dtype=torch.bool), slice(2, 6))
    assert inputs["item_weights"].tolist() == [1, 0, 0, 1]


def test_the_loss_is_that_of_the_equation(make):
    """
    Rows 0 and 2 carry it, the ratio is 1: -(1·2 + 1·0.5) / 10. log π of a state (1, 0) for the first of rows (1, 0),
    (0, 1) is -log(1 + e^-1); of (1, 1) it is -log 2.
    """
    term, batch, _ = make()
    inputs = prepared(term, batch, [2.0, -2.0, 0.5, 0.0])
    loss, _, logprob, clip_ratio = term.loss(batch.states, inputs, batch, torch.tensor(10.0))
    assert loss.item() == pytest.approx(-0.25)
    assert logprob.item() == pytest.approx((-math.log1p(math.exp(-1)) - math.log(2)) / 2)
    assert clip_ratio.item() == 0.0


def test_both_sides_of_the_score_get_gradient_unless_rows_are_constants(make):
    for gradient in ("candidates", "none"):
        term, batch, weight = make(item_gradient=gradient)
        states = batch.states.clone().requires_grad_()
        inputs = prepared(term, batch, [2.0, -2.0, 0.5, 0.0])
        term.loss(states, inputs, batch, torch.tensor(10.0))[0].backward()
        assert states.grad[0].abs().sum() > 0 and states.grad[1].abs().sum() == 0  # row 1 is not the best
        # d/dh of log π for row 0: (1, 0) - (p, 1-p), times -A/10
        p = math.exp(1) / (math.exp(1) + 1)
        assert states.grad[0].tolist() == pytest.approx([-0.2 * (1 - p), 0.2 * (1 - p)])
        assert (weight.grad is not None and weight.grad.abs().sum() > 0) == (gradient == "candidates")


def test_old_log_probs_are_kept_where_a_step_lies_between_and_clip(make):
    """Old: log π = -log(1 + e^-1) for row 0. A new state with ratio above 1.28 and A > 0 is clipped: no gradient."""
    term, batch, _ = make(num_iterations=2, item_temperature=1.0)
    inputs = prepared(term, batch, [2.0, -2.0, 0.5, 0.0])
    assert inputs["old_item_logprobs"][0].item() == pytest.approx(-math.log1p(math.exp(-1)))
    states = torch.tensor([[5.0, 0.0], [0.0, 0.0], [1.0, 1.0], [0.0, 0.0]], requires_grad=True)
    loss, _, _, clip_ratio = term.loss(states, inputs, batch, torch.tensor(1.0))
    assert clip_ratio.item() == 0.5  # one of the two credited rows
    assert loss.item() == pytest.approx(-(1.28 * 2 + 0.5))
    loss.backward()
    assert states.grad[0].abs().sum() == 0 and states.grad[2].abs().sum() > 0


def test_the_share_of_clipped_items_knows_low_from_high(make):
    """
    A ratio of .75 is below 1 - .2 and would not be below 1 - .28; the three others are 1. Where the advantage is
    positive such a ratio is not clipped: it keeps its gradient.
    """
    term, batch, _ = make(num_iterations=2, item_credit_count=None)
    for row, share in enumerate([0.0, 0.25]):
        inputs = prepared(term, batch, [2.0, -2.0, 0.5, 0.0])
        inputs["old_item_logprobs"][row] -= math.log(0.75)
        assert term.loss(batch.states, inputs, batch, torch.tensor(1.0))[-1].item() == share


def test_options_of_the_loss_reach_the_item(make):
    """
    A ratio of 3, all four rows credited. `delta` 1.5 bounds the loss of A = -2 by 3; SAPO's soft gate, of τ = 1 for
    A > 0, gives 4σ(3 - 1) A; CISPO clips above `epsilon_high`; VESPO's γ(3) = e^3 3^2 e^-9 weighs A log π.
    """
    soft = {"sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05}
    shape = {"vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0, "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0}
    log_pi = -math.log1p(math.exp(-1))  # of row 0
    for options, row, expected, share in (
        ({}, 1, 6.0, 0.0),
        ({"delta": 1.5}, 1, 3.0, 0.0),
        ({"loss_type": "sapo", **soft}, 0, -8 / (1 + math.exp(-2)), 0.0),
        ({"loss_type": "cispo", "epsilon_high": 5.0}, 0, -6 * log_pi, 0.0),
        ({"loss_type": "cispo", "epsilon_high": 2.0}, 0, -4 * log_pi, 0.25),
        ({"loss_type": "vespo", **shape}, 0, -2 * log_pi * 9 * math.exp(-6), 0.0),
    ):
        term, batch, _ = make(num_iterations=2, item_credit_count=None, **options)
        advantages = [0.0] * 4
        advantages[row] = -2.0 if row else 2.0
        inputs = prepared(term, batch, advantages)
        inputs["old_item_logprobs"][row] -= math.log(3)
        loss, *_, clip_ratio = term.loss(batch.states, inputs, batch, torch.tensor(1.0))
        assert (loss.item(), clip_ratio.item()) == (pytest.approx(expected), share), options
    inputs["old_item_logprobs"] = inputs["old_item_logprobs"] + torch.tensor([math.log(0.75 / 1.25), 0.0, 0.0, 0.0])
    assert term.loss(batch.states, inputs, batch, torch.tensor(1.0))[-1].item() == 0.0  # 1.25 is below 1 + .28


def test_rows_can_weigh_differently(make):
    """Tokens of rollouts 0 and 2 are divided by 10 and 20: -(2 / 10 + .5 / 20)."""
    term, batch, _ = make()
    inputs = prepared(term, batch, [2.0, -2.0, 0.5, 0.0])
    assert term.loss(batch.states, inputs, batch, torch.tensor([10.0, 1.0, 20.0, 1.0]))[0].item() == pytest.approx(
        -0.225
    )


def test_the_whole_catalogue_competes_with_fresh_rows_for_the_candidates(make):
    """State (1, 0) against (1, 0), (0, 1), (-1, 0): log π = -log(1 + e^-1 + e^-2)."""
    term, batch, weight = make(negatives="catalogue")
    logprob = term.logprobs(batch.states[:1], term.candidate_rows(batch), torch.tensor([0]), batch)
    assert logprob.item() == pytest.approx(-math.log(1 + math.exp(-1) + math.exp(-2)))
    with torch.no_grad():
        weight[1] = torch.tensor([1.0, 0.0])  # re-encoded: as good as the target now
    logprob = term.logprobs(batch.states[:1], term.candidate_rows(batch), torch.tensor([0]), batch)
    assert logprob.item() == pytest.approx(-math.log(2 + math.exp(-2)))
    logprob.backward()
    assert weight.grad[1].abs().sum() > 0 and weight.grad[2].abs().sum() == 0  # only the batch's targets learn


def test_without_a_credited_row_nothing_is_encoded_unless_every_process_must(make):
    for every_process in (False, True):
        term, batch, weight = make(every_process=every_process)
        inputs = prepared(term, batch, [1.0, 0.0, 1.0, 0.0], (False,) * 4)
        states = batch.states.clone().requires_grad_()
        loss, _, *figures = term.loss(states, inputs, batch, torch.tensor(10.0))
        assert loss.item() == 0.0 and figures == [None, None]
        loss.backward()  # DDP needs a graph
        assert (weight.grad is not None) == every_process


def test_candidates_are_encoded_with_gradient_once_an_optimizer_step(make):
    """Micro-steps of one row each, the last one without credit; the twin encodes in each of them."""
    gradients = []
    for cached in (True, False):
        term, batch, weight = make(item_temperature=0.5)
        calls, encode = [], term.encode
        term.encode = lambda sequences: calls.append(torch.is_grad_enabled()) or encode(sequences)
        inputs = prepared(term, batch, [2.0, -2.0, 0.5, 1.5])
        for _ in range(2):
            for row in (0, 2, 3, 1):
                part = {name: value[row : row + 1] for name, value in inputs.items()}
                states = batch.states[row : row + 1].clone().requires_grad_()
                last = row == 1 or not cached
                loss, earlier, *_ = term.loss(states, part, batch, torch.tensor(10.0), last)
                assert earlier.item() == 0.0
                (loss + earlier).backward()
        gradients.append(weight.grad)
        # by the second window the weights have changed: its rows are encoded anew, without gradient
        assert calls == ([True, False, True] if cached else [True, True] * 2)
    assert gradients[0].abs().sum() > 0.1 and torch.allclose(*gradients, atol=1e-6)


def test_after_a_step_without_credit_rows_are_encoded_anew(make):
    """The optimizer has changed the weights: the next micro-step must not meet the rows of before."""
    term, batch, weight = make()
    inputs = prepared(term, batch, [1.0, 0.0, 1.0, 0.0], (False,) * 4)
    term.loss(batch.states, inputs, batch, torch.tensor(10.0), last=True)
    with torch.no_grad():
        weight.mul_(2.0)
    assert term.candidate_rows(batch, last=False).tolist() == [[2, 0], [0, 2]]


def test_states_are_projected_as_the_rows_are(make):
    """Under the cosine a state three times as long has the same loss, and is not credited for its length."""
    term, batch, _ = make()
    term.table.similarity = "cosine"
    inputs = prepared(term, batch, [2.0, -2.0, 0.5, 0.0])
    losses = [term.loss(length * batch.states, inputs, batch, torch.tensor(10.0))[2].item() for length in (1.0, 3.0)]
    assert losses[0] == pytest.approx(losses[1]) == pytest.approx((-math.log1p(math.exp(-1)) - math.log(2)) / 2)


def test_cispo_caps_the_ratio_and_gives_it_no_gradient():
    """Ratios e^2, capped at 5, and e^-1: A min(r, cap) log pi, whose slope in log pi is A min(r, cap) alone."""
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    terms = cispo_objective(logprobs, torch.tensor([-3.0, -1.0]), torch.tensor([2.0, -1.0]), 5.0)
    assert terms.tolist() == pytest.approx([-10.0, 2 * math.exp(-1)])
    terms.sum().backward()
    assert logprobs.grad.tolist() == pytest.approx([10.0, -math.exp(-1)])
