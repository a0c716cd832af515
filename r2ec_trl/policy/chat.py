"""The chat template: checked once in bounds of time and memory, then rendered under a pinned clock."""

import functools
import inspect
import json
import logging
import os
import re
import signal
import time
from collections.abc import Callable, Mapping
from datetime import date
from typing import Any, TypeAlias

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from r2ec_trl.errors import UserError

logger = logging.getLogger(__name__)

Messages: TypeAlias = "list[dict[str, Any]]"

PLAIN_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:\n{% endif %}"
)
PROBE = ("purchases of this customer", "and what comes next")  # lines that a template has to write
PROBE_LINES = 200  # a long prompt: what stalls or swells on it is refused
CPU_SECONDS, WALL_SECONDS = 1, 30  # of the child that renders a template for the first time
EXTRA_BYTES, MAX_CHARACTERS = 2**30, 10**6
_REFUSALS = (TemplateError, TypeError, ValueError, KeyError, AttributeError, OverflowError, ArithmeticError)


def ensure_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a tokenizer without a chat template the built-in plain one, said once; pad with EOS where no pad is set."""
    if tokenizer.chat_template is None:
        logger.warning("The tokenizer has no chat template: using the plain 'User: … Assistant: …' one.")
        starts = [tokenizer.bos_token_id] == tokenizer("x")["input_ids"][:1]  # a model that never met text without it
        tokenizer.chat_template = "{{ bos_token }}" * starts + PLAIN_CHAT_TEMPLATE
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError("The tokenizer has neither a pad nor an end-of-sequence token; set its `eos_token`.")
        tokenizer.pad_token = tokenizer.eos_token


def template_options(text: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """`chat_template_kwargs` of the settings as a dict; a command line gives it as JSON."""
    try:
        options = json.loads(text) if isinstance(text, str) else dict(text or {})
        json.dumps(options)
    except (TypeError, ValueError) as error:
        raise UserError(f"`chat_template_kwargs` is no JSON object: {text!r}.") from error
    if not isinstance(options, dict):
        raise UserError(f"`chat_template_kwargs` is no JSON object: {text!r}.")
    return options


class Chat:
    """
    Messages to token ids, the same on every day and for every caller.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            With a chat template.
        day (`str`):
            What the template is told when it asks for the date, `YYYY-MM-DD`.
        options (`dict`, *optional*):
            Further variables of the template, such as `{"enable_thinking": false}`.

    Attributes:
        template, kwargs (`str`, `dict`): what `apply_chat_template` needs to render as this class does; for TRL.

    Raises:
        [`UserError`]: for a template that does not write the user's words, or takes too much time or memory.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, day: str, options: Mapping[str, Any] | None = None):
        ensure_chat_template(tokenizer)
        self.tokenizer = tokenizer
        today = date.fromisoformat(day)
        self.kwargs: dict[str, Any] = {"date_string": today.strftime("%d %b %Y"), **(options or {})}
        if taken := set(options or {}) & {"messages", *inspect.signature(tokenizer.apply_chat_template).parameters}:
            raise UserError(f"`chat_template_kwargs` sets {sorted(taken)[0]!r}, which is not the user's to set.")
        if isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
            names = ", ".join(sorted(tokenizer.chat_template))
            raise UserError(f"The tokenizer has chat templates for {names} and no default; set its `chat_template`.")
        self.template = pin_clock(str(tokenizer.get_chat_template()), today, json.dumps(self.kwargs))
        check_bounds(self.template, functools.partial(self._probe, "\n".join(PROBE * PROBE_LINES)))
        self.as_parts = self._needs_parts()
        self.leading: Messages = self._leading_turns()

    def messages(self, text: str) -> Messages:
        """A user turn, after an empty system turn where the template would add one of its own."""
        return [*self.leading, {"role": "user", "content": self._content(text)}]

    def ids(self, messages: Messages) -> list[int]:
        """Token ids of chat messages with the generation prompt, as TRL makes them."""
        return list(self._apply(messages, tokenize=True, return_dict=True)["input_ids"])

    def render(self, messages: Messages) -> str:
        """The text of chat messages with the generation prompt."""
        return str(self._apply(messages, tokenize=False))

    def _apply(self, messages: Messages, **how: Any) -> Any:
        return self.tokenizer.apply_chat_template(
            messages, chat_template=self.template, add_generation_prompt=True, **how, **self.kwargs
        )

    def _content(self, text: str) -> Any:
        return [{"type": "text", "text": text}] if self.as_parts else text

    def _probe(self, text: str, as_parts: bool = False) -> str:
        self.as_parts = as_parts
        return self.render([{"role": "user", "content": self._content(text)}])

    def _needs_parts(self) -> bool:
        """Whether the template renders the user's words only as a list of parts, as many of vision models do."""
        reasons = []
        for as_parts in (False, True):
            try:
                rendered = self._probe("\n".join(PROBE), as_parts)
            except _REFUSALS as refusal:
                reasons.append(str(refusal))
                continue
            if "\n".join(PROBE) in rendered if as_parts else all(rendered.count(line) == 1 for line in PROBE):
                return as_parts
            reasons.append("they do not appear in what it renders")
        raise UserError(
            f"The tokenizer's chat template does not write the words of a user turn ({reasons[0]}); give the "
            "tokenizer another `chat_template`."
        )

    def _leading_turns(self) -> Messages:
        """None, or an empty system turn where the template would add a default one."""
        user, system = (
            {"role": role, "content": self._content(text)} for role, text in (("user", "x"), ("system", ""))
        )
        plain = self.render([user])
        try:
            emptied = self.render([system, user])
        except _REFUSALS as refusal:
            logger.debug("The chat template takes no system turn: %s", refusal)
            return []
        return [system] if len(emptied) < len(plain) else []


def pin_clock(template: str, today: date, texts: str = "") -> str:
    """
    A template that asks for the date by `strftime_now(format)`, with the answer before it: newer transformers take no
    function as a variable. Formats are looked for in the template and in `texts`.
    """
    if "strftime_now" not in template:
        return template
    codes = sorted(set(re.findall(r"(?<!\{)%-?[A-Za-z]", template + texts)), key=len, reverse=True)
    told = "".join(f" | replace({json.dumps(code)}, {json.dumps(today.strftime(code))})" for code in codes)
    return "{% macro strftime_now(format) %}{{ format" + told + " }}{% endmacro %}\n" + template


_within_bounds: set[str] = set()


def check_bounds(template: str, render: Callable[[], str]) -> None:
    """
    Refuse a template that writes without end or never ends: `render` is called once in a child with limits. One that
    passed is not tried again.
    """
    if template in _within_bounds:
        return
    if re.search(r"\|\s*random\b", template):
        raise UserError("The chat template draws at random, so no two prompts would agree; give another template.")
    if not hasattr(os, "fork"):
        return
    child = os.fork()
    if child == 0:
        status = 1
        try:
            _limit_child()
            status = 0 if len(render()) <= MAX_CHARACTERS else 1
        except MemoryError:
            status = 1
        except BaseException:  # its own complaint is made where it is rendered for good
            status = 0
        finally:
            os._exit(status)
    deadline = time.monotonic() + WALL_SECONDS
    pause = 0.0005
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            ended = os.waitpid(child, 0)
            break
        time.sleep(pause)
        pause = min(2 * pause, 0.05)
    if ended[1] != 0:
        raise UserError(
            f"The tokenizer's chat template takes more than {CPU_SECONDS} second or writes more than "
            f"{MAX_CHARACTERS:,} characters for a long prompt; give the tokenizer another `chat_template`."
        )
    _within_bounds.add(template)


def _limit_child() -> None:
    import resource  # not on every system, as `fork`

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
    if os.path.exists("/proc/self/statm"):
        with open("/proc/self/statm", encoding="ascii") as file:
            size = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + EXTRA_BYTES, size + EXTRA_BYTES))
