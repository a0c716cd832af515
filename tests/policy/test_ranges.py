"""Every number of ours, and of TRL's that we set or use, has a range; nonsense is one sentence."""

import dataclasses
import math
from typing import get_args, get_type_hints

import pytest

from r2ec_trl.cli.bundle_choice import BundleArguments
from r2ec_trl.cli.run_start import RunArguments
from r2ec_trl.errors import UserError
from r2ec_trl.policy.loading import PolicyArguments
from r2ec_trl.policy.prompts import PromptConfig
from r2ec_trl.policy.ranges import RANGES, check_ranges
from r2ec_trl.policy.settings import RecommendationArguments
from r2ec_trl.training.contrastive_trainer import ContrastiveConfig
from r2ec_trl.training.recpo_config import RecPOConfig

KINDS = (RecPOConfig, ContrastiveConfig, PolicyArguments, BundleArguments, RunArguments)
UNUSED = {
    "label_smoothing_factor",
    "neftune_noise_alpha",
    "local_rank",
    "eval_accumulation_steps",
}  # refused, or HF's own
UNUSED |= {"max_tool_calling_iterations"}


def test_every_number_has_a_range_and_every_range_a_number():
    numbers = set()
    for kind in KINDS:
        for name, hint in get_type_hints(kind).items():
            kinds = {hint, *get_args(hint)}
            if kinds & {int, float} and name in {field.name for field in dataclasses.fields(kind)}:
                numbers.add(name)
    assert numbers - set(RANGES) <= UNUSED
    elsewhere = {"k", "part_users", "port", "reward_weights", "table_refresh_steps"}  # of recipes, or lists
    elsewhere |= {"rounds", "steps", "users", "batch_users", "threads", "contrastive_coef", "habits"}
    assert set(RANGES) - numbers <= elsewhere


@pytest.mark.parametrize("name", sorted(RANGES))
def test_nonsense_is_refused_and_the_ends_are_kept(name):
    kind = dataclasses.make_dataclass("Settings", [(name, float)])
    for nonsense in (math.nan, math.inf, -math.inf, -2):
        if not (name == "reward_weights" and nonsense == -2):
            with pytest.raises(UserError, match=f"`{name}` is {nonsense}; it must be "):
                check_ranges(kind(nonsense))
    low, high = (float(end) for end in RANGES[name].rpartition("|")[2].strip()[1:-1].split(","))
    for end, inside in ((low, "[" in RANGES[name]), (high, "]" in RANGES[name])):
        if math.isfinite(end):
            try:
                check_ranges(kind(end))
                taken = True
            except UserError:
                taken = False
            assert taken == inside, (name, end)


@pytest.mark.parametrize(
    "make, settings, words",
    [
        (RecPOConfig, {"beta": -1.0}, "`beta` is -1.0; it must be at least 0."),
        (RecPOConfig, {"epsilon": -0.1}, "`epsilon` is -0.1"),
        (RecPOConfig, {"item_coef": -1.0}, "`item_coef` is -1.0"),
        (RecPOConfig, {"token_coef": math.nan}, "`token_coef` is nan"),
        (RecPOConfig, {"top_p": 0.0}, "`top_p` is 0.0; it must be above 0 and at most 1."),
        (RecPOConfig, {"top_p": 2.0}, "`top_p` is 2.0"),
        (RecPOConfig, {"temperature": 0.0}, "`temperature` is 0.0"),
        (RecPOConfig, {"max_steps": -2}, r"`max_steps` is -2; it must be at least 1 \(or -1\)."),
        (RecPOConfig, {"reward_weights": [1.0, math.inf]}, "`reward_weights` is inf; it must be a finite number."),
        (RecPOConfig, {"learning_rate": math.inf}, "`learning_rate` is inf; it must be finite and at least 0."),
        (RecPOConfig, {"forward_token_budget": -1}, "`forward_token_budget` is -1"),
        (ContrastiveConfig, {"item_temperature": math.nan}, "`item_temperature` is nan"),
        (ContrastiveConfig, {"weight_decay": -1.0}, "`weight_decay` is -1.0"),
        (PolicyArguments, {"lora_alpha": 0}, "`lora_alpha` is 0; it must be above 0."),
        (PolicyArguments, {"lora_r": -4}, "`lora_r` is -4"),
        (PolicyArguments, {"lora_dropout": 1.0}, "`lora_dropout` is 1.0"),
        (BundleArguments, {"max_completion_length": 0}, "`max_completion_length` is 0"),
        (PromptConfig, {"field_words": -1}, "`field_words` is -1"),
        (RecommendationArguments, {"similarity": "euclid"}, "`similarity` is 'euclid'"),
    ],
)
def test_settings_check_themselves(make, settings, words, tmp_path):
    where = {"output_dir": str(tmp_path), "use_cpu": True} if make in (RecPOConfig, ContrastiveConfig) else {}
    with pytest.raises(UserError, match=words):
        make(**where, **settings)
