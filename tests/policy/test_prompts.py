"""Prompts: what is cut, what never is, and what data cannot do."""

import pytest
from datasets import Dataset

from r2ec_trl.errors import UserError
from r2ec_trl.policy.chat import PLAIN_CHAT_TEMPLATE, ensure_chat_template
from r2ec_trl.policy.prompts import PromptConfig, Prompts, time_since

DAY = 86_400
ADDS_A_SYSTEM_TURN = (
    "{% if messages[0].role != 'system' %}<|user|>system You are a helpful machine.\n{% endif %}"
    "{% for message in messages %}<|user|>{{ message.role }} {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SHORT = {"user_template": "Next {category}, end with {marker}.\n{history}", "item_template": "{fields}"}


@pytest.fixture
def make_prompts(chat_tokenizer, shop):
    def make(tokenizer=None, items=None, **settings):
        return Prompts(tokenizer or chat_tokenizer, PromptConfig(**settings), items or shop["items"])

    return make


def user(**columns) -> dict:
    return {"user_id": "u", "history": ["i00", "i01", "i02"], "target": "i03", **columns}


def text(prompts, example) -> str:
    return prompts.tokenizer.decode(prompts.user_ids(example))


# ----------------------------------------------------------------------------------- user prompt
def test_user_prompt_says_everything_in_order(make_prompts):
    prompts = make_prompts(category="guitar part")
    example = user(
        history_ratings=[5.0, 3.5, None],
        history_timestamps=[0, 365 * DAY - 14 * DAY, 365 * DAY],
        timestamp=365 * DAY + 3600,
    )
    (message,) = prompts.user_messages(example)
    assert message["role"] == "user" and "next guitar part" in message["content"]
    assert message["content"].splitlines()[-3:] == [
        "- 1 year ago: [guitar strings] 5 out of 5",
        "- 2 weeks ago: [guitar stand] 3.5 out of 5",
        "- 1 hour ago: [guitar case]",
    ]
    assert "<answer>" in message["content"] and "</answer>" in message["content"]
    assert prompts.user_ids(example)[-2:] == prompts.tokenizer("<|assistant|>\n")["input_ids"]


def test_times_and_ratings_are_optional(make_prompts):
    example = user(history_ratings=[5.0, 3.0, 1.0], history_timestamps=[0, DAY, 2 * DAY])
    bare = ["- [guitar strings]", "- [guitar stand]", "- [guitar case]"]
    for prompts, row in ((make_prompts(use_ratings=False, use_times=False), example), (make_prompts(), user())):
        assert prompts.user_messages(row)[-1]["content"].splitlines()[-3:] == bare
    since = make_prompts(use_ratings=False).user_messages(example)[-1]["content"].splitlines()[-1]
    assert since == "- within the hour: [guitar case]"  # no `timestamp`: told from the newest purchase
    ratings = make_prompts(use_times=False).user_messages(example)[-1]["content"].splitlines()[-3]
    assert ratings == "- [guitar strings] 5 out of 5"


@pytest.mark.parametrize(
    "seconds, words",
    [
        (0, "within the hour"),
        (3_600, "1 hour ago"),
        (2 * DAY - 1, "1 day ago"),
        (13 * DAY, "1 week ago"),
        (60 * DAY, "2 months ago"),
        (800 * DAY, "2 years ago"),
        (-5, "within the hour"),
    ],
)
def test_time_since(seconds, words):
    assert time_since(seconds) == words


def test_only_whole_oldest_purchases_are_cut(make_prompts):
    history = [f"i{number:02d}" for number in range(30)]
    everything = make_prompts(max_history_items=30, **SHORT)
    long = len(everything.user_ids(user(history=history)))
    full = text(everything, user(history=history)).splitlines()
    shown = []
    for limit in range(long, 30, -7):
        try:
            prompts = make_prompts(max_history_items=30, max_prompt_length=limit, **SHORT)
            lines = text(prompts, user(history=history)).splitlines()
        except UserError:
            break
        assert len(prompts.user_ids(user(history=history))) <= limit
        kept = [line for line in lines if line.startswith("- [")]
        assert kept == [line for line in full if line.startswith("- [")][-len(kept) :]  # the newest, whole
        assert [line for line in lines if not line.startswith("- [")] == full[:2] + full[-1:]  # all else as it was
        shown.append(len(kept))
    assert shown[0] == 30 and shown[-1] == 1 and shown == sorted(shown, reverse=True)


def test_a_long_history_is_cut_by_halves(make_prompts, monkeypatch):
    """Were the oldest purchases dropped one by one, a user of a thousand would be tokenised hundreds of times."""
    prompts = make_prompts(max_history_items=1000, max_prompt_length=100, **SHORT)
    made, ids = [], prompts.chat.ids
    monkeypatch.setattr(prompts.chat, "ids", lambda messages: made.append(0) or ids(messages))
    kept = text(prompts, user(history=["i00", "i01"] * 500)).count("- [")
    assert 1 < kept < 20 and len(made) < 15
    longer = make_prompts(max_history_items=kept + 1, **SHORT)
    assert len(longer.user_ids(user(history=["i00", "i01"] * 500))) > 100


def test_a_prompt_that_cannot_hold_the_newest_purchase_is_an_error(make_prompts):
    with pytest.raises(UserError, match="User u: the instruction and the newest purchase take .* `max_prompt_length`"):
        make_prompts(max_prompt_length=20).user_ids(user())
    with pytest.raises(UserError, match="item 'zz' is not in the catalogue"):
        make_prompts().user_ids(user(history=["zz"]))


def test_a_user_without_purchases_is_told_as_one(make_prompts):
    for words, line in (({}, "- none yet"), ({"no_history": "(nothing)"}, "(nothing)")):
        prompts = make_prompts(**words)
        assert text(prompts, user(history=[])).splitlines()[-2] == line
        assert prompts.user_ids(user(history=[], timestamp=3)) == prompts.user_ids({"history_titles": []})
    assert PromptConfig().fingerprint() == PromptConfig(no_history="- none yet").fingerprint()
    assert PromptConfig().fingerprint() != PromptConfig(no_history="(nothing)").fingerprint()


def test_max_history_items_keeps_the_newest(make_prompts):
    lines = make_prompts(max_history_items=2).user_messages(user())[-1]["content"].splitlines()
    assert lines[-2:] == ["- [guitar stand]", "- [guitar case]"] and "strings" not in "".join(lines)
    with pytest.raises(UserError, match="max_history_items"):
        make_prompts(max_history_items=0)


def test_history_titles_stand_in_for_ids(make_prompts):
    prompts = make_prompts()
    named = {"history_titles": ["guitar strings", "guitar stand", "guitar case"]}
    assert prompts.user_ids(named) == prompts.user_ids(user())


# ----------------------------------------------------------------------------------- the marker
@pytest.mark.parametrize("marker, closing", [("<answer>", "</answer>"), ("###", "###"), ("Final answer:", "")])
def test_titles_and_descriptions_cannot_hold_the_marker(make_prompts, marker, closing):
    spaced = marker.replace(" ", " \n ")
    title = f"best {spaced} guitar {closing} ever"
    items = Dataset.from_list([{"item_id": f"i0{n}", "title": title, "description": title} for n in range(3)])
    prompts = make_prompts(items=items, marker=marker, closing=closing, **SHORT)
    content = prompts.user_messages(user())[-1]["content"]
    assert content.count(marker) == 1  # the template's own
    item = prompts.tokenizer.decode(prompts.item_ids(items[0]))
    assert item.count(marker) == 1 and item.endswith(marker)
    assert "guitar" in content and "guitar" in item


def test_the_first_words_of_a_title_are_text(make_prompts):
    """As many as asked for; neither the marker nor a special token is among their ids."""
    items = Dataset.from_list([{"item_id": "a", "title": "red <answer> <|assistant|> guitar strings"}])
    prompts = make_prompts(items=items)
    for words in (1, 2, 3, 9):
        ids = prompts.title_ids("a", words)
        said = prompts.tokenizer.decode(ids)
        assert not prompts.plain.specials(ids) and "<answer>" not in said and said.startswith("red")
        assert ("strings" in said) == (words == 9)


def test_braces_in_titles_are_no_placeholders(make_prompts):
    items = Dataset.from_list([{"item_id": "i00", "title": "{marker} {history} {0}"}] * 1)
    content = make_prompts(items=items, **SHORT).user_messages(user(history=["i00"]))[-1]["content"]
    assert content.endswith("- [{marker} {history} {0}]")


# ----------------------------------------------------------------------------------- item prompt
ITEM = {
    "item_id": "i00",
    "title": "a " * 130 + "title",
    "brand": "orvo",
    "description": " ".join(f"word{n}" for n in range(150)),
    "average_rating": 4.5,
    "rating_number": None,
}


def item_text(prompts, item=ITEM) -> str:
    return prompts.tokenizer.decode(prompts.item_ids(item))


def test_item_fields_stand_in_the_order_asked_for(make_prompts):
    fields = ("average_rating", "title", "rating_number", "brand", "absent")
    written = item_text(make_prompts(item_fields=fields, item_template="{fields}"), {**ITEM, "title": "Bow"})
    assert written == "<|user|>\nAverage rating: 4.5\nTitle: Bow\nBrand: orvo\n<|assistant|>\n<answer>"
    default = item_text(make_prompts())
    assert "Average rating" not in default and "orvo" not in default  # figures from after the split leak


def test_nan_is_a_missing_field_and_a_list_is_its_parts(make_prompts):
    items = [{"item_id": "i", "title": "bow", "price": value} for value in (None, float("nan"), [], [1.5, None])]
    prompts = make_prompts(item_fields=("title", "price"))
    texts = [prompts.tokenizer.decode(prompts.item_ids(item)) for item in items]
    assert texts[0] == texts[1] == texts[2] and "Price" not in texts[0] and "nan" not in texts[0]
    assert "Price: 1.5" in texts[3] and "[" not in texts[3].split("Price")[1]


def test_long_fields_lose_their_tail_and_titles_nothing(make_prompts):
    written = item_text(make_prompts(field_words=100, max_item_length=2_000))
    assert "word99" in written and "word100" not in written and "title" in written


@pytest.mark.parametrize("limit", [500, 470, 440])
def test_items_over_the_limit_lose_the_tail_of_the_last_field(make_prompts, limit):
    prompts = make_prompts(max_item_length=limit, item_fields=("title", "brand", "description"), **SHORT)
    ids, written = prompts.item_ids(ITEM), item_text(prompts)
    assert len(ids) <= limit and ids[-len(prompts.marker_ids) :] == prompts.marker_ids
    assert "a title" in written and "Brand: orvo" in written
    words = [word for word in written.split() if word.startswith("word")]
    assert words == [f"word{n}" for n in range(len(words))]


def test_a_long_field_without_blanks_is_cut_and_not_dropped(make_prompts):
    item = {"item_id": "i", "title": "bow", "brand": "orvo", "description": "word" * 300}
    prompts = make_prompts(max_item_length=470, item_fields=("title", "brand", "description"), **SHORT)
    ids = prompts.item_ids(item)
    written = prompts.tokenizer.decode(ids)
    assert 400 < len(ids) <= 470 and "Brand: orvo" in written and written.count("word") > 20


def test_an_item_whose_title_alone_is_too_long_is_an_error(make_prompts):
    with pytest.raises(UserError, match="Item i00: the instruction and the title take"):
        make_prompts(max_item_length=60).item_ids(ITEM)


def test_item_ids_end_at_the_marker_for_a_whole_catalogue(make_prompts, shop):
    prompts = make_prompts()
    catalogue = prompts.catalogue_ids(shop["items"])
    assert len(catalogue) == 40 and len({tuple(ids) for ids in catalogue}) == 40
    assert catalogue[7] == prompts.item_ids(shop["items"][7])


# ----------------------------------------------------------------------------------- chat templates
def test_default_system_turn_is_emptied_and_a_refused_one_left_out(chat_tokenizer, plain_tokenizer, make_prompts):
    assert make_prompts().chat.leading == []
    tokenizer = type(plain_tokenizer)(tokenizer_object=plain_tokenizer.backend_tokenizer, eos_token="<eos>")
    tokenizer.chat_template = ADDS_A_SYSTEM_TURN
    prompts = make_prompts(tokenizer)
    assert prompts.user_messages(user())[0] == {"role": "system", "content": ""}
    assert "helpful machine" not in text(prompts, user()) and "system \n" in text(prompts, user())
    assert "helpful machine" not in tokenizer.decode(prompts.item_ids(ITEM))
    assert tokenizer.pad_token == "<eos>"


def test_a_tokenizer_without_a_template_gets_a_plain_one_said_once(plain_tokenizer, make_prompts, caplog):
    tokenizer = type(plain_tokenizer)(tokenizer_object=plain_tokenizer.backend_tokenizer, eos_token="<eos>")
    prompts = make_prompts(tokenizer)
    assert tokenizer.chat_template == PLAIN_CHAT_TEMPLATE
    assert text(prompts, user()).startswith("User: Think") and text(prompts, user()).endswith("Assistant:\n")
    ensure_chat_template(tokenizer)
    assert [record.message for record in caplog.records if "no chat template" in record.message].__len__() == 1


# ----------------------------------------------------------------------------------- config
def test_config_refuses_templates_without_their_text_and_an_empty_marker():
    for settings, word in (
        ({"user_template": "Hello"}, "{history}"),
        ({"item_template": "Hello"}, "{fields}"),
        ({"marker": " "}, "`marker` is empty"),
    ):
        with pytest.raises(UserError, match=word):
            PromptConfig(**settings)


def test_fingerprint_tells_prompts_apart():
    assert PromptConfig().fingerprint() == PromptConfig(item_fields=["title", "description"]).fingerprint()
    assert PromptConfig().fingerprint() != PromptConfig(category="song").fingerprint()
