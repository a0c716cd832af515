"""The generated shop, its oracle, the judge of reasonings, and the policy that ships with the package."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from r2ec_trl.data.demo import (
    BRANDS,
    COLOURS,
    DEMO_POLICY,
    DEMO_PROMPTS,
    FAMILIES,
    STAGES,
    DemoWorld,
    demo_items,
    demo_users,
    make_demo,
    next_item_probabilities,
    oracle_ranks,
    right_reasoning,
    write_reasoning,
)
from r2ec_trl.data.schema import load_dataset_card, load_dataset_folder, save_dataset_folder
from r2ec_trl.errors import UserError
from r2ec_trl.evaluation.users import evaluate_users
from r2ec_trl.items.encoding import make_encoder, make_table
from r2ec_trl.items.scoring import normalise
from r2ec_trl.metrics import ndcg_at_k
from r2ec_trl.policy.answer_state import add_answer_state, encode_states
from r2ec_trl.policy.prompts import PromptConfig, Prompts

RECIPES = Path(__file__).parents[2] / "recipes"


def item(family: str, stage: str, brand: str, colour: str = "blue") -> str:
    """Item id by its attributes, found in the catalogue."""
    items = demo_items()
    return items["item_id"][items["title"][:].index(f"{brand} {colour} {family} {stage}")]


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("make_demo_policy", RECIPES / "make_demo_policy.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def policy():
    model = AutoModelForCausalLM.from_pretrained(DEMO_POLICY).eval()
    add_answer_state(model)
    return model, AutoTokenizer.from_pretrained(DEMO_POLICY)


def test_the_catalogue_has_every_combination_once():
    items = demo_items()
    combinations = set(zip(items["family"], items["stage"], items["brand"], items["colour"], strict=True))
    assert len(items) == len(combinations) == len(FAMILIES) * len(STAGES) * len(BRANDS) * len(COLOURS) == 600
    assert items["item_id"][:] == [f"d{number:03d}" for number in range(600)]
    assert len(set(items["title"])) == 600


def test_the_seed_decides_everything_and_splits_are_apart():
    first, again, other = (make_demo(seed, None, 50, 20, 20)[0] for seed in (0, 0, 1))
    for split in ("train", "validation", "test"):
        assert first[split][:] == again[split][:]
        assert first[split]["history"][:] != other[split]["history"][:]
    ids = [set(first[split]["user_id"]) for split in ("train", "validation", "test")]
    ids.append(set(demo_users("policy", 50)["user_id"]))
    assert sum(map(len, ids)) == len(set.union(*ids))
    # More users do not change the ones before them, and no split repeats another's draws.
    assert demo_users("train", 60).select(range(50))[:] == first["train"][:]
    assert demo_users("policy", 20)["history"][:] != first["test"]["history"][:]


def test_a_project_buys_its_stages_in_order_and_the_truth_is_the_next_one():
    items = demo_items()
    for row in demo_users("train", 200):
        project = [items[int(i[1:])] for n, i in enumerate(row["history"]) if n not in row["true_strays"]]
        assert [bought["stage"] for bought in project] == list(STAGES[: len(project)])
        assert {bought["family"] for bought in project} == {row["true_family"]}
        assert row["true_stage"] == STAGES[len(project)]
        times = [*row["history_timestamps"], row["timestamp"]]
        assert times == sorted(times) and len(row["history_ratings"]) == len(row["history"])


def test_the_shares_are_those_of_the_world():
    items, rows = demo_items(), demo_users("train", 2000)
    targets = [items[int(target[1:])] for target in rows["target"]]
    on_project = [
        t["family"] == row["true_family"] and t["stage"] == row["true_stage"]
        for t, row in zip(targets, rows, strict=True)
    ]
    # A stray target hits the project's family and stage by chance, 1 of 30: .9 + .1 / 30 = .903; 3 SE = .02.
    assert np.mean(on_project) == pytest.approx(0.903, abs=0.02)
    liked = [t["brand"] == row["true_brand"] for t, row, on in zip(targets, rows, on_project, strict=True) if on]
    assert np.mean(liked) == pytest.approx(0.85, abs=0.025)
    assert np.bincount([len(strays) for strays in rows["true_strays"]]) / 2000 == pytest.approx(
        [0.2, 0.5, 0.3], abs=0.04
    )


def test_it_is_an_ordinary_dataset_folder(tmp_path):
    dataset, card = make_demo(0, None, 10, 5, 5)
    save_dataset_folder(dataset, tmp_path / "demo", card)
    loaded, card = load_dataset_folder(tmp_path / "demo"), load_dataset_card(tmp_path / "demo")
    assert loaded["test"][:] == dataset["test"][:]
    assert card["synthetic"] and card["counts"] == {"train": 10, "validation": 5, "test": 5, "items": 600}


def test_oracle_by_hand_one_purchase():
    """One purchase of strings: it is the project. The brand is liked with .85, and bought again with
    .85² + 4 × .0375² = .728125, in one of four colours; any item is a stray target with .1 / 600."""
    probabilities = next_item_probabilities([item("guitar", "strings", "fenta")])
    assert probabilities.sum() == pytest.approx(1)
    wanted = int(item("guitar", "tuner", "fenta", "red")[1:])
    assert probabilities[wanted] == pytest.approx(0.9 * 0.728125 / 4 + 0.1 / 600)
    assert probabilities[int(item("banjo", "tuner", "fenta")[1:])] == pytest.approx(0.1 / 600)


def test_oracle_by_hand_two_candidates():
    """Two strings of different families: either may be the stray one, so each family's tuner gets half."""
    history = [item("guitar", "strings", "fenta"), item("banjo", "strings", "velka")]
    probabilities = next_item_probabilities(history).reshape(6, 5, 5, 4)
    by_family = probabilities[:, STAGES.index("tuner")].sum(axis=(1, 2))  # 20 items a family, .1 × 20 / 600 by chance
    assert by_family[[0, 1]] == pytest.approx([0.45 + 0.1 / 30] * 2)
    assert by_family[2:] == pytest.approx([0.1 / 30] * 4)


def test_oracle_by_hand_stage_in_order():
    """Strings then tuner of one family and brand: the case that both are the project against the tuner being stray.
    Both: P(0 strays) .2 × 150² × mean over liked brands of P²; one: P(1 stray) .5 / 2 × 150 × mean of P = .2."""
    history = [item("guitar", "strings", "fenta"), item("guitar", "tuner", "fenta")]
    both = 0.2 * 150**2 * (0.85**2 + 4 * 0.0375**2) / 5
    one = 0.5 / 2 * 150 * 0.2
    by_stage = next_item_probabilities(history).reshape(6, 5, -1)[0].sum(axis=1)
    assert by_stage[STAGES.index("strap")] == pytest.approx(0.9 * both / (both + one) + 0.1 / 30)
    assert by_stage[STAGES.index("tuner")] == pytest.approx(0.9 * one / (both + one) + 0.1 / 30)


def test_oracle_is_calibrated():
    """Under the true posterior p, the mean of p(target) and of Σ p² agree."""
    rows = demo_users("train", 1500, seed=5)
    probabilities = np.stack([next_item_probabilities(history) for history in rows["history"]])
    of_target = probabilities[np.arange(1500), [int(target[1:]) for target in rows["target"]]]
    difference = of_target - (probabilities**2).sum(axis=1)
    assert abs(difference.mean()) < 3 * difference.std() / 1500**0.5


def test_masked_oracle_ranks_leave_out_what_was_bought():
    rows = list(demo_users("test", 40, seed=3))
    plain, masked = oracle_ranks(rows), oracle_ranks(rows, masked=True)
    for row, before, after in zip(rows, plain, masked, strict=True):
        bought = set(row["history"])
        assert after == 601 if row["target"] in bought else before - len(bought) <= after <= before
    assert (masked < plain).any()


def test_oracle_ranks_break_ties_by_catalogue_order():
    history = [item("guitar", "strings", "fenta")]
    rows = [{"history": history, "target": item("guitar", "tuner", "fenta", colour)} for colour in COLOURS]
    assert oracle_ranks(rows).tolist() == [1, 2, 3, 4]
    assert oracle_ranks([{"history": history, "target": item("guitar", "tuner", "orrin")}])[0] == 5


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: DemoWorld(brand_loyalty=1.5), "no probability"),
        (lambda: DemoWorld(stray_counts=(0.5, 0.1)), "do not sum to 1"),
        (lambda: demo_users("dev", 3), "no split 'dev'"),
        (lambda: next_item_probabilities([item("guitar", "case", "fenta")]), "cannot come from the demo's shop"),
    ],
)
def test_mistakes_are_said_in_one_sentence(call, words):
    with pytest.raises(UserError, match=words):
        call()


def test_right_reasoning():
    truth = {"true_family": "guitar", "true_stage": "strap"}
    assert right_reasoning(write_reasoning("guitar", "strap", "fenta") + "\n<answer>", truth) == {
        "family": True,
        "stage": True,
    }
    assert right_reasoning(write_reasoning("cello", "strap", "fenta"), truth) == {"family": False, "stage": True}
    assert right_reasoning("<answer>", truth) == {"family": False, "stage": False}
    assert right_reasoning("guitar strap", truth) == {"family": False, "stage": False}
    hedged = "the project is guitar . the project is cello . the next step is strap ."
    assert right_reasoning(hedged, truth) == {"family": False, "stage": True}


def test_policy_is_small_and_of_the_shape_that_every_backend_takes(policy):
    model, tokenizer = policy
    files = {path.name: path.stat().st_size for path in DEMO_POLICY.iterdir()}
    assert sum(files.values()) < 8e6 and not any(name.endswith((".bin", ".pt", ".pkl")) for name in files)
    assert model.dtype == torch.float32 and model.config.tie_word_embeddings
    assert model.config.hidden_size // model.config.num_attention_heads >= 32
    assert tokenizer.eos_token_id is not None and tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    text = "né 日本 <answer> \n\t{}"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text  # byte-level: any text comes back
    assert "home" not in (DEMO_POLICY / "tokenizer_config.json").read_text()
    assert json.loads((DEMO_POLICY / "config.json").read_text())["model_type"] == "llama"


def test_policy_prompts_are_short_and_the_marker_is_several_tokens(policy):
    dataset, _ = make_demo(0, None, 1, 50, 1)
    prompts = Prompts(policy[1], DEMO_PROMPTS, dataset["items"])
    assert len(prompts.marker_ids) > 1
    assert max(len(prompts.user_ids(row)) for row in dataset["validation"]) < DEMO_PROMPTS.max_prompt_length / 1.5
    assert {len(prompts.item_ids(row)) for row in dataset["items"].select(range(0, 600, 37))} == {15}


def test_the_answer_state_points_at_the_items_that_the_reasoning_names(policy):
    model, tokenizer = policy
    dataset, _ = make_demo(0, None, 1, 40, 1)
    prompts = Prompts(tokenizer, DEMO_PROMPTS, dataset["items"])
    rollouts = []
    for row in dataset["validation"]:
        text = write_reasoning(row["true_family"], row["true_stage"], row["true_brand"])
        rollouts.append(prompts.user_ids(row) + tokenizer(f"{text}\n")["input_ids"] + prompts.marker_ids)
    with torch.no_grad():
        rows = normalise(
            encode_states(model, prompts.catalogue_ids(dataset["items"]), tokenizer.pad_token_id), "cosine"
        )
        states = normalise(encode_states(model, rollouts, tokenizer.pad_token_id), "cosine")
    best = (states @ rows.T).topk(4).indices
    named = [
        {dataset["items"][i]["title"].split(" ", 1)[0] + dataset["items"][i]["title"].split(" ", 2)[2] for i in line}
        == {row["true_brand"] + f"{row['true_family']} {row['true_stage']}"}
        for line, row in zip(best.tolist(), dataset["validation"], strict=True)
    ]
    assert np.mean(named) > 0.8


def test_the_policy_reasons_poorly_but_in_its_form(policy):
    """Greedy: the marker is always there, the family mostly right, the next stage mostly not."""
    model, tokenizer = policy
    dataset, _ = make_demo(0, None, 1, 40, 1)
    prompts = Prompts(tokenizer, DEMO_PROMPTS, dataset["items"])
    table = make_table(prompts, dataset["items"], "cosine", "cpu")
    table.refresh(make_encoder(model, prompts, 16_384))
    frame = evaluate_users(model, prompts, table, dataset["validation"], max_new_tokens=32, temperature=0.05)
    judged = [right_reasoning(t, row) for t, row in zip(frame["reasoning"], dataset["validation"], strict=True)]
    assert frame["has_marker"].all()
    assert np.mean([judgement["family"] for judgement in judged]) > 0.7
    assert np.mean([judgement["stage"] for judgement in judged]) < 0.4
    assert 0.02 < ndcg_at_k(frame["rank"].to_numpy(), 10).mean() < 0.25


def test_the_recipe_makes_the_tokenizer_that_ships(recipe, policy):
    made = recipe.make_tokenizer(demo_items(), demo_users("policy", 500), recipe.DemoPolicyArguments("x").vocab_size)
    assert made.get_vocab() == policy[1].get_vocab()
    assert made.chat_template == policy[1].chat_template
    text = "- [fenta blue guitar strap]\nthe next step is stand .\n<answer>"
    assert made(text)["input_ids"] == policy[1](text)["input_ids"]


def test_the_recipe_is_deterministic(recipe, tmp_path):
    words = ["--users", "40", "--steps", "3", "--batch_users", "8", "--random_items", "8"]
    for name, seed in (("first", "0"), ("again", "0"), ("other", "1")):
        recipe.main([*words, "--output", str(tmp_path / name), "--seed", seed])
    for file in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "other")]
    assert weights[0] != weights[1]


def test_the_recipe_refuses_what_cannot_work(recipe, tmp_path):
    with pytest.raises(UserError, match="exists"):
        recipe.main(["--output", str(tmp_path)])
    with pytest.raises(UserError, match="sum to 1"):
        recipe.main(["--output", str(tmp_path / "x"), "--habits", "0.5", "0.1", "0.1"])
    (tmp_path / "file").touch()
    for words, sentence in {
        ("--habits", "nan", "1", "0"): "`habits` is nan",
        ("--steps", "0"): "`steps` is 0; it must be at least 1",
        ("--threads", "0"): "`threads` is 0",
        ("--random_items", "601"): "the shop has 600 items",
        ("--contrastive_coef", "nan"): "`contrastive_coef` is nan",
        (
            "--output",
            str(tmp_path / "file" / "x"),
        ): "file' cannot be written",  # said before the training, not after it
    }.items():
        with pytest.raises(UserError, match=sentence):
            recipe.main(["--output", str(tmp_path / "x"), *words])


def test_the_demo_config_has_the_prompts_the_policy_was_made_with():
    config = yaml.safe_load((RECIPES / "configs" / "demo.yaml").read_text())
    names = {field.name for field in dataclasses.fields(PromptConfig)}
    assert PromptConfig(**{name: value for name, value in config.items() if name in names}) == DEMO_PROMPTS
