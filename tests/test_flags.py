"""
Every flag of recpo, contrastive, evaluate and compare changes something. The recipes run in this process on a tiny
model; `FLAGS` names the test in which each flag of ours does (TRL's own flags are the options table's, tests/policy).
"""

import dataclasses
import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import polars as pl
import pytest
from safetensors.torch import load_file
from transformers import TrainingArguments
from trl import GRPOConfig, ModelConfig

from r2ec_trl import progress
from r2ec_trl.bundle.bundle import Bundle
from r2ec_trl.cli.bundle_choice import BundleArguments, make_bundle
from r2ec_trl.cli.parsing import parse
from r2ec_trl.cli.run_start import RunArguments
from r2ec_trl.data.schema import load_dataset_card, load_dataset_folder
from r2ec_trl.errors import UserError
from r2ec_trl.evaluation.report import read_ranks
from r2ec_trl.metrics import ndcg_at_k
from r2ec_trl.policy.loading import PolicyArguments
from r2ec_trl.policy.prompts import Prompts
from r2ec_trl.serving.messages import reasoning_price
from r2ec_trl.serving.recommender import Recommender
from r2ec_trl.serving.users import KEYS
from r2ec_trl.training.contrastive_trainer import ContrastiveConfig
from r2ec_trl.training.recpo_config import RecPOConfig

ROOT = Path(__file__).parents[1]
SAMPLED = "training/test_sampled_reasoning.py"
HERE, TRAINER, CONFIG = "test_flags.py", "training/test_recpo_trainer.py", "training/test_recpo_config.py"
FLAGS = {
    **dict.fromkeys(["dataset", "category"], (HERE, "test_rows_and_category_of_a_run")),
    **dict.fromkeys(["report_before", "max_test_users"], (HERE, "test_contrastive_recipe")),
    **dict.fromkeys(["early_stopping_patience", "shown_rollouts"], (HERE, "test_recpo_recipe")),
    **dict.fromkeys(["reward_funcs", "adapter", "max_seconds"], (HERE, "test_recpo_recipe")),
    "no_history_share": ("cli/test_run_start.py", "test_a_share_of_the_train_rows_loses_its_purchases"),
    "plan": ("cli/test_plan.py", "test_the_recipe_plans_without_loading_the_model"),
    "selection_mask": ("cli/test_live.py", "test_the_mask_that_selects_is_the_one_that_is_shown"),
    **dict.fromkeys(
        ["split", "max_eval_users", "seed", "reasoning", "bundle", "record"], (HERE, "test_evaluate_recipe")
    ),
    **dict.fromkeys(["output_dir", "max_completion_length"], (HERE, "test_evaluate_recipe")),
    **dict.fromkeys(["device", "trust_remote_code"], (HERE, "test_what_a_bundle_is_loaded_with")),
    "bf16": (HERE, "test_scoring_flags"),
    "engine": ("vllm_backend/test_engine.py", ""),
    **dict.fromkeys(["audit", "beside"], (HERE, "test_reasoning_audit_recipe")),
    "run": (HERE, "test_report_recipe"),
    **dict.fromkeys(["systems", "text_encoder", "max_history_items"], (HERE, "test_baselines_recipe")),
    **dict.fromkeys(["rollouts", "num_generations", "temperature", "top_k"], (HERE, "test_try_reward_recipe")),
    **dict.fromkeys(
        ["before", "after", "metrics", "cutoffs", "output", "figure"], ("test_compare.py", "test_two_folders")
    ),
    **dict.fromkeys(["reward_mix", "reward_cutoff"], ("test_rewards.py", "")),
    **dict.fromkeys(["advantage", "item_coef", "item_negatives", "item_credit"], ("training/test_objective.py", "")),
    "token_coef": (TRAINER, ""),
    "soft_punish_cache": ("test_rewards.py", "test_length_by_hand"),
    "user_share": ("cli/test_run_start.py", "test_users_are_shared_out"),
    "min_reward_spread": (TRAINER, "test_users_without_signal_are_skipped"),
    **dict.fromkeys(["reasoning_share", "num_generations"], (SAMPLED, "test_flags_shape_what_is_sampled")),
    **dict.fromkeys(["temperature", "top_k"], (SAMPLED, "test_flags_shape_what_is_sampled")),
    "stop_coef": (SAMPLED, "test_groups_without_signal_teach_no_words"),
    "taught_words": (SAMPLED, "test_taught_words_are_those_of_the_next_purchases"),
    **dict.fromkeys(["item_gradient", "table_refresh_budget", "table_refresh_steps", "watch_steps"], (TRAINER, "")),
    "mask_history": (TRAINER, ""),
    "slice_table": ("test_distributed.py", ""),
    **dict.fromkeys(["chat_template_kwargs", "prompt_date"], ("policy/test_chat.py", "")),
    "shared_prompt": ("policy/test_shared_prompt.py", ""),
    "forward_token_budget": (HERE, "test_the_forward_budget_makes_the_batches"),
    **dict.fromkeys(["vllm_lora_sync", "vllm_lora_folder"], ("vllm_backend/test_sync.py", "")),
}
# A changed value of each flag that prompts and scores obey, and what else must be said with it
PROMPT_FLAGS = {
    "category": ["gadget"],
    "marker": ["<next>"],
    "closing": ["</next>"],
    "user_template": ["{history} Now {category}?"],
    "item_template": ["Look: {fields}"],
    "item_fields": ["title", "brand"],
    "field_words": ["2"],
    "max_history_items": ["1"],
    "max_prompt_length": ["300"],
    "max_item_length": ["90"],
    "prompt_preset": ["reference"],
    "no_history": ["(nothing)"],
    "use_ratings": ["false"],
    "use_times": ["false"],
}
SCORING_FLAGS = {
    "similarity": ["dot"],
    "item_temperature": ["0.5"],
    "max_completion_length": ["3"],
    "bf16": ["true"],
}


def flags_of(*kinds, without=()):
    names = {one.name for kind in kinds for one in dataclasses.fields(kind)}
    return names - {one.name for kind in without for one in dataclasses.fields(kind)}


def recipe_of(name):
    return runpy.run_path(str(ROOT / "recipes" / f"{name}.py"))


def test_every_flag_of_ours_has_a_test():
    evaluate, compare = recipe_of("evaluate")["EvaluateArguments"], recipe_of("compare")["CompareArguments"]
    ours = flags_of(RunArguments, recipe_of("recpo")["RecPOScriptArguments"], evaluate, compare)
    ours |= flags_of(RecPOConfig, without=[GRPOConfig]) | flags_of(ContrastiveConfig, without=[TrainingArguments])
    ours |= flags_of(PolicyArguments, without=[ModelConfig]) | flags_of(recipe_of("try_reward")["TrialArguments"])
    ours |= flags_of(recipe_of("report")["ReportArguments"], recipe_of("baselines")["BaselineArguments"])
    named = {**dict.fromkeys(PROMPT_FLAGS, (HERE, "test_prompt_flags")), **FLAGS}
    named = {**dict.fromkeys(SCORING_FLAGS, (HERE, "test_scoring_flags")), **named}
    assert ours == ours & set(named), f"no test in which they change something: {sorted(ours - set(named))}"
    for flag, (file, test) in named.items():
        text = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert flag in text and (f"def {test}(" in text or not test), f"{flag}: {file} has no {test}"


# ------------------------------------------------------------------ prompts and scores
def bundle_of(words, folder, model):
    args, policy = parse(
        (BundleArguments, PolicyArguments),
        args=["--model_name_or_path", str(model), "--max_completion_length", "4", *words],
    )
    return make_bundle(args, policy, load_dataset_folder(folder), load_dataset_card(folder))


@pytest.mark.parametrize("flag", PROMPT_FLAGS)
def test_prompt_flags(flag, shop_folder, chat_tokenizer):
    """What the model reads of some user or item is another text."""
    data = load_dataset_folder(shop_folder)
    data["items"] = data["items"].add_column("average_rating", [4.5] * 40)

    def read(*words):
        (args,) = parse((BundleArguments,), args=list(words))
        prompts = Prompts(chat_tokenizer, args.prompt_config(), data["items"])
        users = [*data["test"], {"history": []}]
        return [prompts.user_ids(user) for user in users] + list(prompts.catalogue_ids(data["items"]))

    assert read() == read()
    assert read() != read(f"--{flag}", *PROMPT_FLAGS[flag])


@pytest.fixture(scope="module")
def plain_frame(shop_folder, tiny_model_folder):
    return bundle_of([], shop_folder, tiny_model_folder("llama")).evaluate(load_dataset_folder(shop_folder)["test"])


@pytest.mark.parametrize("flag", SCORING_FLAGS)
def test_scoring_flags(flag, shop_folder, tiny_model_folder, plain_frame):
    bundle = bundle_of([f"--{flag}", *SCORING_FLAGS[flag]], shop_folder, tiny_model_folder("llama"))
    frame = bundle.evaluate(load_dataset_folder(shop_folder)["test"])
    assert not frame["logprob"].equals(plain_frame["logprob"])
    if flag == "max_completion_length":
        assert max(frame["reasoning_tokens"]) == 3


def test_the_forward_budget_makes_the_batches(shop_folder, tiny_model_folder):
    """40 item prompts of about 90 tokens, most of them the same at the start and computed once: three a forward."""
    seen = []
    progress.watch(note := lambda what, done, total: seen.append(done) if total == 40 else None)
    try:
        for words in ([], ["--forward_token_budget", "100"]):
            seen.clear()
            bundle_of(words, shop_folder, tiny_model_folder("llama"))
            assert len(seen) == (1 + -(-40 // 3) if words else 2)
    finally:
        progress.unwatch(note)


def test_what_a_bundle_is_loaded_with(launch, written, shop_folder, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(Bundle, "load", lambda *args, **kwargs: seen.update(args=args, **kwargs) or 1 / 0)
    for words, device, trust in (([], "cpu", False), (["--device", "meta", "--trust_remote_code"], "meta", True)):
        with pytest.raises(ZeroDivisionError):
            launch("evaluate", "--bundle", written, "--dataset", shop_folder, *words, out=tmp_path)
        assert (seen["args"][2], seen["trust_remote_code"]) == (device, trust)


# ------------------------------------------------------------------------- the recipes
class Seen(Exception):
    """A trainer that is only looked at."""

    def __init__(self, *args, **kwargs):
        self.given = [*args, kwargs]
        raise self


SHORT = "--max_steps 3 --report_to none --use_cpu --save_strategy no --logging_steps 1 --warmup_steps 0".split()
SHORT += ["--user_template", "Bought: {history} Next?", "--item_template", "{fields}", "--item_fields", "title"]
LORA = "--use_peft --lora_r 4 --lora_target_modules q_proj v_proj".split()
RECPO = [
    *"--per_device_train_batch_size 8 --num_generations 4 --max_completion_length 4 --item_temperature 0.2".split(),
    *["--config", ""],
]


@pytest.mark.parametrize("recipe", ["recpo", "contrastive"])
@pytest.mark.parametrize("words", [[], ["--category", "gadget"]])
def test_rows_and_category_of_a_run(launch, recipe, words, shop, shop_folder, tiny_model_folder, tmp_path):
    """Trains on the train split and validates on the validation split, never on the test split."""
    patch = {"RecPOTrainer": Seen, "ContrastiveTrainer": Seen}
    base = ["--dataset", shop_folder, "--model_name_or_path", tiny_model_folder("llama"), *SHORT, *words]
    if recipe == "recpo":
        (tmp_path / "empty.yaml").write_text("{}\n")
        base += ["--config", tmp_path / "empty.yaml"]
    with pytest.raises(Seen) as seen:
        launch(recipe, *base, out=tmp_path, patch=patch)
    _, items, *rest, _ = seen.value.given
    args, train, validation, _ = rest[-4:]
    for rows, split in ((items, "items"), (train, "train"), (validation, "validation")):
        key = "item_id" if split == "items" else "user_id"
        assert rows[key][:] == shop[split][key][:], split
    assert args.category == (words[1] if words else "instrument part")


@pytest.fixture(scope="module")
def warm(launch, shop_folder, tiny_model_folder, tmp_path_factory):
    """A contrastive run of three steps with an adapter."""
    out = tmp_path_factory.mktemp("warm")
    words = ["--dataset", shop_folder, "--model_name_or_path", tiny_model_folder("llama"), *SHORT, *LORA]
    words += "--per_device_train_batch_size 8 --learning_rate 3e-2 --item_temperature 0.2 --seed 5".split()
    launch("contrastive", *words, "--max_test_users", 6, "--eval_strategy", "no", out=out)
    return out


def mean(frame, metric, column="rank"):
    return float((frame[column] <= int(metric.split("@")[1])).cast(pl.Float64).mean())


def test_contrastive_recipe(launch, warm, shop, shop_folder, tiny_model_folder, tmp_path):
    """
    `max_test_users` 6 of 10 rows; the start was measured before training (equal to evaluate.py on the start), and
    after - before is after minus before.
    """
    metrics = json.loads((warm / "metrics.json").read_text())
    (before, _), (after, protocol) = read_ranks(warm / "before"), read_ranks(warm)
    assert after["user_id"].to_list() == shop["test"]["user_id"][:6] and metrics["training"]["steps"] == 3
    assert protocol["settings"]["reasoning"] == "none" and set(after["reasoning_tokens"]) == {0}
    assert protocol["seed"] == 5 and not before["rank"].equals(after["rank"])
    for name, column in {"unmasked": "rank", "masked": "rank_masked"}.items():
        change = metrics["difference"][name]["hit@5"]
        assert change["before"] == pytest.approx(mean(before, "hit@5", column))
        assert change["after"] == pytest.approx(mean(after, "hit@5", column))
        assert change["difference"] == pytest.approx(change["after"] - change["before"])
    words = ["--dataset", shop_folder, "--model_name_or_path", tiny_model_folder("llama"), "--reasoning", "none"]
    words += ["--max_eval_users", 6, "--item_temperature", 0.2, *SHORT[-6:]]
    launch("evaluate", *words, out=tmp_path)
    assert read_ranks(tmp_path)[0]["rank"].equals(before["rank"])
    args = ContrastiveConfig(str(tmp_path), use_cpu=True, report_to="none")
    assert args.greater_is_better is True and args.metric_for_best_model == "recommendation/ndcg@10"


def test_contrastive_recipe_with_sampled_reasoning(launch, shop_folder, tiny_model_folder, tmp_path, capsys):
    """`reasoning` sampled: validation full and none is printed and kept, and test rows and bundle reason too."""
    words = ["--dataset", shop_folder, "--model_name_or_path", tiny_model_folder("llama"), *SHORT, *LORA]
    words += "--per_device_train_batch_size 8 --reasoning sampled --max_completion_length 5 --max_test_users 3".split()
    launch("contrastive", *words, "--report_before", "false", "--max_eval_users", 4, out=tmp_path)
    found = json.loads((tmp_path / "metrics.json").read_text())["reasoning_on_validation"]
    assert found["none_to_full"]["rows"] == 4 and found["reasoning_tokens"] > 0
    assert "validation NDCG@10 without reasoning" in " ".join(capsys.readouterr().out.split())
    assert max(read_ranks(tmp_path)[0]["reasoning_tokens"]) == 5
    protocol = Bundle.load(tmp_path / "bundle").meta.protocol
    assert (protocol.reasoning, protocol.max_completion_length) == ("full", 5)


def test_recpo_recipe(launch, warm, shop_folder, tiny_model_folder, tmp_path, capsys):
    """
    From an adapter: it is trained on (`adapter`), with the reward that is named (`reward_funcs`); with equal rewards
    nothing gets better, so `early_stopping_patience` 1 ends it after the second evaluation; `max_seconds` after the
    first step; `shown_rollouts` 0 shows none.
    """
    reward = tmp_path / "my.py"
    reward.write_text("def flat(completion_ids, **kwargs):\n    return [sum(ids) % 7 / 7 for ids in completion_ids]\n")
    (tmp_path / "empty.yaml").write_text("{}\n")
    words = ["--config", tmp_path / "empty.yaml", "--dataset", shop_folder, "--adapter", warm]
    words += [
        "--model_name_or_path",
        tiny_model_folder("llama"),
        *SHORT,
        *RECPO[:-2],
        "--reward_funcs",
        f"{reward}:flat",
    ]
    evaluated = "--eval_strategy steps --eval_steps 1 --max_eval_users 3 --max_test_users 3".split()
    launch(
        "recpo", *words, *evaluated, "--learning_rate", "1e-2", "--max_seconds", "1e-6",
        "--shown_rollouts", 0, out=tmp_path / "one",
    )  # fmt: skip
    text = capsys.readouterr().out
    assert (
        "it trains. Output" in text and "rewards" not in text and "target, rank" not in text and "bought" not in text
    )
    metrics = json.loads((tmp_path / "one" / "metrics.json").read_text())
    assert metrics["training"]["steps"] == 1
    logs = json.loads((tmp_path / "one" / "log_history.json").read_text())
    assert any("rewards/flat/mean" in log for log in logs)
    old, new = (load_file(folder / "adapter_model.safetensors") for folder in (warm, tmp_path / "one"))
    assert old.keys() == new.keys() and not all(old[name].equal(new[name]) for name in old)
    launch(
        "recpo", *words, *evaluated, "--learning_rate", "0", "--early_stopping_patience", 1,
        "--report_before", "false", "--load_best_model_at_end", "--save_strategy", "steps", "--save_steps", 1,
        "--max_steps", 4, out=tmp_path / "two",
    )  # fmt: skip
    text = capsys.readouterr().out
    metrics = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert metrics["training"]["steps"] == 2 and "before" not in metrics and not (tmp_path / "two" / "before").exists()
    assert "target, rank" in text  # rollouts are shown unless one says 0
    new = load_file(tmp_path / "two" / "adapter_model.safetensors")
    assert all(old[name].equal(new[name]) for name in old)


@pytest.fixture(scope="module")
def one_step(launch, shop_folder, tiny_model_folder, tmp_path_factory):
    """`one_step(*words)`: the folder of a RecPO run of one step with these flags."""

    def train(*words):
        out = tmp_path_factory.mktemp("step")
        (out / "empty.yaml").write_text("{}\n")
        base = [
            "--config",
            out / "empty.yaml",
            "--dataset",
            shop_folder,
            "--learning_rate",
            "1e-3",
            *SHORT,
            *RECPO[:-2],
        ]
        base += [
            "--model_name_or_path",
            tiny_model_folder("llama"),
            "--seed",
            3,
            "--max_steps",
            1,
            "--dtype",
            "float32",
        ]
        launch("recpo", *base, "--eval_strategy", "no", *words, out=out / "run")
        return out / "run"

    return train


@pytest.fixture(scope="module")
def plain_step(one_step):
    return one_step()


@pytest.mark.slow
@pytest.mark.parametrize(
    "flag, values",
    [
        ("bf16", ["true"]),
        ("dtype", ["bfloat16"]),
        ("attn_implementation", ["eager"]),
        ("max_completion_length", ["3"]),
        ("model_name_or_path", ["qwen2"]),
    ],
)
def test_an_option_holds_in_every_place(one_step, plain_step, flag, values, shop, shop_folder, tiny_model_folder):
    """
    It changes training, the evaluation of the start and the items' rows; the bundle says so and answers as the run
    did, recommendations are those of the evaluation. Another attention changes no figure: there the record is seen.
    """
    values = [str(tiny_model_folder(values[0]))] if flag == "model_name_or_path" else values
    out = one_step(f"--{flag}", *values)
    plain, bundle = Bundle.load(plain_step / "bundle"), Bundle.load(out / "bundle")
    (old, _), (new, _) = read_ranks(plain_step / "before"), read_ranks(out / "before")
    losses = [json.loads((folder / "log_history.json").read_text())[0]["loss"] for folder in (plain_step, out)]
    rows = [one.table.rows for one in (plain, bundle)]
    if flag == "attn_implementation":
        assert bundle.model.config._attn_implementation == "eager" != plain.model.config._attn_implementation
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    else:
        assert losses[0] != losses[1] and not old["logprob"].equals(new["logprob"])
        assert rows[0].shape != rows[1].shape or not rows[0].equal(rows[1])
    if flag == "max_completion_length":
        assert max(new["reasoning_tokens"]) == 3 == bundle.meta.protocol.max_completion_length
    assert (bundle.meta.protocol.mixed_precision == "bf16") == (flag == "bf16")
    assert (bundle.meta.dtype == "bfloat16") == (flag == "dtype")
    assert bundle.staleness()["max_drift"] < 1e-9
    mine, theirs = bundle.evaluate(shop["test"]), read_ranks(out)[0]
    assert mine["rank"].to_list() == theirs["rank"].to_list() and mine["logprob"].equals(theirs["logprob"])
    users = [{key: row[key] for key in KEYS if key in row} for row in shop["test"]]
    given = Recommender(bundle).recommend(users, k=1, exclude_history=False)
    assert [one.items[0].item_id for one in given] == [items[0] for items in mine["top_item_ids"]]


def test_evaluate_recipe(launch, written, shop, shop_folder, tmp_path, own, monkeypatch):
    """`split`, `max_eval_users`, `reasoning`, `seed` and the bundle's own limit of 8 tokens are obeyed."""
    words = ["--bundle", written, "--dataset", shop_folder]
    modes = ["--reasoning", "full", "none", "truncated", "other"]
    launch("evaluate", *words, *modes, "--split", "validation", "--max_eval_users", 7, out=tmp_path)
    frames = {mode: read_ranks(tmp_path / mode) for mode in modes[1:]}
    for mode, (frame, protocol) in frames.items():
        assert frame["user_id"].to_list() == shop["validation"]["user_id"][:7]
        assert (protocol["split"], protocol["settings"]["reasoning"]) == ("validation", mode)
    full, none, half, other = (frame for frame, _ in frames.values())
    assert set(full["reasoning_tokens"]) == {8} and set(none["reasoning_tokens"]) == {0}
    assert max(half["reasoning_tokens"]) <= 4 and not half["reasoning"].equals(full["reasoning"])
    assert sorted(other["reasoning"]) == sorted(full["reasoning"]) and not other["reasoning"].equals(full["reasoning"])
    launch("evaluate", *words, "--reasoning", "other", "--seed", 1, out=tmp_path / "seed")
    assert read_ranks(tmp_path / "seed")[1]["seed"] == 1
    assert not read_ranks(tmp_path / "seed")[0]["reasoning"][:7].equals(other["reasoning"])
    launch("evaluate", "--bundle", own, *words[2:], "--reasoning", "full", "none", "--record", out=tmp_path / "kept")
    kept = Bundle.load(own).meta.metrics
    for mode, name in (("full", "after"), ("none", "reasoning_none")):
        written = json.loads((tmp_path / "kept" / mode / "metrics.json").read_text())
        assert kept[name] == written and written["protocol"]["settings"]["reasoning"] == mode
    assert reasoning_price(kept).startswith("NDCG@10 on the test split is")
    with pytest.raises(UserError, match="--record keeps figures of all test users"):
        launch("evaluate", *words, "--record", "--split", "train", out=tmp_path / "not")
    with monkeypatch.context() as hub, pytest.raises(UserError, match="--record writes into a local bundle"):
        hub.setattr("r2ec_trl.bundle.format.snapshot_download", lambda name: str(own))
        launch("evaluate", "--bundle", "someone/games", *words[2:], "--record", out=tmp_path / "not")
    bundle = Bundle.load(own)
    protocol = dataclasses.replace(bundle.meta.protocol, reasoning="none")
    bundle.meta = dataclasses.replace(bundle.meta, protocol=protocol)
    bundle.save(own)
    launch("evaluate", "--bundle", own, "--dataset", shop_folder, out=tmp_path / "own")
    frame, protocol = read_ranks(tmp_path / "own")
    assert set(frame["reasoning_tokens"]) == {0} and protocol["settings"]["reasoning"] == "none"
    assert frame["user_id"].to_list() == shop["test"]["user_id"][:]
    metrics = json.loads((tmp_path / "own" / "metrics.json").read_text())
    cold, trained = metrics["slices"]["targets"], set(shop["train"]["target"])
    assert cold["cold"]["rows"] == sum(target not in trained for target in shop["test"]["target"])
    assert cold["cold"]["rows"] + cold["others"]["rows"] == 10 and cold["cold"]["rows"] != cold["others"]["rows"]
    assert set(metrics["beyond_accuracy"]) == {"model", "popularity", "item_to_item"}
    assert metrics["no_history"]["rows"] == 10 and set(metrics["no_history"]) == {"rows", "model", "popularity"}
    assert metrics["no_history"]["popularity"]["ndcg@10"] == metrics["unmasked"]["popularity"]["ndcg@10"]


def test_reasoning_audit_recipe(launch, written, shop, shop_folder, tmp_path, capsys):
    """`audit` writes one table over the modes, `beside` another evaluation's line; first:N is the greedy prefix."""
    words = ["--bundle", written, "--dataset", shop_folder]
    launch("evaluate", *words, "--reasoning", "none", "--seed", 3, out=tmp_path / "plain")
    assert not (tmp_path / "plain" / "reasoning_audit.json").exists()
    launch("evaluate", *words, "--audit", "true", "--beside", tmp_path / "plain", out=tmp_path / "audit")
    text = capsys.readouterr().out
    assert text.count("Does the reasoning help?") == 2
    found = json.loads((tmp_path / "audit" / "reasoning_audit.json").read_text())
    assert list(found["modes"]) == ["none", "first:4", "full", "other", "best:8", "plain"]
    assert (tmp_path / "audit" / "reasoning_audit.png").read_bytes().startswith(b"\x89PNG")
    frames = {mode: read_ranks(tmp_path / "audit" / mode.replace(":", "_")) for mode in list(found["modes"])[:-1]}
    for mode, (frame, protocol) in frames.items():
        assert frame["user_id"].to_list() == shop["test"]["user_id"][:] and protocol["settings"]["reasoning"] == mode
        value = ndcg_at_k(frame["rank"].to_numpy(), 10).mean()
        assert (
            found["modes"][mode]["unmasked"]["value"] == pytest.approx(value) and found["modes"][mode]["seconds"] > 0
        )
    samples = found["modes"]["best:8"]["tokens"]
    assert samples > 3 * found["modes"]["full"]["tokens"]  # of all eight together
    full, first = (frames[mode][0]["reasoning"] for mode in ("full", "first:4"))
    assert all(one.startswith(two.removesuffix("<answer>")) for one, two in zip(full, first, strict=True))
    launch(
        "evaluate",
        *words,
        "--reasoning",
        "none",
        "--audit",
        "true",
        "--beside",
        tmp_path / "audit" / "none",
        out=tmp_path,
    )
    same = json.loads((tmp_path / "reasoning_audit.json").read_text())["modes"]
    assert list(same) == ["none", str(tmp_path / "audit" / "none")]  # no name is taken twice
    plain = found["modes"]["plain"]
    assert plain["seconds"] is None and plain["unmasked"]["value"] == found["modes"]["none"]["unmasked"]["value"]
    with pytest.raises(UserError, match="--beside .* and these rows cannot be compared"):
        launch(
            "evaluate", *words, "--audit", "true", "--beside", tmp_path / "plain", "--max_eval_users", 3, out=tmp_path
        )
    with pytest.raises(UserError, match="--beside is shown in the audit"):
        launch("evaluate", *words, "--beside", tmp_path / "plain", out=tmp_path)


def test_what_could_only_fail_at_the_end_is_refused_at_the_start(launch, shop_folder, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("x")
    with pytest.raises(UserError, match="mine' exists and is no bundle"):
        launch("recommend", "--bundle", "nowhere", "--save_bundle", tmp_path / "mine")
    with pytest.raises(UserError, match="letter.txt"):
        launch("try_reward", "--bundle", "nowhere", "--output", tmp_path / "mine" / "letter.txt" / "x.json")
    with pytest.raises(UserError, match="--record keeps figures of full and none"):
        launch("evaluate", "--bundle", "nowhere", "--dataset", shop_folder, "--record", "--reasoning", "other")
    with pytest.raises(UserError, match="holds no ranks.parquet"):
        launch("report", "--run", tmp_path / "none", "--dataset", "demo")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--history_ratings", 5], "--history_ratings are of --history or --history_titles"),
        (["--input", "u.jsonl", "--history_ratings", 5], "--history_ratings are of --history or --history_titles"),
        (["--input", "u.jsonl", "--part_users", 5], "--part_users cuts what --output writes"),
        (["--output", "o"], "--output takes its users from a file alone; add --input FILE"),
        (["--output", "o", "--input", "u.jsonl", "--history", "i1"], "--output takes its users from a file alone"),
        (["--output", "o", "--input", "u.jsonl", "--format", "csv"], "--format is of what is printed"),
        (["--history", "i1", "--max_eval_users", 3], "--max_eval_users cuts evaluations; leave it out"),
    ],
)
def test_recommend_refuses_flags_that_would_do_nothing(launch, words, sentence):
    with pytest.raises(UserError, match=sentence):
        launch("recommend", "--bundle", "nowhere", *words)


def test_recommend_of_two_processes(launch, written, tmp_path, capsys):
    """The bundle is saved by the main process alone, users need --output, and who is done waits for days."""
    asked = []

    def accelerator(is_main_process, num_processes=2):
        def make(kwargs_handlers=()):
            asked.extend(kwargs_handlers)
            waits = lambda: asked.append("waits")  # noqa: E731
            return SimpleNamespace(
                is_main_process=is_main_process, num_processes=num_processes, wait_for_everyone=waits
            )

        return {"Accelerator": make}

    words = ["--bundle", written, "--save_bundle", tmp_path / "mine"]
    launch("recommend", *words, patch=accelerator(False))
    assert not (tmp_path / "mine").exists() and asked[0].timeout.days >= 1 and asked[1:] == ["waits"]
    launch("recommend", *words, patch=accelerator(True))
    assert Bundle.load(tmp_path / "mine").items["item_id"][0] == "i00" and asked[-1] == "waits"
    with pytest.raises(UserError, match="add --output FOLDER"):
        launch("recommend", "--bundle", written, "--history", "i00", patch=accelerator(True))


def test_baselines_recipe(launch, shop, shop_folder, tmp_path):
    """`systems`, `split`, `max_eval_users`, `max_history_items` and `seed`; texts need `text_encoder`."""
    words = ["--dataset", shop_folder, "--systems", "item_to_item"]
    launch("baselines", *words, out=tmp_path / "all")
    frame, protocol = read_ranks(tmp_path / "all" / "item_to_item")
    assert [path.name for path in (tmp_path / "all").iterdir()] == ["item_to_item"] and protocol["split"] == "test"
    assert frame["user_id"].to_list() == shop["test"]["user_id"][:]
    more = ["--split", "validation", "--max_eval_users", 4, "--max_history_items", 1, "--seed", 3]
    launch("baselines", *words, *more, out=tmp_path / "few")
    few, protocol = read_ranks(tmp_path / "few" / "item_to_item")
    assert few["user_id"].to_list() == shop["validation"]["user_id"][:4] and protocol["seed"] == 3
    assert protocol["split"] == "validation" and protocol["settings"]["max_history_items"] == 1
    with pytest.raises(UserError, match="needs --text_encoder"):
        launch("baselines", "--dataset", shop_folder, "--systems", "text_neighbours", out=tmp_path)


def test_report_recipe(launch, warm, shop, shop_folder, tmp_path):
    """Written anew for the `run` that is named, with the `audit` in it; another dataset's rows are refused."""
    one = {
        "tokens": 3.0,
        "seconds": 0.5,
        **dict.fromkeys(["unmasked", "masked"], {"value": 0.125, "low": 0, "high": 1}),
    }
    protocol = json.loads((warm / "metrics.json").read_text())["protocol"]
    (tmp_path / "a.json").write_text(json.dumps({"protocol": protocol, "modes": {"first:3": one}}))
    report = warm / "report.html"
    report.unlink()
    launch("report", "--run", warm, "--dataset", shop_folder)
    assert "first:3" not in report.read_text() and shop["test"]["user_id"][0] in report.read_text()
    (warm / "audit").mkdir()
    (warm / "audit" / "reasoning_audit.json").write_text(
        (tmp_path / "a.json").read_text().replace("first:3", "first:5")
    )
    launch("report", "--run", warm, "--dataset", shop_folder)
    assert "first:5" in report.read_text()
    launch("report", "--run", warm, "--dataset", shop_folder, "--audit", tmp_path / "a.json")
    with pytest.raises(UserError, match="is of a training run; give another --output_dir"):
        launch("evaluate", "--bundle", warm / "bundle", "--dataset", shop_folder, out=warm)
    assert "first:3" in report.read_text() and "0.1250" in report.read_text()
    with pytest.raises(UserError, match="test rows of demo cannot be compared"):
        launch("report", "--run", warm, "--dataset", "demo")


def test_try_reward_recipe(launch, written, shop, shop_folder, tiny_model_folder, tmp_path, capsys):
    """
    The first call writes `rollouts` of `max_eval_users` · `num_generations`, the next needs no bundle; the figures of
    `output` are those of the rewards that are named; `temperature` near 0 is greedy: no group carries a signal.
    """
    (tmp_path / "my.py").write_text("def words(completions, **kwargs):\n    return [1.0] * len(completions)\n")
    kept, out = tmp_path / "r.parquet", tmp_path / "trial.json"
    words = ["--bundle", written, "--dataset", shop_folder, "--max_eval_users", 3, "--num_generations", 4]
    launch("try_reward", *words, "--rollouts", kept)
    frame = pl.read_parquet(kept)
    assert frame["user_id"].to_list() == [name for name in shop["validation"]["user_id"][:3] for _ in range(4)]
    model = ["--model_name_or_path", tiny_model_folder("llama"), "--max_completion_length", 3, "--max_eval_users", 2]
    launch("try_reward", *model, "--dataset", shop_folder, "--rollouts", tmp_path / "no_bundle.parquet")
    assert pl.read_parquet(tmp_path / "no_bundle.parquet").height == 2 * 8
    names = ["fused", "hit", f"{tmp_path / 'my.py'}:words"]
    launch("try_reward", "--rollouts", kept, "--reward_funcs", *names, "--reward_cutoff", 1, "--output", out)
    found = json.loads(out.read_text())
    assert found["protocol"]["split"] == "validation" and list(found["rewards"]) == names
    assert found["rewards"]["hit"]["mean"] == pytest.approx(float((frame["rank"] == 1).mean()))
    assert found["rewards"][names[2]]["without_signal"] == 1 and "would push" in capsys.readouterr().out
    lengths = [len(ids) for ids in frame["completion_ids"]]
    rewards = ["length", "soft_overlong"]
    launch("try_reward", "--rollouts", kept, "--reward_funcs", *rewards, "--soft_punish_cache", 8, "--output", out)
    of_length = json.loads(out.read_text())["rewards"]
    assert of_length["length"]["mean"] == pytest.approx(-sum(lengths) / len(lengths) / 8)  # the bundle's limit
    assert of_length["soft_overlong"]["mean"] < -0.5
    fused = found["rewards"]["fused"]["mean"]
    launch("try_reward", "--rollouts", kept, "--reward_mix", 1, "--output", out)
    again = json.loads(out.read_text())["rewards"]["fused"]["mean"]
    assert again != fused and again == pytest.approx(float(frame["target_prob"].mean()))
    for words_, word in ((words, "is there already"), ([], "is not there; name a --bundle")):
        with pytest.raises(UserError, match=word):
            launch("try_reward", *words_, "--rollouts", kept if words_ else tmp_path / "no.parquet")
    for flag in (["--temperature", 2], ["--num_generations", 3], ["--dataset", shop_folder], ["--adapter", "x"]):
        with pytest.raises(UserError, match=f"is there already, so {flag[0]} decides nothing"):
            launch("try_reward", "--rollouts", kept, *flag)
    more = ["--split", "test", "--temperature", "1e-4", "--seed", 1, "--rollouts", tmp_path / "cold.parquet"]
    launch("try_reward", *words, *more, "--output", out)
    cold = json.loads(out.read_text())
    assert cold["rewards"]["fused"]["without_signal"] == 1 and cold["protocol"]["split"] == "test"
    assert cold["protocol"]["seed"] == 1
    one = ["--top_k", 1, "--rollouts", tmp_path / "one.parquet"]  # of one word no two rollouts are made
    launch("try_reward", *words, *one, "--output", out)
    assert json.loads(out.read_text())["rewards"]["fused"]["without_signal"] == 1
