"""What would only fail when all the training is done is refused before anything is loaded."""

from types import SimpleNamespace

import pytest
from transformers import EarlyStoppingCallback, TrainerControl

from r2ec_trl.bundle.bundle import Bundle
from r2ec_trl.cli.run_start import RunArguments, TimeLimitCallback, callbacks_of, rows_to_train
from r2ec_trl.errors import UserError


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--max_test_users", "0"], "`max_test_users` is 0"),
        (["--early_stopping_patience", "0"], "`early_stopping_patience` is 0"),
        (["--max_seconds", "nan"], "`max_seconds` is nan"),
        (["--max_seconds", "inf"], "`max_seconds` is inf"),
        (["--user_share", "0.5"], "`user_share` is '0.5'"),
        (["--user_share", "0.5:0.2"], "`user_share` is '0.5:0.2'"),
        (["--user_share", "0.5:0.5"], "`user_share` is '0.5:0.5'"),
        (["--shown_rollouts", "-1"], "`shown_rollouts` is -1"),
        (["--no_history_share", "1.5"], "`no_history_share` is 1.5"),
        (["--early_stopping_patience", "2"], "add --eval_strategy steps"),
        (["--output_dir", "{foreign}"], "exists and is no bundle"),
        (["--output_dir", "{file}"], "cannot be written"),
        (["--output_dir", "{foreign}/../old"], "is a bundle, which the run would write over"),
        (["--dataset", "{data}", "--output_dir", "{data}"], "is a dataset folder, which the run would write over"),
        (["--adapter", "{foreign}", "--output_dir", "{foreign}"], "is the run's own --adapter"),
        (["--resume_from_checkpoint", "{foreign}"], "foreign is no checkpoint; give its folder, or 'latest'"),
    ],
)
@pytest.mark.parametrize("recipe", ["recpo", "contrastive"])
def test_what_would_fail_late_is_refused_first(recipe, words, sentence, shop_folder, tmp_path, launch):
    (tmp_path / "foreign" / "bundle").mkdir(parents=True)
    (tmp_path / "foreign" / "bundle" / "thesis.tex").touch()
    (tmp_path / "file").touch()
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "bundle.json").touch()
    (tmp_path / "empty.yaml").write_text("{}\n")
    places = {"foreign": tmp_path / "foreign", "file": tmp_path / "file", "data": shop_folder}
    words = [word.format(**places) for word in words]
    words += ["--config", tmp_path / "empty.yaml"] if recipe == "recpo" else []

    def untouched(*_, **__):
        raise AssertionError("the model was loaded")

    with pytest.raises(UserError, match=sentence):
        base = ["--dataset", shop_folder, "--model_name_or_path", "x", "--report_to", "none", "--use_cpu"]
        launch(recipe, *base, *words, out=tmp_path / "out", patch={"load_policy": untouched})


@pytest.mark.parametrize("plan", [[], ["--plan"]])
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--reward_funcs", "fused", "nsgc"], "Unknown reward 'nsgc'"),
        (["--reward_weights", "1", "2"], "1 reward functions, but 2 `reward_weights`"),
        (["--reward_funcs", "{file}:asks"], "'asks' asks for 'price', which is neither a column"),
        (["--reward_funcs", "{file}:asks_trl"], "'asks_trl' asks for 'completion', which is neither a column"),
    ],
)
def test_rewards_are_looked_at_before_the_model_is_loaded(words, sentence, plan, shop_folder, tmp_path, launch):
    file = tmp_path / "mine.py"
    file.write_text(
        "def asks(completions, price):\n    return [0.0] * len(price)\n\n"
        "def asks_trl(completion):\n    return [0.0] * len(completion)\n"
    )
    (tmp_path / "empty.yaml").write_text("{}\n")
    words = [*plan, *(word.format(file=file) for word in words), "--config", tmp_path / "empty.yaml", "--use_cpu"]
    untouched = dict.fromkeys(("load_policy", "make_plan"), lambda *_, **__: pytest.fail("the model was looked at"))
    with pytest.raises(UserError, match=sentence):
        launch("recpo", "--dataset", shop_folder, "--model_name_or_path", "x", *words, out=tmp_path, patch=untouched)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--max_eval_users", "0"], "max_eval_users|gives no rows"),
        (["--reasoning", "full", "half"], "`reasoning` is 'half'"),
        (["--output_dir", "{file}"], "cannot be written"),
    ],
)
def test_evaluate_refuses_first(words, sentence, written, shop_folder, tmp_path, monkeypatch, launch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(Bundle, "load", lambda *_, **__: pytest.fail("the bundle was loaded"))
    words = [word.format(file=tmp_path / "file") for word in words]
    with pytest.raises(UserError, match=sentence):
        launch("evaluate", "--bundle", written, "--dataset", shop_folder, *words, out=tmp_path / "out")


def test_a_share_of_the_train_rows_loses_its_purchases(shop):
    """Of 40 rows with ratings a quarter, ratings too; which ones is the seed's; the folder's own rows stay."""
    rows = shop["train"].select(range(40))
    data = {"train": rows}
    seeds = [SimpleNamespace(seed=seed) for seed in (0, 0, 1)]
    assert rows_to_train(RunArguments(), seeds[0], data) is data["train"]
    one, again, other = (rows_to_train(RunArguments(no_history_share=0.25), seed, data) for seed in seeds)
    assert one["history"][:] == again["history"][:] != other["history"][:] and one["target"][:] == rows["target"][:]
    emptied = [row for row in range(40) if not one[row]["history"]]
    assert len(emptied) == 10 and all(one[row]["history_ratings"] == [] for row in emptied)
    assert all(one[row] == data["train"][row] for row in set(range(40)).difference(emptied))
    assert len(data["train"]["history"][emptied[0]]) > 0


def test_patience_counts_evaluations():
    (found,) = [
        one for one in callbacks_of(RunArguments(early_stopping_patience=3)) if isinstance(one, EarlyStoppingCallback)
    ]
    assert found.early_stopping_patience == 3
    assert not [one for one in callbacks_of(RunArguments()) if isinstance(one, EarlyStoppingCallback)]


def test_processes_agree_that_the_time_is_up(monkeypatch):
    """Another one found it first: this one stops at the same step."""
    for others, stops in ([True], True), ([False], False):
        monkeypatch.setattr("r2ec_trl.cli.run_start.gather_object", lambda own, others=others: [*own, *others])
        control, clock = TrainerControl(), TimeLimitCallback(1e6)
        clock.on_train_begin(None, None, control)
        clock.on_step_end(None, None, control)
        assert control.should_training_stop is stops
        control.should_training_stop = True  # early stopping's
        clock.on_step_end(None, None, control)
        assert control.should_training_stop is True


def test_one_process_says_which_users_it_trains_on(shop, monkeypatch, capsys):
    for main in (True, False):
        monkeypatch.setattr(
            "r2ec_trl.cli.run_start.PartialState", lambda main=main: SimpleNamespace(is_main_process=main)
        )
        rows_to_train(RunArguments(user_share="0:0.5"), None, shop)
        assert ("Training on" in capsys.readouterr().out) is main


def test_users_are_shared_out(shop):
    """Each user's rows go one way, the same in both recipes, and nobody's go both ways."""
    rows = {share: rows_to_train(RunArguments(user_share=share), None, shop) for share in ("0:1", "0:0.5", "0.5:1")}
    one, other = (set(rows[share]["user_id"]) for share in ("0:0.5", "0.5:1"))
    assert (
        one
        and other
        and not one & other
        and one | other == set(rows["0:1"]["user_id"]) == set(shop["train"]["user_id"])
    )
    assert len(rows["0:0.5"]) + len(rows["0.5:1"]) == len(shop["train"])
    with pytest.raises(UserError, match="leaves no train row"):
        rows_to_train(RunArguments(user_share="0:1e-9"), None, shop)
