"""The objective (M4–M8): pure functions on hand-worked numbers, then the whole of it against a float64 oracle."""

import random

import hypothesis.strategies as st
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from oracle import Oracle, advantages_of, best_of, distance, double_model, gradient_of, record, row_of, surrogate
from peft import LoraConfig

from r2ec_trl.training.objective import (
    candidate_logprobs,
    clipped_objective,
    contrastive_loss,
    item_credit_weights,
    mean_pairwise_cosine,
    reward_spread,
    rloo_factor,
    token_normalizer,
)

SIZE = 4
USERS = 4
LOW, HIGH = 0.1, 0.3
LORA = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": "all-linear", "init_lora_weights": False}
rewards_of_groups = st.lists(st.floats(-5, 5).map(lambda x: round(x, 3)), min_size=SIZE, max_size=SIZE)


# -------------------------------------------------------------------------------------------------- the pure functions
@given(rewards_of_groups)
def test_rloo_factor_makes_leave_one_out_advantages_that_sum_to_zero(rewards):
    reward = torch.tensor(rewards, dtype=torch.float64)
    advantages = (reward - reward.mean()) * rloo_factor(torch.tensor([SIZE]))
    assert advantages.tolist() == pytest.approx(advantages_of(rewards, SIZE, "rloo"), abs=1e-5)
    assert abs(advantages.sum().item()) < 1e-5


def test_rloo_factor_of_a_group_of_one_is_finite():
    assert rloo_factor(torch.tensor([2, 1, 0])).tolist() == [2.0, 1.0, 1.0]


@given(rewards_of_groups, st.sampled_from([1, 2, 3, 9, None]))
def test_item_credit_goes_to_the_best_of_each_group_the_first_of_a_tie(advantages, credit):
    advantages = advantages + advantages[::-1]
    weights = item_credit_weights(torch.tensor(advantages), SIZE, credit, torch.ones(2 * SIZE, dtype=torch.bool))
    assert weights.bool().tolist() == best_of(advantages, SIZE, credit)


def test_item_credit_skips_rollouts_that_may_not_carry_it():
    eligible = torch.tensor([False, True, True, True, False, False])
    weights = item_credit_weights(torch.tensor([9.0, 1, 2, 3, 9, 9]), 3, 2, eligible)
    assert weights.tolist() == [0, 1, 1, 1, 0, 0]


@given(st.floats(-2, 2), st.floats(-3, 3), st.floats(0.01, 0.9), st.floats(0.01, 0.9))
def test_clipped_objective_is_the_minimum_of_the_plain_and_the_clipped_term(difference, advantage, low, high):
    logprob, old = torch.tensor(difference, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    ours = clipped_objective(logprob, old, torch.tensor(advantage, dtype=torch.float64), low, high)
    assert ours.item() == pytest.approx(float(surrogate(logprob.exp(), advantage, low, high)), abs=1e-12)


def test_candidate_logprobs_by_hand():
    """Scores .6/.2 = 3 and .8/.2 = 4: log-softmax 3 - log(e³+e⁴) = -1.3133 and -.3133."""
    states, candidates = torch.tensor([[1.0], [1.0]]), torch.tensor([[0.6], [0.8]])
    logprobs = candidate_logprobs(states, candidates, torch.tensor([0, 1]), 0.2)
    assert logprobs.tolist() == pytest.approx([-1.3133, -0.3133], abs=1e-4)
    loss = contrastive_loss(states, candidates, torch.tensor([0, 1]), 0.2)
    assert loss.item() == pytest.approx((1.3133 + 0.3133) / 2, abs=1e-4)


def test_candidate_logprobs_stay_fp32_under_autocast():
    torch.manual_seed(0)
    states, rows = torch.randn(4, 64), torch.randn(9, 64)
    positions = torch.arange(4)
    plain = candidate_logprobs(states, rows, positions, 0.02)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(candidate_logprobs(states, rows, positions, 0.02), plain)
    assert candidate_logprobs(states.bfloat16(), rows.bfloat16(), positions, 0.02).dtype == torch.float32


def test_contrastive_loss_gradient_by_finite_differences():
    torch.manual_seed(0)
    states, rows = torch.randn(3, 5), torch.randn(4, 5, requires_grad=True)
    positions = torch.tensor([2, 0, 2])
    contrastive_loss(states, rows, positions, 1.0).backward()
    for row, column in ((0, 0), (2, 3), (3, 4)):
        values = []
        for sign in (1, -1):
            moved = rows.detach().double().clone()
            moved[row, column] += sign * 1e-6
            scores = torch.log_softmax(states.double() @ moved.T, dim=1)
            values.append(-scores[torch.arange(3), positions].mean().item())
        assert rows.grad[row, column].item() == pytest.approx((values[0] - values[1]) / 2e-6, abs=1e-6)


@settings(max_examples=20)
@given(st.integers(2, 6), st.integers(0, 99))
def test_mean_pairwise_cosine_equals_the_mean_over_pairs(count, seed):
    rows = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    pairs = [
        torch.cosine_similarity(rows[i], rows[j], dim=0).item() for i in range(count) for j in range(count) if i != j
    ]
    assert mean_pairwise_cosine(rows).item() == pytest.approx(sum(pairs) / len(pairs), abs=1e-5)


@pytest.mark.parametrize(("name", "expected"), [("grpo", [6.0, 18.0]), ("sapo", [6.0, 18.0]), ("bnpo", 9.0)])
def test_a_rollout_that_ended_at_once_divides_by_one_token_not_by_none(name, expected):
    """Its marker was appended, so none of its tokens is trained; its item may be. Two rows, three micro-batches."""
    mask = torch.tensor([[0, 0, 0], [1, 1, 1]])
    assert token_normalizer(name, mask, torch.tensor(3.0), 3, 3, 1).tolist() == expected
    assert token_normalizer("bnpo", mask[:1], torch.tensor(0.0), 3, 3, 1).item() == 3.0


# ------------------------------------------------------------------------------------- the whole objective (M4 to M7)
def odd_reward(completion_ids, **kwargs):
    """Any fixed function of a rollout's ids, all different."""
    return [(sum(ids) * 37 + len(ids)) % 101 / 101 for ids in completion_ids]


def sampler(tokenizer):
    """Rollouts of each kind: through the marker and on, marker first, ended without one, cut at the limit."""
    marker = tokenizer("<answer>", add_special_tokens=False)["input_ids"]

    def sample(prompt_ids, number):
        dice = random.Random(f"{prompt_ids}{number}")
        words = [dice.randrange(10, 300) for _ in range(dice.randrange(2, 6))]
        return [words + marker + words, words + [tokenizer.eos_token_id], words, marker][number % SIZE]

    return sample


def four_users(shop) -> Dataset:
    """The first two share their target."""
    rows = shop["train"].to_list()
    twin = next(row for row in rows[1:] if row["target"] == rows[0]["target"])
    others = {row["target"]: row for row in rows if row["target"] != rows[0]["target"]}
    return Dataset.from_list([rows[0], twin, *list(others.values())[:2]])


CASES = {
    "paper": {},
    "full": {"peft": False, "item_credit": "all", "learning_rate": 1e-3},
    "rloo, m = 2": {"advantage": "rloo", "scale_rewards": "none", "item_credit": "2"},
    "all, no item gradient": {"item_credit": "all", "item_gradient": "none", "item_coef": 3.0},
    "catalogue": {"item_negatives": "catalogue", "item_credit": "all", "token_coef": 0.5},
    "catalogue, no item gradient, full": {
        "item_negatives": "catalogue",
        "item_gradient": "none",
        "item_credit": "all",
        "token_coef": 0.0,
        "peft": False,
    },
}


def build(make_trainer, shop, **settings):
    defaults = {
        "train": four_users(shop),
        "reward": odd_reward,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": USERS * SIZE,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "epsilon": LOW,
        "epsilon_high": HIGH,
        "temperature": 1.3,
        "item_temperature": 0.05,
    }
    trainer = make_trainer(**{**defaults, **settings})
    loss = trainer.item_term.loss  # every micro-step with all of its own gradient: the cached one is summed up later
    trainer.item_term.loss = lambda *args: loss(*args[:4], True)
    return trainer


def oracle_of(trainer, generation) -> Oracle:
    args, completions = trainer.args, [rollout.ids for rollout in generation.rollouts]
    return Oracle(
        table_ids=trainer.table.token_ids,
        targets=[int(row["target"][1:]) for row in generation.rows],
        prompts=generation.prompts,
        completions=completions,
        trained=[rollout.trained for rollout in generation.rollouts],
        advantages=advantages_of(odd_reward(completions), SIZE, args.advantage),
        size=SIZE,
        credit=args.item_credit_count,
        low=LOW,
        high=HIGH,
        tau=0.05,
        temperature=1.3,
        item_coef=args.item_coef,
        token_coef=args.token_coef,
        negatives=args.item_negatives,
        item_gradient=args.item_gradient == "candidates",
    )


def compare(steps, generation, oracle: Oracle, model) -> None:
    """Each micro-batch of one rollout has the loss and the gradient that the equations give that rollout."""
    model.load_state_dict(steps[0].weights)
    errors, scale = [], 0.0
    for step in steps:
        i = row_of(step.inputs, generation, 0)
        (term,) = oracle.terms(model, only=i)
        assert step.loss == pytest.approx(term.item(), abs=2e-5), i
        error, norm = distance(step.gradient, gradient_of(term, model))
        errors.append((i, error))
        scale = max(scale, norm)
    assert scale > 1e-3 and all(error < 2e-3 * scale for _, error in errors), (scale, errors)


@pytest.mark.parametrize("case", CASES)
def test_each_trajectory_has_the_value_and_gradient_of_the_equations(
    case, make_trainer, replay, shop, chat_tokenizer, tiny_model
):
    """
    One rollout a micro-batch, all of them twice (`num_iterations=2`): before any update every ratio is 1; after it the
    ratios are those to π_old, and clipping acts. The second pass is checked on the weights that it really saw.
    """
    replay(sampler(chat_tokenizer))
    trainer = build(make_trainer, shop, num_iterations=2, **CASES[case])
    notes = record(trainer)
    (generation,) = notes.generations
    assert len(notes.steps) == 2 * USERS * SIZE
    model = double_model(tiny_model("llama"), LoraConfig(**LORA) if CASES[case].get("peft", True) else None)
    oracle = oracle_of(trainer, generation)
    assert generation.advantages == pytest.approx(oracle.advantages, abs=1e-5)
    model.load_state_dict(notes.steps[0].weights)
    oracle.old_actions(model)
    compare(notes.steps[: USERS * SIZE], generation, oracle, model)
    compare(notes.steps[USERS * SIZE :], generation, oracle, model)
    first, second = trainer.state.log_history[:2]
    assert first["clip_ratio/region_mean"] == first["item/clip_ratio"] == 0
    assert second["clip_ratio/region_mean"] > 0.1 and second["item/clip_ratio"] > 0.1
    model.load_state_dict(notes.steps[-1].weights)
    credited = [i for i, best in enumerate(best_of(oracle.advantages, oracle.size, oracle.credit)) if best]
    with torch.no_grad():
        rows = oracle._rows(model)
        ratios = [(oracle.actions(model, rows, i)[1] - oracle.old[i][1]).exp().item() for i in credited]
    signs = [oracle.advantages[i] for i in credited]
    clipped = [r > 1 + oracle.high if sign > 0 else r < 1 - oracle.low for r, sign in zip(ratios, signs, strict=True)]
    assert second["item/clip_ratio"] == pytest.approx(sum(clipped) / len(clipped))


def test_without_a_second_iteration_every_ratio_is_one(make_trainer, replay, shop, chat_tokenizer, tiny_model):
    """Two steps, each with rollouts of its own: π_old is π, its value exactly and its gradient all the same."""
    replay(sampler(chat_tokenizer))
    trainer = build(make_trainer, shop, item_credit="all", item_coef=2.0)
    notes = record(trainer)
    assert len(notes.generations) == 2 and "old_item_logprobs" not in notes.generations[0].output
    model = double_model(tiny_model("llama"), LoraConfig(**LORA))
    for number, generation in enumerate(notes.generations):
        steps = notes.steps[number * USERS * SIZE : (number + 1) * USERS * SIZE]
        oracle = oracle_of(trainer, generation)
        model.load_state_dict(steps[0].weights)
        oracle.old_actions(model)
        compare(steps, generation, oracle, model)


def test_the_oracle_agrees_with_finite_differences(tiny_model):
    """Along three random directions, at weights where ratios differ from 1; float64 throughout."""
    torch.manual_seed(0)
    model = double_model(tiny_model("llama"), LoraConfig(**LORA))
    dice = random.Random(0)
    words = [[dice.randrange(10, 300) for _ in range(dice.randrange(3, 7))] for _ in range(24)]
    oracle = Oracle(
        table_ids=words[:5],
        targets=[0, 0, 0, 0, 3, 3, 3, 3],
        prompts=words[5:6] * 4 + words[6:7] * 4,
        completions=words[7:15],
        trained=[[1] * (len(ids) - 1) + [0] for ids in words[7:15]],
        advantages=advantages_of([0.3, 0.1, 0.9, 0.2, 0.5, 0.6, 0.1, 0.0], 4, "grpo"),
        size=4,
        low=LOW,
        high=HIGH,
    )
    oracle.old_actions(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in parameters:
            parameter += 0.02 * torch.randn_like(parameter)
    gradient = list(gradient_of(sum(oracle.terms(model)), model).values())
    for _ in range(3):
        direction = [torch.randn_like(parameter) for parameter in parameters]
        values = []
        for step in (1e-6, -2e-6):  # there, then to the other side
            with torch.no_grad():
                for parameter, way in zip(parameters, direction, strict=True):
                    parameter += step * way
                values.append(sum(oracle.terms(model)).item())
        with torch.no_grad():
            for parameter, way in zip(parameters, direction, strict=True):
                parameter += 1e-6 * way
        slope = sum((g * way).sum().item() for g, way in zip(gradient, direction, strict=True))
        assert (values[0] - values[1]) / 2e-6 == pytest.approx(slope, rel=1e-5, abs=1e-7)


def test_the_spread_of_rewards_is_that_of_what_was_scored():
    """Equal numbers deviate by nothing, of however many; a rollout that no function scored is none; nobody: 0."""
    nan = torch.nan
    for size in range(2, 17):
        assert reward_spread(torch.full((size, 1), 0.7), size, summed=True).tolist() == [0.0]
    rewards = torch.tensor([[0.5], [0.5], [nan], [nan], [nan], [nan], [nan], [nan], [1.0], [3.0], [nan], [nan]])
    assert reward_spread(rewards, 4, summed=True).tolist() == [0.0, 0.0, 1.0]
    both = torch.tensor([[0.0, 2.0], [2.0, 0.0], [1.0, nan], [1.0, nan]])
    assert reward_spread(both, 2, summed=True).tolist() == [0.0, 0.0]
    assert reward_spread(both, 2, summed=False).tolist() == [1.0, 0.0]
