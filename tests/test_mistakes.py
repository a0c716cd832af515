"""
What the reference implementation gets wrong. One test a mistake, and each is tried with the mistake put
back, which must turn it red: `goes_red` runs the same check under a patch that repeats it. Mistakes 2, 3 and the vLLM
side of 12 belong to tests/test_vllm.py, 9's process count to tests/test_distributed.py, 19 to tests/data,
the rest to test_mistakes_data.py.
"""

import dataclasses
import random

import pytest
import torch
from datasets import Dataset
from oracle import advantages_of, distance, goes_red, record, row_of
from transformers import LogitsProcessorList

import r2ec_trl.training.item_term as item_term
import r2ec_trl.training.recpo_trainer as recpo_trainer
from r2ec_trl.errors import UserError
from r2ec_trl.items.encoding import make_encoder
from r2ec_trl.items.table import ItemTable
from r2ec_trl.policy.rollouts import MarkerReader

SIZE = 4


def odd_reward(completion_ids, **kwargs):
    return [(sum(ids) * 37 + len(ids)) % 101 / 101 for ids in completion_ids]


@pytest.fixture
def sample(chat_tokenizer):
    """Rollouts of different lengths; every second one ends without a marker."""
    marker = chat_tokenizer("<answer>", add_special_tokens=False)["input_ids"]

    def draw(prompt_ids, number):
        dice = random.Random(f"{prompt_ids}{number}")
        words = [dice.randrange(10, 300) for _ in range(dice.randrange(2, 8))]
        return [words + marker, words + [chat_tokenizer.eos_token_id]][number % 2]

    return draw


@pytest.fixture
def run(make_trainer, replay, sample):
    """Train one step on replayed rollouts, one a micro-batch; returns the trainer and what it did."""

    def go(change=None, **settings):
        replay(sample)
        defaults = {
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 8,
            "max_steps": 1,
            "reward": odd_reward,
            "item_temperature": 0.2,
        }
        trainer = make_trainer(**{**defaults, **settings})
        if change is not None:
            change(trainer)
        return trainer, record(trainer)

    return go


def by_rollout(notes) -> dict:
    return {row_of(step.inputs, notes.generations[0], 0): step.gradient for step in notes.steps}


def size(gradient) -> float:
    return distance(gradient, {name: torch.zeros_like(value) for name, value in gradient.items()})[0]


def test_1_advantages_weigh_each_trajectory(run, monkeypatch):
    """(B,1,1) x (B,S) sums to ΣA = 0: no token gradient; in the item term, the same gradient for every trajectory."""

    def check(change=None, credit="best"):
        _, notes = run(change, item_coef=0.0)
        assert all(size(gradient) > 1e-3 for gradient in by_rollout(notes).values())
        _, notes = run(change, token_coef=0.0, item_gradient="none")  # rows get theirs in the last micro-step
        advantages = notes.generations[0].advantages
        best = {max(range(start, start + SIZE), key=lambda i: advantages[i]) for start in (0, SIZE)}
        assert {i for i, gradient in by_rollout(notes).items() if size(gradient) > 1e-4} == best

    check()

    def broadcast(trainer):
        inner = trainer._generate_and_score_completions

        def generate(inputs):
            output = inner(inputs)
            total = output["advantages"].sum().expand_as(output["advantages"])
            return {**output, "advantages": total, "item_weights": torch.ones_like(output["item_weights"])}

        trainer._generate_and_score_completions = generate

    with goes_red():
        check(broadcast)


def test_4_the_longest_row_keeps_its_last_token(make_trainer, replay, sample):
    """Trimmed by one, the state in the loss is not the state that was rewarded."""

    def check(trim=False):
        replay(sample)
        trainer = make_trainer(max_steps=1, item_credit="all", reward=odd_reward)
        inner, generate = trainer._compute_loss, trainer._generate_and_score_completions
        item_loss = trainer.item_term.loss
        trainer._generate_and_score_completions = lambda inputs: {**generate(inputs), "rewarded": trainer.batch.states}

        def compute(model, inputs):
            if trim:
                names = ("completion_ids", "completion_mask", "tool_mask")
                inputs = {**inputs, **{name: inputs[name][:, :-1] for name in names}}
            return inner(model, inputs)

        def compare(states, inputs, *rest):
            assert (trainer.table.project(states.detach()) - inputs["rewarded"]).abs().max() < 1e-5
            return item_loss(states, inputs, *rest)

        trainer._compute_loss, trainer.item_term.loss = compute, compare
        trainer.train()

    check()
    with goes_red():
        check(trim=True)


def test_5_rloo_is_leave_one_out_and_sums_to_zero(run, monkeypatch):
    def check():
        _, notes = run(advantage="rloo", scale_rewards="none")
        (generation,) = notes.generations
        rewards = odd_reward([rollout.ids for rollout in generation.rollouts])
        assert generation.advantages == pytest.approx(advantages_of(rewards, SIZE, "rloo"), abs=1e-6)
        assert abs(sum(generation.advantages)) < 1e-5

    check()
    monkeypatch.setattr(recpo_trainer, "rloo_factor", lambda sizes: 1 + 1 / sizes.float())
    with goes_red():
        check()


def test_8_old_log_probs_are_kept_so_clipping_acts(make_trainer, replay, sample):
    def check(forget=False):
        replay(sample)
        trainer = make_trainer(
            num_iterations=2, learning_rate=1e-2, item_credit="all", reward=odd_reward, max_steps=2, watch_steps=0
        )
        inner = trainer._generate_and_score_completions

        def generate(inputs):
            return {k: v for k, v in inner(inputs).items() if not (forget and k.startswith("old_"))}

        trainer._generate_and_score_completions = generate
        trainer.train()
        first, second = trainer.state.log_history[:2]
        assert first["item/clip_ratio"] == 0 and first["clip_ratio/region_mean"] == 0
        assert second["item/clip_ratio"] > 0 and second["clip_ratio/region_mean"] > 0

    check()
    with goes_red():
        check(forget=True)


def test_9_the_gradient_does_not_depend_on_the_micro_batch(run):
    def check(change=None):
        totals = []
        for batch, accumulation in ((8, 1), (2, 4)):
            options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
            _, notes = run(change, **options, item_coef=5.0)
            totals.append({name: sum(step.gradient[name] for step in notes.steps) for name in notes.steps[0].gradient})
        difference, norm = distance(*totals)
        assert difference < 1e-5 * norm

    check()

    def per_micro_batch(trainer):
        inner = trainer.item_term.loss

        def item_loss(states, inputs, batch, normalizer, *rest):
            local = (inputs["tool_mask"] * inputs["completion_mask"]).sum().float()
            return inner(states, inputs, batch, normalizer * local / inputs["num_items_in_batch"], *rest)

        trainer.item_term.loss = item_loss

    with goes_red():
        check(per_micro_batch)


def test_10_scored_tokens_are_the_sampled_ones(run, sample, chat_tokenizer, monkeypatch):
    """Random ids rarely survive decoding and encoding again."""

    def check():
        _, notes = run()
        (generation,) = notes.generations
        masks, rows = (generation.output[name] for name in ("completion_mask", "completion_ids"))
        for i, (prompt, rollout) in enumerate(zip(generation.prompts, generation.rollouts, strict=True)):
            sampled = [token for token in sample(prompt, i % SIZE) if token != chat_tokenizer.eos_token_id]
            assert rows[i][masks[i].bool()].tolist() == rollout.ids
            assert rollout.ids == sampled + ([] if rollout.has_marker else chat_tokenizer.encode("<answer>"))

    check()
    inner = MarkerReader.finish

    def as_text(self, ids, end_ids):
        return inner(self, self.tokenizer(self.text(ids), add_special_tokens=False)["input_ids"], end_ids)

    monkeypatch.setattr(MarkerReader, "finish", as_text)
    with goes_red():
        check()


def test_11_an_appended_marker_is_not_trained(run, monkeypatch):
    def check():
        _, notes = run()
        (generation,) = notes.generations
        masks = generation.output["tool_mask"] * generation.output["completion_mask"]
        for i, (rollout, mask) in enumerate(zip(generation.rollouts, masks, strict=True)):
            assert rollout.has_marker == (i % 2 == 0)
            appended = 0 if rollout.has_marker else 6
            assert mask.sum() == len(rollout.ids) - appended
        assert generation.output["num_items_in_batch"] == masks.sum()

    check()
    inner = MarkerReader.finish

    def finish(self, ids, end_ids):
        rollout = inner(self, ids, end_ids)
        return dataclasses.replace(rollout, trained=[1] * len(rollout.ids))

    monkeypatch.setattr(MarkerReader, "finish", finish)
    with goes_red():
        check()


def test_12_transformers_stops_at_the_marker_too(make_trainer, tiny_model, chat_tokenizer, monkeypatch):
    """The backend itself ends each row there, rather than writing on until the limit."""
    marker = chat_tokenizer("<answer>", add_special_tokens=False)["input_ids"]

    def check():
        model, steps = tiny_model("llama"), []
        inner = model.generate

        def generate(*args, **kwargs):
            prompt_length = kwargs["input_ids"].shape[1]

            def write_markers(ids, scores):
                steps.append(ids.shape[1] - prompt_length)
                wanted = marker[steps[-1] % len(marker)]
                return torch.full_like(scores, -torch.inf).index_fill_(1, torch.tensor([wanted]), 0.0)

            return inner(*args, logits_processor=LogitsProcessorList([write_markers]), **kwargs)

        model.generate = generate
        trainer = make_trainer(model=model, peft=False, max_completion_length=30)
        trainer.model.train()
        ids = trainer.roll_out([[{"role": "user", "content": "drum"}]] * 4)["completion_ids"]
        assert ids == [marker] * 4
        assert len(steps) == len(marker)

    check()
    monkeypatch.setattr(recpo_trainer, "stop_generate_at_marker", lambda model, reader: None)
    with goes_red():
        check()


def test_14_the_reward_sees_fresh_target_rows(make_trainer, replay, sample, monkeypatch):
    """No budget for the rest of the table: the batch's targets are encoded before they are scored all the same."""

    def check():
        replay(sample)
        seen = {}

        def reward(completion_ids, **kwargs):
            seen.update(kwargs)
            return odd_reward(completion_ids)

        trainer = make_trainer(table_refresh_budget=0.0, learning_rate=1e-2, max_steps=2, reward=reward)
        trainer.train()
        encoder = make_encoder(trainer.model, trainer.prompts, 9_999)
        states_then = trainer.table.rows.clone()
        trainer._generate_and_score_completions([dict(trainer.train_dataset[i // 4]) for i in range(8)])
        with torch.no_grad():
            now = trainer.table.project(encoder(trainer.table.token_ids))
        fresh = [row for row in range(40) if torch.allclose(trainer.table.rows[row], now[row], atol=1e-5)]
        assert set(trainer.batch.candidates) <= set(fresh) and len(fresh) < 40
        assert not torch.allclose(states_then[trainer.batch.candidates], now[trainer.batch.candidates], atol=1e-5)
        scores = (trainer.batch.states * now[trainer.batch.targets]).sum(dim=1)
        assert seen["target_score"] == pytest.approx(scores.tolist(), abs=1e-5)  # what the reward really saw

    check()
    inner = ItemTable.refresh
    monkeypatch.setattr(
        ItemTable, "refresh", lambda self, encoder, indices=None: inner(self, encoder) if self.is_empty else None
    )
    with goes_red():
        check()


def test_14_a_target_that_two_users_share_is_no_negative(run, shop, monkeypatch):
    rows = shop["train"].to_list()
    twin = next(row for row in rows[1:] if row["target"] == rows[0]["target"])
    other = next(row for row in rows[1:] if row["target"] != rows[0]["target"])
    train = Dataset.from_list([rows[0], twin, other])

    def check():
        trainer, notes = run(train=train, gradient_accumulation_steps=12, token_coef=0.0, item_temperature=1.0)
        assert len(trainer.batch.candidates) == 2 and sorted(set(trainer.batch.candidates)) == trainer.batch.candidates
        # two candidates at τ = 1: log-softmax of a cosine in [-1, 1] is above -2.13; three with a twin would be lower
        assert all(log["item/logprob"] > -1.0 for log in trainer.state.log_history if "item/logprob" in log)

    check()
    inner = item_term.candidate_logprobs
    monkeypatch.setattr(
        item_term,
        "candidate_logprobs",
        lambda states, rows, positions, tau: inner(states, rows.repeat(6, 1), positions, tau),
    )
    with goes_red():
        check()


def test_15_out_of_memory_is_never_swallowed(make_trainer, replay, sample):
    for name in ("item_term.loss", "item_term.candidate_rows", "reward_pass.refresh"):
        replay(sample)
        trainer = make_trainer()
        owner, name = name.split(".")

        def explode(*args, **kwargs):
            raise torch.OutOfMemoryError("out of memory")

        setattr(getattr(trainer, owner), name, explode)
        with pytest.raises(UserError, match="Out of memory"):
            trainer.train()
        assert trainer.state.global_step == 0
