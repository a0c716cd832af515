"""Settings that all recipes share."""

import pytest

from r2ec_trl.errors import UserError
from r2ec_trl.policy.settings import PROMPT_PRESETS, RecommendationArguments


def test_the_category_falls_back_and_the_mask_chooses_the_figure():
    assert RecommendationArguments().prompt_config().category == "item"
    assert RecommendationArguments(category="film").prompt_config().category == "film"
    assert RecommendationArguments().selection_metric == "recommendation/ndcg@10"
    assert RecommendationArguments(selection_mask=True).selection_metric == "recommendation/masked_ndcg@10"


def test_a_preset_fills_what_nobody_set():
    args = RecommendationArguments(prompt_preset="reference", item_temperature=0.5)
    assert args.item_fields == PROMPT_PRESETS["reference"]["item_fields"] and args.item_temperature == 0.5
    args.item_fields.append("brand")
    assert "brand" not in PROMPT_PRESETS["reference"]["item_fields"]
    with pytest.raises(UserError, match="`prompt_preset` is 'mine'"):
        RecommendationArguments(prompt_preset="mine")
