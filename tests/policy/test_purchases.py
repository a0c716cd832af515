"""What stands beside a history is a number or unknown; anything else is one sentence."""

import numpy as np
import pytest
import torch

from r2ec_trl.errors import UserError
from r2ec_trl.policy.prompts import PromptConfig, Prompts
from r2ec_trl.policy.purchases import purchase_values

DAY = 86_400


def test_numbers_of_every_kind_become_plain_ones():
    user = {"history_ratings": np.array([4.5, 3.0]), "history_timestamps": torch.tensor([10, 20])}
    assert purchase_values(user, 2, "User 1") == ([4.5, 3.0], [10, 20], 20)
    assert purchase_values({"timestamp": 30.0, "history_ratings": [None, 2]}, 2, "u") == ([None, 2], [None, None], 30)
    assert purchase_values({"timestamp": 0, "history_timestamps": [-5]}, 1, "u").now == 0  # a time, not an unknown one
    assert purchase_values({"history_ratings": None, "history_timestamps": []}, 1, "u") == ([None], [None], 0)


def test_an_unknown_time_or_rating_is_left_out_of_its_line(chat_tokenizer, shop):
    prompts = Prompts(chat_tokenizer, PromptConfig(user_template="{history}"), shop["items"])
    user = {"history": ["i00", "i01", "i02"], "history_timestamps": [0.0, None, 2 * DAY], "timestamp": 3 * DAY}
    lines = prompts.user_messages({**user, "history_ratings": [None, 2, 4.5]})[-1]["content"].split("\n")
    titles = shop["items"]["title"][:3]
    assert lines == [
        f"- 3 days ago: [{titles[0]}]",
        f"- [{titles[1]}] 2 out of 5",
        f"- 1 day ago: [{titles[2]}] 4.5 out of 5",
    ]


@pytest.mark.parametrize(
    "values, sentence",
    [
        ({"history_timestamps": ["2024-01-01"]}, "User 7: `history_timestamps` holds '2024-01-01'; give a number"),
        ({"history_timestamps": [1_600_000_000_000]}, "holds 1.6e.12, which is no time in seconds"),
        ({"timestamp": -(10**15)}, "`timestamp` holds -1e.15, which is no time"),
        ({"timestamp": "now"}, "`timestamp` holds 'now'; give a number"),
        ({"timestamp": True}, "`timestamp` holds True; give a number"),
        ({"timestamp": 10**400}, "`timestamp` holds 1000.*, which is not finite"),
        ({"history_ratings": [float("nan")]}, "`history_ratings` holds nan, which is not finite"),
        ({"history_ratings": ["5"]}, "`history_ratings` holds '5'"),
        ({"history_ratings": [[5]]}, "`history_ratings` holds .5.; give a number"),
        ({"history_ratings": "5"}, "`history_ratings` is '5'; give a list"),
        ({"history_ratings": 5}, "`history_ratings` is 5; give a list"),
        ({"history_ratings": [5, 5]}, "User 7 has 1 purchases, but 2 `history_ratings`"),
    ],
)
def test_what_is_no_number_is_one_sentence(values, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        purchase_values(values, 1, "User 7")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
