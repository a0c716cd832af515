"""RecPOTrainer: the same result for every split, one forward, the states and rewards it says, and it learns."""

import random

import pytest
import torch
from datasets import Dataset
from oracle import distance, double_model, forward, record, unit
from transformers import AutoModelForCausalLM, TrainerCallback

from r2ec_trl.errors import UserError

SIZE = 4


def odd_reward(completion_ids, **kwargs):
    return [(sum(ids) * 37 + len(ids)) % 101 / 101 for ids in completion_ids]


@pytest.fixture
def sample(chat_tokenizer):
    """Rollouts of each kind: through the marker and on, ended without one, cut at the limit, marker first."""
    marker = chat_tokenizer("<answer>", add_special_tokens=False)["input_ids"]

    def draw(prompt_ids, number):
        dice = random.Random(f"{prompt_ids}{number}")
        words = [dice.randrange(10, 300) for _ in range(dice.randrange(2, 8))]
        return [words + marker + words, words + [chat_tokenizer.eos_token_id], words, marker][number % SIZE]

    return draw


def total(steps) -> dict:
    return {name: sum(step.gradient[name] for step in steps) for name in steps[0].gradient}


def test_users_without_signal_are_skipped(make_trainer, replay, sample):
    """
    `min_reward_spread` between the groups' deviations: the quiet ones get no forward, and the gradient is that of the
    same advantages with every row in it.
    """
    ends = {"reward": odd_reward, "item_coef": 2.0, "item_temperature": 0.2, "max_steps": 1}
    ends |= {"per_device_train_batch_size": 16}
    replay(sample)
    plain = make_trainer(**ends)
    record(plain)
    groups = plain.batch.rewards.view(-1, SIZE).std(dim=1, unbiased=False)
    middle = groups.sort().values[1:3].mean().item()
    results = []
    for drops in (True, False):
        replay(sample)
        trainer = make_trainer(min_reward_spread=middle, **ends)
        if not drops:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("r2ec_trl.training.recpo_trainer.without_rows", lambda inputs, left_out: inputs)
                results.append(record(trainer).steps)
        else:
            results.append(record(trainer).steps)
        assert trainer.state.log_history[0]["rollout/no_signal"] == 0.5
    gradients = [total(steps) for steps in results]
    difference, norm = distance(*gradients)
    assert norm > 0.1 and difference < 2e-5 * norm
    with pytest.raises(UserError, match="only `--loss_type dapo`"):
        make_trainer(min_reward_spread=0.1, loss_type="grpo")


# ------------------------------------------------------------------------------------------------------ every split
@pytest.mark.parametrize("options", [{}, {"mask_truncated_completions": True, "peft": False, "item_credit": "2"}])
def test_loss_and_gradient_do_not_depend_on_the_micro_batch(make_trainer, replay, sample, options):
    results = {}
    for batch, accumulation in ((16, 1), (4, 4), (1, 16)):
        replay(sample)
        trainer = make_trainer(
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            reward=odd_reward,
            item_coef=2.0,
            item_temperature=0.2,  # the library's .02 would magnify fp32 noise of differently shaped products
            **options,
        )
        steps = record(trainer).steps
        results[batch] = sum(step.loss for step in steps), total(steps)
    loss, gradient = results[16]
    assert abs(loss) > 1e-2
    for batch in (4, 1):
        assert results[batch][0] == pytest.approx(loss, abs=1e-5)
        difference, norm = distance(results[batch][1], gradient)
        assert norm > 0.1
        assert difference < 2e-5 * norm, (batch, difference, norm)


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 4},
        {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "num_iterations": 2, "max_steps": 4},
        {"gradient_accumulation_steps": 4, "steps_per_generation": 2, "item_negatives": "catalogue"},
    ],
)
def test_cached_item_gradients_and_shared_prompts_equal_their_plain_twins(make_trainer, replay, sample, options):
    """The twin gives every rollout a row of its own and encodes the candidates in every micro-step."""
    runs = []
    for plain in (False, True):
        replay(sample)
        settings = {"per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": 1e-2, "item_temperature": 0.2}
        trainer = make_trainer(
            reward=odd_reward, item_coef=2.0, item_credit="all", shared_prompt=not plain, **(settings | options)
        )
        if plain:
            loss = trainer.item_term.loss
            trainer.item_term.loss = lambda *args, loss=loss: loss(*args[:4], True)
        runs.append(record(trainer).steps)
    for step in range(1 + runs[0][-1].global_step):
        totals = [total([each for each in steps if each.global_step == step]) for steps in runs]
        difference, norm = distance(*totals)
        assert norm > 0.1 and difference < 2e-5 * norm, (step, difference, norm)


def test_a_short_window_at_an_epochs_end_weighs_as_it_would_alone(make_trainer, replay, sample, shop):
    """
    Three micro-batches an epoch: of two to a step the last is alone. With the learning rate 0 it has the loss that it
    has as a step of its own, tokens and item.
    """
    losses = []
    for accumulation in (1, 2):
        replay(sample)
        settings = {"learning_rate": 0.0, "max_steps": -1, "num_train_epochs": 1, "steps_per_generation": 1}
        trainer = make_trainer(
            train=shop["train"].select(range(6)),
            reward=odd_reward,
            item_coef=2.0,
            item_temperature=0.2,
            gradient_accumulation_steps=accumulation,
            **settings,
        )
        steps = record(trainer).steps
        assert len(steps) == 3
        losses.append([step.loss for step in steps])
    assert losses[1] == pytest.approx([losses[0][0] / 2, losses[0][1] / 2, losses[0][2]], abs=1e-6)
    assert abs(losses[0][2]) > 1e-2


def test_reentrant_checkpointing_trains_without_norms_apart(make_trainer, replay, sample):
    """Its backward cannot be run twice."""
    replay(sample)
    more = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    trainer = make_trainer(max_steps=1, watch_steps=1, reward=odd_reward, **more)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["grad_norm"] > 0 and "grad_norm/item" not in log and "table/target_drift" in log


def test_a_group_stays_in_one_micro_batch_through_the_shuffle(make_trainer, replay, sample):
    replay(sample)
    trainer = make_trainer(
        per_device_train_batch_size=4, gradient_accumulation_steps=8, max_steps=3, item_coef=0.0, token_coef=0.0
    )
    notes = record(trainer)
    orders = set()
    for generation in range(3):
        groups = [step.inputs["group"] for step in notes.steps if step.generation == generation]
        assert all(len(group.unique()) == 1 for group in groups)
        orders.add(tuple(int(group[0]) for group in groups))
    assert len(orders) > 1 and all(sorted(order) == list(range(8)) for order in orders)


def test_two_optimizer_steps_a_generation_each_weigh_half_its_tokens(make_trainer, replay, sample):
    """With the learning rate 0 both windows see the same weights: their gradients sum to twice the whole batch's."""
    settings = {"reward": odd_reward, "learning_rate": 0.0, "item_temperature": 0.2}
    replay(sample)
    whole = total(record(make_trainer(per_device_train_batch_size=16, max_steps=1, **settings)).steps)
    replay(sample)
    trainer = make_trainer(
        per_device_train_batch_size=4, gradient_accumulation_steps=2, steps_per_generation=4, max_steps=2, **settings
    )
    steps = record(trainer).steps
    assert "old_item_logprobs" in steps[0].inputs and "old_per_token_logps" in steps[0].inputs
    difference, norm = distance({name: value / 2 for name, value in total(steps).items()}, whole)
    assert difference < 1e-4 * norm


def test_buffered_batches_are_handed_out_again_unchanged(make_trainer, replay, sample):
    replay(sample)
    trainer = make_trainer(
        num_iterations=2, gradient_accumulation_steps=2, per_device_train_batch_size=8, reward=odd_reward
    )
    inner, seen = trainer._compute_loss, []

    def compute(model, inputs):
        before = {name: value.clone() for name, value in inputs.items()}
        loss = inner(model, inputs)
        assert inputs.keys() == before.keys()
        assert all(torch.equal(inputs[name], value) for name, value in before.items())
        seen.append((id(inputs), before))
        return loss

    trainer._compute_loss = compute
    trainer.train()
    assert len(seen) == 4
    for (first, before), (second, after) in zip(seen[:2], seen[2:], strict=True):
        assert first == second and all(torch.equal(after[name], value) for name, value in before.items())


def test_first_iteration_has_ratio_one_and_the_second_does_not(make_trainer, replay, sample, monkeypatch):
    import r2ec_trl.training.item_term as module

    ratios, inner = [], module.clipped_objective

    def noting(logprobs, old, *rest):
        ratios.append((logprobs - old).exp().detach())
        return inner(logprobs, old, *rest)

    monkeypatch.setattr(module, "clipped_objective", noting)
    replay(sample)
    make_trainer(num_iterations=2, reward=odd_reward, learning_rate=1e-2, item_credit="all", max_steps=2).train()
    assert (ratios[0] - 1).abs().max() < 1e-3  # π_old is another forward: right-padded, in fp32 at τ = .02
    assert (ratios[1] - 1).abs().max() > 0.1
    ratios.clear()
    replay(sample)
    make_trainer(reward=odd_reward, learning_rate=1e-2, item_credit="all").train()
    assert all(torch.equal(ratio, torch.ones_like(ratio)) for ratio in ratios)  # no update in between: exactly 1


def test_evaluation_between_two_iterations_leaves_the_item_ratio_alone(make_trainer, replay, sample):
    """Rows are constants of the generation batch here: an evaluation, which encodes them anew, must not reach them."""
    losses = []
    for evaluates in (False, True):
        replay(sample)
        trainer = make_trainer(
            num_iterations=2,
            reward=odd_reward,
            learning_rate=1e-2,
            item_gradient="none",
            item_negatives="catalogue",
            eval_strategy="steps" if evaluates else "no",
            eval_steps=1,
            max_eval_users=2,
        )
        losses.append([step.loss for step in record(trainer).steps])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


# ---------------------------------------------------------------------------------------- answer states and forwards
def test_reward_pass_and_loss_see_the_same_answer_state(make_trainer, replay, sample, model_family, monkeypatch):
    """Right-padded by length there, left-padded beside other prompts here; the reference: alone, without padding."""
    replay(sample)
    trainer = make_trainer(family=model_family, max_steps=1, reward=odd_reward, item_credit="all")
    caught = []
    inner = trainer.item_term.loss

    def noting(states, inputs, *rest):
        caught.append((inputs, states.detach()))
        return inner(states, inputs, *rest)

    trainer.item_term.loss = noting
    trainer._generate_and_score_completions, generate = (
        lambda inputs: {**generate(inputs), "reward_states": trainer.batch.states},
        trainer._generate_and_score_completions,
    )
    trainer.train()
    (inputs, states), *rest = caught
    assert not rest
    rewarded = inputs["reward_states"]  # shuffled together with the rows
    assert (trainer.table.project(states) - rewarded).abs().max() < 1e-5
    assert (rewarded.norm(dim=1) - 1).abs().max() < 1e-5 and rewarded.std(dim=0).max() > 1e-3


def test_answer_states_are_those_of_each_sequence_alone(tiny_model, model_family):
    from r2ec_trl.policy.answer_state import add_answer_state, encode_states

    torch.manual_seed(0)
    sequences = [torch.randint(4, 300, (length,)).tolist() for length in (40, 3, 17, 1, 29)]
    model, plain = tiny_model(model_family), tiny_model(model_family)
    add_answer_state(model)
    with torch.no_grad():
        together = encode_states(model, sequences, pad_token_id=0, token_budget=100)
        alone = torch.stack([forward(plain, ids)[1][-1] for ids in sequences])
        assert (together - alone).abs().max() < 1e-5
        ids = torch.tensor([sequences[0]])
        assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)  # any other call: unchanged


@pytest.mark.parametrize("gradient, most", [("none", 1), ("candidates", 2)])
def test_one_backbone_call_a_micro_step_for_the_rollouts(make_trainer, replay, sample, gradient, most):
    replay(sample)
    trainer = make_trainer(
        item_gradient=gradient, gradient_accumulation_steps=2, max_steps=1, item_credit="all", watch_steps=0
    )
    calls = []
    trainer.model.get_base_model().model.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    inner, counts = trainer._compute_loss, []

    def counting(model, inputs):
        calls.clear()
        loss = inner(model, inputs)
        counts.append(len(calls))
        return loss

    trainer._compute_loss = counting
    trainer.train()
    assert counts == [1, most]  # the candidates once an optimizer step, in its last micro-step


# ----------------------------------------------------------------------------------------------------------- rewards
def test_rewards_see_the_rank_and_probability_of_the_equations(make_trainer, replay, sample, shop, tiny_model):
    """Against a float64 model that encodes the whole catalogue and the rollouts one by one."""
    seen = {}

    def spy(completions, **kwargs):
        seen.update(kwargs, completions=completions)
        return [float(rank) for rank in kwargs["target_rank"]]

    replay(sample)
    trainer = make_trainer(reward=spy, peft=False, max_steps=1, item_temperature=0.05)
    notes = record(trainer)
    (generation,) = notes.generations
    model = double_model(tiny_model("llama"))
    with torch.no_grad():
        rows = torch.stack([unit(forward(model, ids)[1][-1]) for ids in trainer.table.token_ids])
        for i, (prompt, rollout) in enumerate(zip(generation.prompts, generation.rollouts, strict=True)):
            scores = rows @ unit(forward(model, prompt + rollout.ids)[1][-1])
            target = trainer.table.index[seen["target"][i]]
            assert seen["target_rank"][i] == 1 + int((scores > scores[target]).sum())
            assert seen["target_prob"][i] == pytest.approx(torch.softmax(scores / 0.05, 0)[target].item(), rel=1e-3)
            assert seen["target_score"][i] == pytest.approx(scores[target].item(), abs=1e-5)
            order = scores.argsort(descending=True)[:10].tolist()
            assert seen["top_item_ids"][i] == [trainer.table.item_ids[row] for row in order]
    assert seen["num_items"] == [len(shop["items"])] * 8
    assert seen["history_ratings"][0] == generation.rows[0]["history_ratings"]  # every dataset column
    assert seen["completion_ids"] == [rollout.ids for rollout in generation.rollouts]
    assert "target_rank" not in generation.rows[0]  # rewards got a copy


def test_several_rewards_with_weights_none_and_async(make_trainer, replay, sample):
    async def later(completions, **kwargs):
        return [None if i % 2 else 1.0 * i for i in range(len(completions))]

    def nothing(completions, **kwargs):
        return [None] * len(completions)

    replay(sample)
    trainer = make_trainer(reward=["hit", later, nothing], reward_weights=[1.0, 0.5, 2.0], reward_cutoff=20)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["rewards/hit_reward/mean"] is not None and log["rewards/nothing/mean"] is None
    assert log["rewards/later/mean"] == pytest.approx(3.0)
    assert log["reward"] == pytest.approx(log["rewards/hit_reward/mean"] + 0.5 * (0 + 2 + 4 + 6) / 8)
    assert log["grad_norm"] == log["grad_norm"]


def test_leaving_one_out_counts_whom_any_reward_judges(make_trainer, replay, sample):
    """The second reward judges two of four, and gives them 0: all four count, so 4/3 of what TRL makes of them."""

    def all_of_them(completions, **kwargs):
        return [[1.0, 2.0, 6.0, 7.0][i % 4] for i in range(len(completions))]

    def some(completions, **kwargs):
        return [[0.0, None, 0.0, None][i % 4] for i in range(len(completions))]

    replay(sample)
    trainer = make_trainer(reward=[all_of_them, some], advantage="rloo", scale_rewards="none", max_steps=1)
    (generation,) = record(trainer).generations
    assert generation.advantages == pytest.approx([1 - 5, 2 - 14 / 3, 6 - 10 / 3, 7 - 3] * 2)


def test_log_probs_of_the_sampler_stay_with_their_tokens(make_trainer, replay, sample):
    """
    -k for the k-th sampled token: what comes behind the marker is cut with its log-prob, and appended tokens, which
    nobody sampled, have none. Padding ends a rollout as the end-of-sequence token does.
    """
    replay(sample)
    trainer = make_trainer()
    inner, pad = trainer._generate_single_turn, trainer._tokenizer.pad_token_id

    def with_logprobs(*args):
        sampled = [[*ids, pad, pad] if i == 2 else ids for i, ids in enumerate(inner(*args)[0])]
        return sampled, [[-1.0 - k for k in range(len(ids))] for ids in sampled]

    trainer._generate_single_turn = with_logprobs
    output = trainer.roll_out([trainer.train_dataset[0]["prompt"]] * 4)
    for ids, trained, logprobs in zip(output["completion_ids"], output["env_mask"], output["logprobs"], strict=True):
        count = sum(trained)
        assert logprobs == [-1.0 - k for k in range(count)] + [0.0] * (len(ids) - count)
        assert pad not in ids
    assert [rollout.truncated for rollout in output["_rollout"]] == [False] * 4
    assert 0 < sum(output["env_mask"][2]) < len(output["env_mask"][2])


def test_a_rollout_that_no_reward_judges_has_no_advantage_and_the_rest_leave_one_out(make_trainer, replay, sample):
    def partly(completions, **kwargs):
        return [[1.0, 2.0, 6.0, None][i % 4] for i in range(len(completions))]

    replay(sample)
    trainer = make_trainer(reward=partly, advantage="rloo", scale_rewards="none", max_steps=1)
    (generation,) = record(trainer).generations
    assert generation.advantages == pytest.approx([-3.0, -1.5, 4.5, 0.0] * 2)


@pytest.mark.parametrize("value, word", [(float("nan"), "nan"), ("good", "good"), (float("inf"), "inf")])
def test_a_reward_that_is_no_number_is_an_error_that_names_it(make_trainer, replay, sample, value, word):
    def broken_reward(completions, **kwargs):
        return [value] * len(completions)

    replay(sample)
    with pytest.raises(UserError, match=f"broken_reward.*{word}"):
        make_trainer(reward=broken_reward).train()


# ------------------------------------------------------------------------------------------------------- TRL's knobs
LOSSES = [{"loss_type": name} for name in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo")]
KNOBS = [
    *LOSSES,
    {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    {"beta": 0.1},
    {"beta": 0.1, "peft": False, "num_iterations": 2},
    {"scale_rewards": "none"},
    {"scale_rewards": "batch"},
    {"importance_sampling_level": "sequence", "num_iterations": 2},
    {"mask_truncated_completions": True},
    {"log_completions": True, "num_completions_to_print": 1},
    {"num_iterations": 2, "max_steps": 3},
    {"steps_per_generation": 2, "max_steps": 3},
    {"entropy_coef": 0.01},
    {"top_entropy_quantile": 0.5},
    {"delta": 1.5, "epsilon_high": 0.28},
    {"off_policy_mask_threshold": 0.5, "num_iterations": 2},
    {"multi_objective_aggregation": "normalize_then_sum", "reward": ["ndcg", "target_probability"]},
    {"advantage": "rloo", "scale_rewards": "none"},
    {"mask_history": True, "item_negatives": "catalogue"},
    {"gradient_checkpointing": True, "family": "qwen2"},
    {"pad_to_multiple_of": 8, "family": "gemma2"},
    {"similarity": "dot", "item_temperature": 5.0},
    {"table_refresh_budget": 0.05, "watch_steps": 1},
]


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
def test_trains_with_each_knob(make_trainer, replay, sample, knobs, tiny_model_folder):
    replay(sample)
    if knobs.get("peft") is False:  # TRL reads the reference model from where the policy came
        knobs = {**knobs, "model": AutoModelForCausalLM.from_pretrained(tiny_model_folder("llama"))}
    trainer = make_trainer(**knobs)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == trainer.args.max_steps
    assert all(log["grad_norm"] > 0 and abs(log["loss"]) < 1e3 for log in logs)
    after = dict(trainer.model.named_parameters())
    assert any(not torch.equal(after[name], value) for name, value in before.items())
    assert trainer.args.mask_truncated_completions == knobs.get("mask_truncated_completions", False)


def test_truncated_rollouts_are_masked_and_carry_no_item_term(make_trainer, replay, sample):
    """The third of each four is cut at the limit: no token of it is trained, and it is never i*."""

    def third_is_best(completions, **kwargs):
        return [float(i % 4 == 2) for i in range(len(completions))]

    for masks in (False, True):
        replay(sample)
        trainer = make_trainer(reward=third_is_best, mask_truncated_completions=masks, max_steps=1)
        (generation,) = record(trainer).generations
        output = generation.output
        assert [rollout.truncated for rollout in generation.rollouts] == [False, False, True, False] * 2
        assert output["item_weights"].tolist() == ([1, 0, 0, 0] if masks else [0, 0, 1, 0]) * 2
        trained = (output["tool_mask"] * output["completion_mask"]).sum(dim=1)
        assert (trained[[2, 6]] == 0).all() == masks
        assert (trained[[0, 1, 3, 4, 5, 7]] > 0).all()  # TRL's own test of the last id would mask these as well
        assert output["num_items_in_batch"].item() == trained.sum().item()


# ---------------------------------------------------------------------------------------------------------- figures
def test_logged_figures_of_rollouts(make_trainer, replay, sample):
    given = replay(sample)
    trainer = make_trainer(max_steps=1)
    trainer.train()
    log = trainer.state.log_history[0]
    ended = [len(ids) for i, (_, ids) in enumerate(given) if i % 4 != 2]
    assert log["rollout/missing_marker"] == 0.5 and log["rollout/marker_overflow"] == 0
    assert log["completions/clipped_ratio"] == 0.25
    assert log["completions/max_terminated_length"] <= max(ended)
    assert {
        "time/generate",
        "time/score",
        "time/items",
        "time/train",
        "grad_norm/token",
        "grad_norm/item",
    } <= log.keys()
    assert {"item/loss", "item/logprob", "item/clip_ratio", "item/mean_pairwise_cosine"} <= log.keys()
    assert {"recommendation/hit@10", "recommendation/mean_log_rank", "table/target_drift"} <= log.keys()
    parts = [log[f"time/{part}"] for part in ("generate", "sync", "score", "items", "train")]
    assert sum(parts) == pytest.approx(log["step_time"]) and min(parts) >= 0 and log["step_time"] > 0
    assert trainer.last_rollout_example["rank"] >= 1 and len(trainer.last_rollout_example["top_titles"]) == 10


def test_gradient_norms_apart_are_those_of_each_term_alone(make_trainer, replay, sample):
    norms = {}
    for name, coefs in {"token": {"item_coef": 0.0}, "item": {"token_coef": 0.0}, "both": {}}.items():
        replay(sample)
        trainer = make_trainer(max_steps=1, reward=odd_reward, **coefs)
        steps = record(trainer).steps
        norms[name] = (
            distance(total(steps), {k: 0 * v for k, v in total(steps).items()})[0],
            trainer.state.log_history[0],
        )
    assert norms["both"][1]["grad_norm/token"] == pytest.approx(norms["token"][0], rel=1e-4)
    assert norms["both"][1]["grad_norm/item"] == pytest.approx(norms["item"][0], rel=1e-3)


def test_without_a_credited_item_its_norm_is_not_told_as_zero(make_trainer, replay):
    """Every rollout is cut at the limit and masked: a norm of 0 would be averaged into the log."""
    replay(lambda prompt_ids, number: [50 + number] * 8)
    trainer = make_trainer(max_steps=1, watch_steps=1, reward=odd_reward, mask_truncated_completions=True)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["item/loss"] == 0 and "table/target_drift" in log
    assert not {"grad_norm/item", "grad_norm/token", "item/logprob", "item/clip_ratio"} & log.keys()


def test_table_figures_under_a_small_budget(make_trainer, replay, sample):
    """Only a slice fits: the targets are fresh all the same, and the drift of the rest is told."""
    replay(sample)
    trainer = make_trainer(table_refresh_budget=0.02, watch_steps=1, learning_rate=1e-2, max_steps=3)
    trainer.train()
    drifts = [log["table/target_drift"] for log in trainer.state.log_history if "loss" in log]
    assert drifts[0] == 0 and drifts[1] > 0


def fresh_rows(trainer):
    """How many rows of the table are those of the weights as they are."""
    from r2ec_trl.items.encoding import make_encoder

    with torch.no_grad():
        encoder = make_encoder(trainer.model, trainer.prompts, 9_999)
        now = trainer.table.project(encoder(trainer.table.token_ids))
    return sum(torch.allclose(a, b, atol=1e-5) for a, b in zip(trainer.table.rows, now, strict=True))


@pytest.mark.parametrize("every, expected", [(None, [40, 2, 2, 2]), (2, [40, 2, 40, 2]), (1, [40, 40, 40, 40])])
def test_the_whole_table_is_fresh_every_so_many_steps(make_trainer, replay, sample, every, expected):
    """Without a budget, two targets a step are all that is fresh in between; counted as the rewards are given."""
    counts = []

    def reward(completions, **kwargs):
        counts.append(fresh_rows(trainer))
        return [0.1 * i for i in range(len(completions))]

    replay(sample)
    trainer = make_trainer(
        reward=reward, table_refresh_steps=every, table_refresh_budget=0.0, learning_rate=1e-2, max_steps=4
    )
    trainer.train()
    assert counts == expected


def test_a_budget_goes_round_the_table(make_trainer, replay, sample, monkeypatch):
    """Eight rows a step besides the targets: after five steps every row was encoded since the first."""
    from r2ec_trl.items.table import ItemTable

    inner, refreshed = ItemTable.refresh, []
    monkeypatch.setattr(
        ItemTable,
        "refresh",
        lambda self, encoder, indices=None: (refreshed.append(indices), inner(self, encoder, indices))[1],
    )
    replay(sample)
    trainer = make_trainer(table_refresh_budget=0.25, max_steps=8)
    trainer.train()
    slices = [set(rows) for rows in refreshed[1::2]]
    assert refreshed[0] is None and all(slices) and None not in refreshed[1:]
    assert set.union(*slices, *(set(rows) for rows in refreshed[2::2])) == set(range(40))


def test_rollouts_for_display_are_of_different_users(make_trainer, replay, sample):
    replay(sample)
    for number, users in {None: 1, 2: 2, 9: 2}.items():
        trainer = make_trainer(num_completions_to_print=number, max_steps=1)
        trainer.train()
        shown = trainer.last_rollouts
        assert len({rollout["user_id"] for rollout in shown}) == len(shown) == users
        assert trainer.last_rollout_example == shown[0]


@pytest.mark.parametrize(
    "options",
    [{}, {"advantage": "rloo", "scale_rewards": "none"}, {"multi_objective_aggregation": "normalize_then_sum"}],
    ids=str,
)
def test_equal_rewards_teach_nothing_and_break_nothing(make_trainer, replay, sample, options):
    def same(completions, **kwargs):
        return [0.3] * len(completions)

    replay(sample)
    trainer = make_trainer(reward=same, max_steps=1, weight_decay=0.0, **options)
    (generation,) = record(trainer).generations
    assert generation.advantages == pytest.approx([0.0] * 8, abs=1e-3)
    log = trainer.state.log_history[0]
    assert log["frac_reward_zero_std"] == log["rollout/no_signal"] == 1.0 and log["loss"] == pytest.approx(
        0.0, abs=1e-3
    )
    assert log["grad_norm"] == pytest.approx(0.0, abs=1e-2)
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_rewards_that_cancel_out_still_teach_where_they_are_normalised_apart(make_trainer, replay):
    """2 a + b is 2 for every rollout, but each has deviation 1 (or 2) of its own: 2 (±1) ∓ 1 is left."""

    def a(completions, **kwargs):
        return [float(i % 4 > 1) for i in range(len(completions))]

    def b(completions, **kwargs):
        return [2.0 * (i % 4 < 2) for i in range(len(completions))]

    signal = {}
    for kind in ("normalize_then_sum", "sum_then_normalize"):
        replay(lambda prompt_ids, number: [50 + number, 60, 70, 80])
        options = {"multi_objective_aggregation": kind, "reward_weights": [2.0, 1.0], "max_steps": 1}
        trainer = make_trainer(reward=[a, b], **options)
        (generation,) = record(trainer).generations
        signal[kind] = [round(one, 1) for one in generation.advantages]
        assert trainer.state.log_history[0]["rollout/no_signal"] == (kind == "sum_then_normalize")
    assert signal == {"normalize_then_sum": [-0.9, -0.9, 0.9, 0.9] * 2, "sum_then_normalize": [0.0] * 8}


def test_the_logged_item_loss_is_a_steps_however_it_is_split(make_trainer, replay):
    """With the tokens left out it is the whole loss."""
    losses = []
    for rows, accumulation in ((8, 1), (2, 4)):
        replay(lambda prompt_ids, number: [50 + number, 60, 70, 80])
        options = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulation}
        torch.manual_seed(0)
        trainer = make_trainer(reward=odd_reward, token_coef=0.0, max_steps=1, **options)
        trainer.train()
        log = trainer.state.log_history[0]
        assert log["item/loss"] == pytest.approx(log["loss"], rel=1e-4) and abs(log["loss"]) > 0.01
        losses.append(log["item/loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("size", [2, 4])
def test_a_user_gets_as_many_rollouts_as_are_asked_for(make_trainer, size):
    trainer = make_trainer(num_generations=size, per_device_train_batch_size=8, max_steps=1)
    (generation,) = record(trainer).generations
    users = [row["user_id"] for row in generation.rows]
    assert [users.count(user) for user in dict.fromkeys(users)] == [size] * (8 // size)
    assert users == sorted(users, key=users.index)  # side by side


# ---------------------------------------------------------------------------------------------------- loss types
@pytest.mark.parametrize("name", ["grpo", "sapo", "bnpo", "dr_grpo", "luspo", "cispo", "vespo"])
def test_an_item_weighs_like_one_more_token_under_each_loss_type(make_trainer, replay, monkeypatch, name):
    """
    At ratio 1 the gradient of every loss type is -w Σ A ∇log π, and the item's is -w A ∇log π: both norms grow alike
    from dapo's, whose w is 1 / (32 tokens). CISPO caps the ratio at `epsilon_high`, .2 by default, for both.
    """

    def measure(loss_type, processes=1):
        replay(lambda prompt_ids, number: [50 + number, 60, 70, 80])
        level = "sequence" if loss_type == "luspo" else "token"
        torch.manual_seed(0)
        trainer = make_trainer(loss_type=loss_type, importance_sampling_level=level, max_steps=1, watch_steps=0)
        inner, item, norms = trainer._compute_loss, trainer.item_term.loss, []

        def norm(loss):
            parameters = [p for p in trainer.model.parameters() if p.requires_grad]
            gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            return sum(g.square().sum() for g in gradients if g is not None).sqrt().item()

        def item_loss(*args):
            result = item(*args)
            norms.append(result[0])
            return result

        def compute(model, inputs):
            advantages = torch.zeros_like(inputs["advantages"])
            advantages[inputs["item_weights"].argmax()] = 1.0
            with monkeypatch.context() as patch:
                patch.setattr(type(trainer.accelerator), "num_processes", processes)
                loss = inner(model, {**inputs, "advantages": advantages})
            norms[:] = norm(norms[0]), norm(loss - norms[0])
            return loss

        trainer._compute_loss, trainer.item_term.loss = compute, item_loss
        trainer.train()
        return norms

    item, tokens = measure("dapo")
    other_item, other_tokens = measure(name, processes=3)  # the world's size is in both, or in neither
    assert other_item / item == pytest.approx(other_tokens / tokens, rel=1e-3) and min(item, tokens) > 0.01


# ------------------------------------------------------------------------------------------------------------ errors
def test_users_mistakes_are_one_sentence(make_trainer, shop, replay, sample):
    with pytest.raises(UserError, match="fewer than the 2 of one generation batch"):
        make_trainer(train=shop["train"].select([0]))
    with pytest.raises(UserError, match="empty"):
        make_trainer(train=shop["train"].select([]))
    with pytest.raises(UserError, match="2 reward functions, but 1"):
        make_trainer(reward=["ndcg", "hit"], reward_weights=[1.0])
    with pytest.raises(UserError, match="tools"):
        make_trainer_with(make_trainer, tools=[len])
    replay(sample)
    same = Dataset.from_list([shop["train"][0]] * 2)
    with pytest.raises(UserError, match="share one target"):
        make_trainer(train=same).train()
    outside = Dataset.from_list([{**shop["train"][0], "target": "i99"}, shop["train"][1]])
    with pytest.raises(UserError, match="'i99' is not in the catalogue"):
        make_trainer(train=outside).train()


def make_trainer_with(make_trainer, **kwargs):
    """The fixture's trainer, built again with keyword arguments of TRL's trainer."""
    from r2ec_trl.training.recpo_trainer import RecPOTrainer

    trainer = make_trainer()
    return RecPOTrainer(
        trainer.model.get_base_model(),
        Dataset.from_dict({"item_id": ["a", "b"], "title": ["a", "b"]}),
        args=trainer.args,
        train_dataset=Dataset.from_list([{"user_id": "u", "history": ["a"], "target": "b"}] * 2),
        processing_class=trainer.processing_class,
        **kwargs,
    )


# --------------------------------------------------------------------------------------------------------- it learns
class Rewards(TrainerCallback):
    def __init__(self):
        self.values = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "reward" in (logs or {}):
            self.values.append(logs["reward"])


@pytest.mark.parametrize("item_coef", [0.0, 1.0])
def test_reward_rises(make_trainer, shop, tiny_model, item_coef):
    """
    Two users, real sampling, a reward on the target's probability. Without the item term only the head that writes is
    trained: answer states then move by nothing but the words that are chosen.
    """
    model = tiny_model("llama")
    for name, parameter in model.named_parameters():
        parameter.requires_grad = bool(item_coef) or name.startswith("lm_head")
    before, rewards = model.lm_head.weight.detach().clone(), Rewards()
    trainer = make_trainer(
        model=model,
        peft=False,
        reward="target_probability",
        train=shop["train"].select([0, 1]),
        per_device_train_batch_size=32,
        num_generations=16,
        max_completion_length=4,
        user_template="{history}",
        item_coef=item_coef,
        item_negatives="catalogue",
        item_temperature=0.1,
        max_steps=10 if item_coef else 28,
        learning_rate=3e-4 if item_coef else 2e-2,
        lr_scheduler_type="constant",
        callbacks=[rewards],
        watch_steps=0,
    )
    trainer.train()
    assert not torch.equal(model.lm_head.weight, before)
    assert sum(rewards.values[-4:]) > 1.4 * sum(rewards.values[:4]), rewards.values
