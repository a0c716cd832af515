"""What is refused before the model sees it, in one sentence."""

import pytest

pytest.importorskip("fastapi", reason='needs `pip install "r2ec_trl[serve]"`')

from r2ec_trl.errors import UserError  # noqa: E402
from r2ec_trl.serving.messages import Limits, reasoning_price  # noqa: E402


# --------------------------------------------------------------------------- mistakes and attacks
@pytest.mark.parametrize(
    "body, status, sentence",
    [
        (b"{", 400, "The body is no JSON"),
        (b"[" * 100_000, 400, "parsing the body"),
        (b'{"users": [{"history": ["%s"]}]}' % (b"x" * 600), 422, "at most 512 characters"),
        (b'{"users": []}', 422, "body.users: List should have at least 1 item"),
        (b'{"users": [{"history": ["nope"]}]}', 422, "User 0 bought 'nope', which is not in the catalogue"),
        (b'{"users": [{}]}', 422, "User 0: give either"),
        (b'{"users": [{"history_titles": ["x"], "history_ratings": [NaN]}]}', 422, "finite number"),
        (b'{"users": [{"history_titles": ["x"], "history_ratings": [1e999]}]}', 422, "finite number"),
        (b'{"users": [{"history_titles": ["\\ud800"]}]}', 422, "history_titles"),
        (b'{"users": [{"history_titles": ["x"], "\\ud800": 1}]}', 422, "as a unicode string"),
        (b'{"users": [{"history_titles": ["x"]}], "k": 1000000}', 422, "less than or equal to 1000"),
        (b'{"users": [{"history_titles": ["x"]}], "k": true}', 422, "body.k: Input should be a valid integer"),
        (b'{"users": [{"history_titles": ["x"]}], "exclude_history": "no"}', 422, "body.exclude_history"),
        (b'{"users": [{"history_titles": ["x"]}], "allow": ["nope"]}', 422, "'nope' is not in the catalogue"),
        (b'{"users": [{"history_titles": ["x"]}], "where": "cost < 3"}', 422, "cost"),
        (b'{"users": [{"history_titles": ["x"]}], "where": "title IN (SELECT 1)"}', 422, "`where`"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(served, library, body, status, sentence):
    answer = served.client.post("/v1/recommend", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == status and sentence in answer.json()["error"], answer.text
    assert "\n" not in answer.json()["error"] and len(answer.json()) == 1
    for_stream = served.client.post("/v1/recommend/stream", content=body, headers={"Content-Type": "application/json"})
    assert (for_stream.status_code, for_stream.json()) == (status, answer.json())


def test_limits_are_checked():
    for wrong in (0, -1, float("nan"), float("inf")):
        with pytest.raises(UserError, match=f"`deadline` is {wrong}"):
            Limits(deadline=wrong)
    assert Limits(window=0).window == 0


def test_a_user_of_a_file_is_one_of_a_request(served, library):
    """A number as `user_id` and null where a rating or time is unknown are taken alike."""
    ids = library.bundle.table.item_ids[:2]
    user = {"user_id": 7, "history": ids, "history_ratings": [4, None], "history_timestamps": [100, None]}
    answer = served.client.post("/v1/recommend", json={"users": [user], "k": 3}).json()["users"][0]
    [expected] = library.recommend([user], k=3)
    assert answer["user_id"] == "7" and [item["item_id"] for item in answer["items"]] == [
        item.item_id for item in expected.items
    ]
    whole = {**user, "history_timestamps": [100.0, None], "timestamp": 1e9}
    assert served.client.post("/v1/recommend", json={"users": [whole]}).status_code == 200
    wrongs: list = [{"user_id": True}, {"user_id": 1.5}, {"history_ratings": ["x", 1]}]
    wrongs += [{"history_ratings": [True, 1]}, {"history_ratings": ["4", 1]}, {"history_timestamps": ["5", 1]}]
    for wrong in [*wrongs, {"timestamp": True}, {"timestamp": "100"}]:
        with pytest.raises(UserError):
            library.recommend([{**user, **wrong}])
        assert served.client.post("/v1/recommend", json={"users": [{**user, **wrong}]}).status_code == 422


def test_the_price_of_no_reasoning_is_that_of_the_trained_policy():
    def report(reasoning, value):
        return {
            "protocol": {"settings": {"reasoning": reasoning}},
            "unmasked": {"model": {"ndcg@10": {"value": value}}},
        }

    metrics = {"before": report("full", 0.1), "after": report("full", 0.3), "reasoning_none": report("none", 0.2)}
    assert reasoning_price(metrics) == "NDCG@10 on the test split is 0.300 with reasoning and 0.200 without."
    assert "does not hold figures with and without" in reasoning_price({"after": report("full", 0.3), "x": 3})
