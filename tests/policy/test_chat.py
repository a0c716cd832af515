"""The chat template: no clock, nothing lost, no end of time or memory."""

import copy
import datetime
import time

import pytest
import transformers.utils.chat_template_utils as rendering
from datasets import Dataset
from tokenizers.processors import TemplateProcessing

from r2ec_trl.errors import UserError
from r2ec_trl.policy.chat import PLAIN_CHAT_TEMPLATE, Chat, ensure_chat_template, pin_clock
from r2ec_trl.policy.prompts import PromptConfig, Prompts

USER = {"user_id": "u", "history": ["i00"]}
END = "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
TODAY = "Today Date: {{ strftime_now('%d %b %Y') }}\n"
DATED = TODAY + "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}\n" + END
DATE_STRING = (
    "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{{ date_string }}"
    "{% for m in messages %}{{ m.content }}\n" + END
)
PARTS = (
    "{% for m in messages %}<|{{ m.role }}|>\n{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}"
    "{% endif %}{% endfor %}\n" + END
)
THINKING = "{% if enable_thinking is false %}Quick. {% endif %}{% for m in messages %}{{ m.content }}"


@pytest.fixture
def tokenizer(plain_tokenizer):
    """A tokenizer of one's own for each template."""

    def make(template=None, **tokens):
        one = type(plain_tokenizer)(
            tokenizer_object=plain_tokenizer.backend_tokenizer,
            **{"pad_token": "<pad>", "eos_token": "<eos>", **tokens},
        )
        one.chat_template = template
        return one

    return make


@pytest.fixture
def days_later(monkeypatch):
    def move(days):
        class Later(datetime.datetime):
            @classmethod
            def now(cls, tz=None):
                return datetime.datetime.now(tz) + datetime.timedelta(days=days)

        monkeypatch.setattr(rendering, "datetime", Later)

    return move


@pytest.mark.parametrize("template", [DATED, DATE_STRING])
def test_prompts_know_no_clock(tokenizer, shop, days_later, template):
    prompts = Prompts(tokenizer(template), PromptConfig(), shop["items"])
    today = prompts.user_ids(USER), prompts.item_ids(shop["items"][0])
    assert "26 Jul 2024" in prompts.tokenizer.decode(today[0])  # Llama's own, where it knows none
    days_later(45)
    assert (prompts.user_ids(USER), prompts.item_ids(shop["items"][0])) == today
    other = Prompts(tokenizer(template), PromptConfig(prompt_date="2026-01-02"), shop["items"])
    assert "02 Jan 2026" in other.tokenizer.decode(other.user_ids(USER))
    assert other.rendered_fingerprint() != prompts.rendered_fingerprint()
    with pytest.raises(UserError, match="`prompt_date` is 'soon'; give a day as YYYY-MM-DD"):
        PromptConfig(prompt_date="soon")


def test_trl_renders_under_the_same_clock(make_trainer, chat_tokenizer, shop, days_later):
    """What the sampler is given is what the scorer reads, whatever the day."""
    one = copy.deepcopy(chat_tokenizer)
    one.chat_template = DATED
    trainer = make_trainer(peft=False, tokenizer=one)
    days_later(45)
    messages = trainer.prompts.user_messages(shop["train"][0])
    prompt_ids, *_ = trainer._tokenize_prompts([messages])
    assert prompt_ids == [trainer.prompts.chat.ids(messages)]
    assert "Today Date: 26 Jul 2024" in one.decode(prompt_ids[0])


def test_the_clock_answers_in_every_format(tokenizer):
    """Wherever the template asks, also in a macro of its own; what does not ask is left as it is."""
    asks = (
        "{%- macro when(f) %}{{ strftime_now(f) }}{% endmacro %}\n{% set day = '%-d' %}"
        "{{ when('%A %d/%m/%y %H:%M') }} {{ strftime_now(day ~ '. %B') }} {{ strftime_now(form) }}|"
        "{% for m in messages %}{{ m.content }}" + END
    )
    chat = Chat(tokenizer(asks), "2024-02-03", {"form": "%j"})
    assert chat.render([{"role": "user", "content": "x"}]).split("|")[0] == "Saturday 03/02/24 00:00 3. February 034"
    assert pin_clock(PLAIN_CHAT_TEMPLATE, datetime.date(2024, 2, 3)) == PLAIN_CHAT_TEMPLATE
    assert chat.tokenizer.chat_template == asks


def test_the_fingerprint_covers_what_is_rendered(tokenizer, shop):
    prints = {
        Prompts(tokenizer(template), PromptConfig(), shop["items"]).rendered_fingerprint()
        for template in (DATED, DATE_STRING, None)
    }
    assert len(prints) == 3
    # fields that came later leave the fingerprint of 0.1.0 as it was
    assert PromptConfig().fingerprint() == "0229e60f14aa2c01c1bfb082bf35a8fc7e3b76f92d3c728e157b5626eccae7b0"
    assert PromptConfig(chat_template_kwargs='{"a": 1}').fingerprint() != PromptConfig().fingerprint()


def test_a_template_of_content_parts_is_served(tokenizer, shop):
    prompts = Prompts(tokenizer(PARTS), PromptConfig(), shop["items"])
    [message] = prompts.user_messages(USER)
    assert message["content"][0]["type"] == "text" and "guitar strings" in message["content"][0]["text"]
    plain = Prompts(tokenizer(PARTS.replace("part.text", "part['text']")), PromptConfig(), shop["items"])
    assert prompts.user_ids(USER) == plain.user_ids(USER)
    assert "guitar strings" in prompts.tokenizer.decode(prompts.user_ids(USER))
    assert len({tuple(ids) for ids in prompts.catalogue_ids(shop["items"])}) == 40


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% if m.role == 'human' %}{{ m.content }}{% endif %}" + END,
        "{% for m in messages %}<|{{ m.role }}|>\n" + END,
        "{% for m in messages %}{{ m.content[:20] }}\n" + END,
        "{% for m in messages %}{{ m.content | upper }}\n" + END,
        "{{ raise_exception('no users here') }}",
        "{{ messages[0].content + 3 }}",
        "{% for m in messages %}{{ m.content }}",  # no template at all
    ],
)
def test_a_template_without_the_users_words_is_refused(tokenizer, template):
    with pytest.raises(UserError, match="chat template does not write the words of a user turn .*another"):
        Chat(tokenizer(template), "2024-07-26")


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'x' * 5000000000 }}",
        "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
        "{{ 'x' * 2000000 }}",
    ],
)
def test_a_template_without_end_is_refused_in_seconds(tokenizer, template):
    start = time.perf_counter()
    with pytest.raises(UserError, match="chat template takes more than 1 second or writes more than 1,000,000"):
        Chat(tokenizer(template + "{% for m in messages %}{{ m.content }}" + END), "2024-07-26")
    assert time.perf_counter() - start < 35


def test_a_template_that_draws_is_refused(tokenizer):
    with pytest.raises(UserError, match="draws at random"):
        Chat(tokenizer("{{ [1, 2] | random }}{% for m in messages %}{{ m.content }}" + END), "2024-07-26")


def test_variables_of_the_template_reach_every_prompt(tokenizer, shop):
    """`chat_template_kwargs` is a prompt field: training, evaluation, items and bundles read it from one place."""
    one = tokenizer(THINKING + END)
    for given in ('{"enable_thinking": false}', {"enable_thinking": False}):
        config = PromptConfig(chat_template_kwargs=given)
        assert config.chat_template_kwargs == {"enable_thinking": False}
        prompts = Prompts(one, config, shop["items"])
        for ids in (prompts.user_ids(USER), prompts.item_ids(shop["items"][0])):
            assert one.decode(ids).startswith("Quick. ")
    assert not one.decode(Prompts(one, PromptConfig(), shop["items"]).user_ids(USER)).startswith("Quick. ")
    for given, words in (("{", "no JSON object"), ("[1]", "no JSON object"), ({"x": {1}}, "no JSON object")):
        with pytest.raises(UserError, match=words):
            PromptConfig(chat_template_kwargs=given)
    with pytest.raises(UserError, match="sets 'tokenize'"):
        Prompts(one, PromptConfig(chat_template_kwargs={"tokenize": False}), shop["items"])


def test_a_catalogue_of_equal_prompts_is_refused(tokenizer, shop):
    for fields in (("name",), ("title, description",), ("brand",)):
        with pytest.raises(UserError, match="40 titles make only .* different item prompts.*item_fields"):
            Prompts(tokenizer(), PromptConfig(item_fields=fields), shop["items"]).catalogue_ids(shop["items"])
    same = Dataset.from_list([{"item_id": f"i{n}", "title": "lamp"} for n in range(3)])  # their texts are equal too
    assert len(Prompts(tokenizer(), PromptConfig(), same).catalogue_ids(same)) == 3


def test_a_tokenizer_without_pad_gets_its_end_token(tokenizer):
    one = tokenizer(pad_token=None)
    ensure_chat_template(one)
    assert one.pad_token == "<eos>"
    with pytest.raises(UserError, match="neither a pad nor an end-of-sequence token"):
        ensure_chat_template(tokenizer(pad_token=None, eos_token=None))


def test_the_plain_template_starts_as_the_tokenizer_does(plain_tokenizer):
    """Llama and Gemma never met text without its first token; GPT-2 has one and does not write it."""
    for starts in (True, False):
        backend = copy.deepcopy(plain_tokenizer.backend_tokenizer)
        if starts:
            backend.post_processor = TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", 0)])
        tokenizer = type(plain_tokenizer)(tokenizer_object=backend, eos_token="<eos>", bos_token="<pad>")
        chat = Chat(tokenizer, "2024-02-03")
        assert (chat.ids(chat.messages("x"))[0] == 0) == starts and chat.ids(chat.messages("x")).count(0) == starts


def test_of_several_templates_the_default_is_taken(tokenizer):
    several = tokenizer()
    several.chat_template = {"default": PLAIN_CHAT_TEMPLATE, "tools": "x"}
    assert Chat(several, "2024-02-03").template == PLAIN_CHAT_TEMPLATE
    several.chat_template = {"tools": "x", "rag": "y"}
    with pytest.raises(UserError, match="has chat templates for rag, tools and no default; set its `chat_template`"):
        Chat(several, "2024-02-03")
