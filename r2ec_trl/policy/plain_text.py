"""Data are text: what a tokenizer would read as a special token, or we as the marker, is broken up."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

from r2ec_trl.errors import UserError

ROUNDS = 20  # breaking one word up may leave another; text that is nested deeper loses its marks altogether


def special_words(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """
    The strings that a tokenizer reads as more than text: its special tokens, and the added ones in brackets or bars.
    Added plain words and blanks are text.
    """
    added = tokenizer.added_tokens_decoder.values()
    special = {str(word) for word in tokenizer.all_special_tokens} | {one.content for one in added if one.special}
    bracketed = {one.content for one in added if re.fullmatch(r"\S*\w\S*", one.content)}
    bracketed = {word for word in bracketed if not (word[0].isalnum() and word[-1].isalnum())}
    return {word for word in special | bracketed if word.strip()}


class PlainText:
    """Makes data harmless for a tokenizer; `tags` (the marker and its closing) are further words to break up."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tags: Iterable[str] = ()):
        special = special_words(tokenizer)
        words = sorted({*special, *filter(str.strip, tags)}, key=lambda word: (-len(word), word))
        pattern = "|".join(map(re.escape, words)) or "(?!)"
        self._pattern, self._any_case = re.compile(pattern), re.compile(pattern, re.IGNORECASE)
        self._marks = {ord(mark): " " for word in words for mark in word if not mark.isalnum()}
        control = sorted(word for word in special if not re.fullmatch("<0x[0-9A-F]{2}>", word))  # bytes are text
        ids: list[int] = tokenizer.convert_tokens_to_ids(control)
        self.tokenizer = tokenizer
        self._ids = frozenset(ids) - {tokenizer.unk_token_id}  # unknown characters are text as well

    def clean(self, line: str) -> str:
        """
        One line of text with single blanks, in which no special word and no tag is left: with the marker `<answer>`,
        "a  <<answer>> b" becomes "a < answer > b".
        """
        line = " ".join(line.split())
        for _ in range(ROUNDS):
            line, broken = self._pattern.subn(_broken_up, line)
            if not broken:
                return line
            line = " ".join(line.split())
        return self.bare(line)

    def bare(self, line: str) -> str:
        """A line without any of the marks that special words and tags are made of, nor such words in any case."""
        line = " ".join(self._any_case.sub(_broken_up, line.translate(self._marks)).split())
        while self._any_case.search(line):  # each time fewer characters
            line = " ".join(self._any_case.sub(" ", line).split())
        return line

    def ids(self, text: str) -> list[int]:
        """Token ids of a text without special tokens; one that would become such is broken up, line by line."""
        for clean in (str, self.clean, self.bare):
            line = "\n".join(map(clean, text.split("\n")))
            ids: list[int] = self.tokenizer(line, add_special_tokens=False)["input_ids"]
            if not self.specials(ids):
                return ids
        raise UserError(f"The tokenizer reads the text {text!r:.80} as special tokens; change it.")

    def specials(self, ids: Sequence[int]) -> Counter[int]:
        """How often each special token is among `ids`."""
        return Counter(token for token in ids if token in self._ids)


def _broken_up(match: re.Match) -> str:
    word = match.group()
    core = word.strip("".join(mark for mark in word if not mark.isalnum()))
    return f" {core} " if core != word else f"{word[0]} {word[1:]}" if len(word) > 1 else " "
