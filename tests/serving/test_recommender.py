"""Recommendations: the same items as evaluation ranks, histories of any kind, filters, errors of one sentence."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from conftest import PROTOCOL

from r2ec_trl.bundle.bundle import Bundle
from r2ec_trl.errors import UserError
from r2ec_trl.items.encoding import make_encoder, make_table
from r2ec_trl.policy.answer_state import add_answer_state
from r2ec_trl.policy.prompts import PromptConfig, Prompts
from r2ec_trl.policy.settings import RecommendationArguments
from r2ec_trl.serving.recommender import Recommender

RECIPE = Path(__file__).parents[2] / "recipes" / "recommend.py"


@pytest.fixture(scope="module")
def bundle(tiny_model, chat_tokenizer, shop):
    """In memory; the shop has a price from 0 to 39, unknown for i05, and a price as text."""
    items = shop["items"]
    items = items.add_column("price", [None if n == 5 else float(n) for n in range(40)])
    items = items.add_column("price_text", [str(n) for n in range(40)])
    model = tiny_model("llama")
    add_answer_state(model)
    config = PromptConfig(category="part", user_template="Bought:\n{history}\nNext?", item_template="{fields}")
    prompts = Prompts(chat_tokenizer, config, items)
    table = make_table(prompts, items, "cosine", "cpu")
    with torch.no_grad():
        table.refresh(make_encoder(model, prompts, 2048))
    return Bundle(model, prompts, table, items, protocol=PROTOCOL)


@pytest.fixture(scope="module")
def recommender(bundle):
    return Recommender(bundle)


def ids(result):
    return [item.item_id for item in result.items]


@pytest.mark.parametrize("reasoning", ["full", "none"])
def test_the_items_are_those_that_evaluation_ranks_first(recommender, bundle, shop, reasoning):
    frame = bundle.evaluate(shop["test"], reasoning)
    columns = ["user_id", "history", "history_ratings", "history_timestamps", "timestamp"]
    users = shop["test"].select_columns(columns).to_list()
    results = recommender.recommend(users, 10, exclude_history=False, reasoning=reasoning)
    assert [ids(result) for result in results] == frame["top_item_ids"].to_list()
    assert [result.user_id for result in results] == frame["user_id"].to_list()
    assert [result.has_marker for result in results] == frame["has_marker"].to_list()
    assert all("<answer>" not in result.reasoning for result in results)
    scores = [item.score for item in results[0].items]
    assert scores == sorted(scores, reverse=True)


def test_a_batch_is_many_single_users(recommender, shop):
    histories = shop["test"]["history"][:4]
    together = recommender.recommend(histories, 5)
    for history, result in zip(histories, together, strict=True):
        [alone] = recommender.recommend([history], 5)
        assert ids(alone) == ids(result) and alone.reasoning == result.reasoning
    assert recommender.recommend([]) == []


def test_questions_with_options_of_their_own_are_answered_together(recommender):
    asked = [
        {"history": ["i00", "i12"], "k": 3},
        {"history": ["i31"], "k": 2, "where": "price < 30", "reasoning": "none"},
        {"history": ["i05"], "k": 40, "exclude_history": False, "exclude": ["i01"]},
        {"history": {"history": ["i02"], "user_id": "ann"}, "k": 1, "allow": ["i09", "i31"], "reasoning": "a drum"},
        {"history": ["i39"], "k": 4, "where": "price < 30"},
    ]
    together = recommender.answer([recommender.prepare(**one) for one in asked])
    for one, result in zip(asked, together, strict=True):
        [alone] = recommender.recommend([one["history"]], **{key: one[key] for key in one if key != "history"})
        assert ids(alone) == ids(result) and (alone.reasoning, alone.user_id) == (result.reasoning, result.user_id)


def test_a_watch_sees_every_token_and_ends_a_reasoning(recommender):
    questions = [recommender.prepare(["i00"]), recommender.prepare(["i31", "i12"])]
    whole, seen = recommender.answer(questions), {0: [], 1: []}
    assert recommender.answer(questions, lambda number, ids: seen[number].append(ids)) == whole
    assert [len(ids) for ids in seen[0]] == list(range(1, len(seen[0]) + 1)) and len(seen[0]) > 2
    stopped = recommender.answer(questions, lambda number, ids: number == 0 and len(ids) == 2)
    assert stopped[1].reasoning == whole[1].reasoning
    assert stopped[0].reasoning != whole[0].reasoning and whole[0].reasoning.startswith(stopped[0].reasoning)


def test_history_allow_and_exclude(recommender):
    [everything] = recommender.recommend([["i00", "i01"]], 100, exclude_history=False)
    [rest] = recommender.recommend([["i00", "i01"]], 100)
    assert ids(rest) == [item for item in ids(everything) if item not in ("i00", "i01")]
    [allowed] = recommender.recommend([["i00", "i01"]], 100, allow=["i09", "i00", "i31"], exclude=["i31"])
    assert ids(allowed) == ["i09"]
    assert allowed.items[0].title == "guitar book"


def test_titles_are_as_good_as_ids(recommender):
    [by_id] = recommender.recommend([["i00", "i12"]], 40)
    [by_title] = recommender.recommend([{"history_titles": ["guitar strings", "violin case"]}], 40)
    assert by_id == by_title
    [folded] = recommender.recommend([{"history_titles": ["Guitar  Strings", "violin case"]}], 40)
    assert {"i00", "i12"}.isdisjoint(ids(folded))
    [foreign] = recommender.recommend([{"history_titles": ["a grand piano from elsewhere"]}], 40)
    assert len(foreign.items) == 40  # nothing of the catalogue was bought


def test_what_is_remembered_of_a_catalogue_ends_with_it(bundle):
    """Two items of one title are both bought; a price or title that changes is the new one at once."""
    own = Bundle(bundle.model, bundle.prompts, bundle.table, bundle.items, protocol=PROTOCOL)
    recommender, user = Recommender(own), [{"history_titles": ["guitar strings"]}]
    for removed, cheap in (({"i00"}, {"i01", "i02"}), ({"i00", "i01"}, {"i02", "i39"})):
        [everything] = recommender.recommend(user, 40, reasoning="none")
        assert {f"i{n:02d}" for n in range(40)} - set(ids(everything)) == removed
        assert set(ids(recommender.recommend(user, 40, reasoning="none", where="price < 3")[0])) == cheap
        own.update_items([{"item_id": "i01", "title": "Guitar  strings"}, {"item_id": "i39", "price": 1.0}])


def test_answers_are_of_the_precision_that_was_evaluated(bundle, shop):
    half = {**PROTOCOL, "mixed_precision": "bf16"}
    own = Bundle(bundle.model, bundle.prompts, bundle.table, bundle.items, protocol=half)
    users = [{"history": history} for history in shop["test"]["history"][:8]]
    scores = [
        [item.score for result in Recommender(one).recommend(users, 40, reasoning="none") for item in result.items]
        for one in (bundle, own)
    ]
    assert scores[0] != scores[1] == pytest.approx(scores[0], abs=0.05)


def test_an_accent_is_one_character_or_two(recommender, monkeypatch):
    titles = {"caf\u00e9 stool": [3]}
    monkeypatch.setattr(recommender, "_rows_by_title", lambda: titles)
    assert recommender.prepare({"history_titles": ["CAFE\u0301 stool"]}).user["rows"] == [3]


def test_a_user_without_purchases_is_answered(recommender):
    """By id or by title, alone or among others: the same list, of which nothing is left out."""
    [alone], [title] = recommender.recommend([[]], 40), recommender.recommend([{"history_titles": []}], 40)
    assert len(alone.items) == 40 and ids(alone) == ids(title)
    _, among = recommender.recommend([["i00"], []], 40)
    assert ids(among) == ids(alone) and among.reasoning == alone.reasoning


def test_ratings_and_times_reach_the_prompt(recommender):
    plain = {"history": ["i00", "i12"]}
    full = {**plain, "history_ratings": [5, 1], "history_timestamps": [0, 86_400], "timestamp": 2 * 86_400}
    [one], [other] = recommender.recommend([plain], 3), recommender.recommend([full], 3)
    assert one.items[0].score != other.items[0].score


def test_reasoning_can_be_given(recommender, bundle):
    users = [["i00"], ["i31"]]
    given = recommender.recommend(users, 3, reasoning="the drum is next")
    assert [result.reasoning for result in given] == ["the drum is next"] * 2
    each = recommender.recommend(users, 3, reasoning=["the drum is next", "a lamp <answer> and more"])
    assert each[0] == given[0]
    assert each[1].reasoning == "a lamp" and each[1].has_marker  # what follows the marker is cut
    nothing = recommender.recommend(users, 3, reasoning="none")
    assert nothing[0].reasoning == "" and nothing[0].items != given[0].items
    with pytest.raises(UserError, match="1 reasonings for 2 users"):
        recommender.recommend(users, reasoning=["only one"])


def test_where(recommender):
    [cheap] = recommender.recommend([["i39"]], 40, where="price < 10")
    assert set(ids(cheap)) == {f"i0{n}" for n in range(10) if n != 5}  # i05 has no price
    [both] = recommender.recommend([["i39"]], 40, where="price < 10 AND brand = 'orvo'", exclude=["i01"])
    assert set(ids(both)) == {"i04", "i07"}


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ({"histories": [["i00"], ["nope"]]}, "User 1 bought 'nope'.*history_titles"),
        ({"histories": ["i00"]}, "User 0 is neither a list of item ids nor an object with `history`, but 'i00'"),
        ({"histories": "i00"}, "put a single user into a list"),
        ({"histories": {"history": ["i00"]}}, "put a single user into a list"),
        ({"histories": [{"history": "i00"}]}, "User 0: `history` must be a list of texts"),
        ({"histories": [[3]]}, "must be a list of texts"),
        ({"histories": [{"user_id": "ann", "titles": ["x"]}]}, "User ann has the key 'titles'"),
        ({"histories": [{"user_id": "ann"}]}, "User ann: give either"),
        ({"histories": [{"history": ["i00"], "history_titles": ["x"]}]}, "give either"),
        ({"histories": [{"history": ["i00"], "history_ratings": [1, 2]}]}, "1 purchases, but 2 `history_ratings`"),
        ({"histories": [["i00"]], "reasoning": 3}, "`reasoning` is 3; give 'full'"),
        ({"histories": [["i00"]], "reasoning": ["\ud800"]}, "`reasoning` is '.ud800'"),
        ({"k": 0}, "`k` is 0"),
        ({"k": 2.5}, "`k` is 2.5; ask for one item at least, as a whole number"),
        ({"allow": "i00"}, "`allow` is 'i00'; give a list of item ids"),
        ({"allow": [["i00"]]}, "`allow` is ..'i00'.,.; give a list"),
        ({"exclude": [3]}, "`exclude` is .3,.; give a list"),
        ({"allow": ["nope"]}, "'nope' is not in the catalogue"),
        ({"exclude": ["nope"]}, "'nope' is not in the catalogue"),
        ({"where": "price < 0"}, "No item is left to recommend"),
        ({"where": "cost < 3"}, 'unable to find column "cost"; the catalogue has item_id, title'),
    ],
)
def test_mistakes_are_one_sentence(recommender, arguments, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        recommender.recommend(**{"histories": [["i00"]], **arguments})
    assert "\n" not in str(caught.value)


def test_a_given_reasoning_is_text_and_no_token_of_its_own(recommender):
    """Special tokens in it are broken up; text without any is taken as it is, blanks and lines included."""
    tokenizer, eos = recommender.bundle.tokenizer, recommender.bundle.tokenizer.eos_token
    ids = recommender.bundle.prompts.plain.ids(f"a  bow\n{eos} and <answer> more")
    assert not set(ids) & set(tokenizer.all_special_ids) and "bow" in tokenizer.decode(ids)
    text = "a  bow\n  is next"
    assert recommender.bundle.prompts.plain.ids(text) == tokenizer(text, add_special_tokens=False)["input_ids"]
    [spoken] = recommender.recommend([["i00"]], 3, reasoning=f"an oboe {eos} reed")
    assert eos not in spoken.reasoning and spoken.reasoning.endswith("reed") and len(spoken.items) == 3


# --------------------------------------------------------------------------- the recipe
@pytest.fixture
def recipe(monkeypatch, capsys):
    """`recipe("--k", "3", ...)` runs recipes/recommend.py in this process and returns what it printed."""
    spec = importlib.util.spec_from_file_location("recommend_recipe", RECIPE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def call(*words):
        monkeypatch.setattr("sys.argv", ["recommend.py", *map(str, words)])
        capsys.readouterr()
        module.main()
        return capsys.readouterr().out

    return call


def test_recipe_reads_a_bundle_and_users(recipe, bundle, recommender, tmp_path):
    folder = bundle.save(tmp_path / "bundle")
    users = [["i00", "i01"], {"user_id": "ann", "history_titles": ["violin case", "something else"]}]
    (tmp_path / "users.jsonl").write_text("\n".join(map(json.dumps, users)) + "\n\n")
    words = ("--bundle", folder, "--input", tmp_path / "users.jsonl", "--k", 3, "--where", "price < 30")
    lines = recipe(*words, "--format", "jsonl").splitlines()
    expected = recommender.recommend(users, 3, where="price < 30")
    assert [json.loads(line) for line in lines] == [result.to_dict() for result in expected]
    shown = recipe("--bundle", folder, "--history", "i00", "--k", 2, "--reasoning", "none", "--exclude", "i03")
    assert "user 0" in shown and "score" in shown


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_data_are_harmless_on_a_terminal_and_as_they_are_in_a_file(recipe, bundle, tmp_path, monkeypatch, kind):
    folder = bundle.save(tmp_path / "bundle")
    (tmp_path / "users.jsonl").write_text(json.dumps({"user_id": "a\x9b2J", "history": ["i00"]}))
    words = ("--bundle", folder, "--input", tmp_path / "users.jsonl", "--k", 1, "--format", kind, "--reasoning", "x")
    assert "a\x9b2J" in recipe(*words)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    shown = recipe(*words)
    assert "a\\x9b2J" in shown and "\x9b" not in shown and shown.endswith("\n")


def test_recipe_makes_a_bundle_of_a_model_and_a_dataset(recipe, shop_folder, tiny_model_folder, tmp_path):
    lines = recipe(
        *("--model_name_or_path", tiny_model_folder("llama"), "--dataset", shop_folder, "--item_fields", "title"),
        *("--save_bundle", tmp_path / "made", "--max_completion_length", 4, "--history_titles", "guitar case", "x"),
        *("--history_ratings", 5, 4, "--format", "jsonl", "--k", 2),
    )
    [result] = Recommender.from_pretrained(tmp_path / "made").recommend(
        [{"history_titles": ["guitar case", "x"], "history_ratings": [5.0, 4.0]}], 2
    )
    assert json.loads(lines) == result.to_dict()


@pytest.mark.parametrize(
    "words, sentence",
    [
        ((), "No user given"),
        (("--history", "i00", "--history_titles", "x"), "--history and --history_titles name different users"),
        (("--bundle", "x", "--history", "i00", "--item_fields", "title"), "--item_fields is decided by the bundle"),
        (("--bundle", "x", "--history", "i00", "--adapter", "y"), "--adapter is decided by the bundle"),
        (("--bundle", "nowhere", "--history", "i00"), "neither a folder nor a hub id"),
        (("--history", "i00"), "No dataset given"),
    ],
)
def test_recipe_mistakes(recipe, words, sentence):
    with pytest.raises(UserError, match=sentence):
        recipe(*words)


@pytest.mark.parametrize("line, sentence", [("{", "line 2 is not JSON"), ("3", "line 2 is neither a list")])
def test_recipe_names_the_bad_line(recipe, tmp_path, line, sentence):
    (tmp_path / "users.jsonl").write_text(f'["i00"]\n{line}\n')
    with pytest.raises(UserError, match=sentence):
        recipe("--bundle", "x", "--input", tmp_path / "users.jsonl")


# ----------------------------------------------------------------------- prompt presets
def test_the_reference_preset():
    settings = RecommendationArguments(prompt_preset="reference")
    assert settings.prompt_config().item_fields == ("title", "average_rating", "rating_number", "description")
    assert (settings.marker, settings.similarity, settings.item_temperature) == ("<answer>", "cosine", 0.02)
    assert RecommendationArguments(prompt_preset="reference", item_temperature=0.05).item_temperature == 0.05
    with pytest.raises(UserError, match="`prompt_preset` is 'other'; give one of reference"):
        RecommendationArguments(prompt_preset="other")
