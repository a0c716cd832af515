"""A condition on the catalogue's columns, for `where`: a small grammar, parsed here and compiled to polars."""

import operator
import re
from collections.abc import Callable, Collection
from typing import Any

import polars as pl

from r2ec_trl.errors import UserError

MAX_LENGTH, MAX_DEPTH, MAX_TERMS = 100_000, 50, 2_000  # characters, nested parentheses, comparisons
_COMPARED = 50  # numbers of IN that are compared one by one
TYPES = {
    **dict.fromkeys(("DOUBLE", "FLOAT", "REAL"), pl.Float64),
    **dict.fromkeys(("BIGINT", "INT", "INTEGER"), pl.Int64),
    **dict.fromkeys(("VARCHAR", "TEXT", "STRING"), pl.String),
    **dict.fromkeys(("BOOLEAN", "BOOL"), pl.Boolean),
}
_TOKEN = re.compile(
    r"\s+|(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?(?!\w))|(?P<text>'(?:[^']|'')*')"
    r'|(?P<column>"(?:[^"]|"")*")'
    r"|(?P<word>[^\W\d]\w*)|(?P<sign><=|>=|<>|!=|[=<>(),+-])"
)
_VALUES = {"TRUE": True, "FALSE": False, "NULL": None}
_WORDS = {"AND", "OR", "NOT", "IN", "BETWEEN", "LIKE", "IS", "CAST", "AS", *_VALUES}
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "=": operator.eq,
    "<>": operator.ne,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


def matching_rows(items: pl.DataFrame, where: str) -> list[bool]:
    """
    Whether each row meets a condition in SQL's words; unknown (null) is no.

    It may hold columns, numbers, `'texts'`, `TRUE`, `FALSE`, comparisons, `AND`, `OR`, `NOT`, parentheses, `IN (…)`,
    `BETWEEN … AND …`, `LIKE`, `IS [NOT] NULL`, `CAST(column AS DOUBLE)`, `MIN(column)`, `MAX(column)`; nothing else.
    Text that is compared with a number counts as one where the whole column holds numbers, such as `$1,299.00`.

    ```python
    >>> matching_rows(pl.DataFrame({"price": [10.0, 80.0, None]}), "price < 50")
    [True, False, False]

    ```
    """
    if not isinstance(where, str) or len(where) > MAX_LENGTH:
        raise UserError(f'`where` is {where!r:.80}; give a short condition on columns, such as "price < 50".')
    items = items.with_columns(pl.col(pl.Float32, pl.Float64).fill_nan(None))  # else above every number
    parser = _Parser(where, items)
    condition = parser.condition()
    if parser.numbers:  # text against a number: prices are often stored as text
        items = _with_numbers(items, parser.numbers)
        condition = _Parser(where, items).condition()
    try:
        mask = items.with_columns(condition.alias("mask"))["mask"]
    except pl.exceptions.PolarsError as error:
        raise UserError(
            f'`where` is {where!r:.200}: {str(error).splitlines()[0]}; give a condition such as "price < 50" (text '
            'columns: "CAST(price AS DOUBLE) < 50").'
        ) from error
    if mask.dtype != pl.Boolean:
        raise UserError(
            f"`where` is {where!r:.200}, which is {mask.dtype}, not true or false; compare it with something."
        )
    return mask.fill_null(False).to_list()


class _Parser:
    """Recursive descent: OR, AND, NOT, comparison, operand."""

    def __init__(self, where: str, items: pl.DataFrame):
        self.where, self.columns, self.depth, self.terms = where, items.columns, 0, 0
        self.schema = items.clear().lazy()
        self.numbers: set[str] = set()  # columns of text that are compared with a number
        self.tokens: list[tuple[str, str]] = []  # kind and text
        at = 0
        while at < len(where):
            found = _TOKEN.match(where, at)
            if found is None:
                raise self._error(f"{where[at:at + 20]!r} is not understood")
            at, kind = found.end(), found.lastgroup
            if kind is not None:
                is_word = kind == "word" and found[0].upper() in _WORDS
                self.tokens.append((kind, found[0].upper() if is_word else found[0]))
        self.tokens.append(("end", "the end"))
        self.at = 0

    def condition(self) -> pl.Expr:
        """The whole text as an expression."""
        expression = self._any()
        self._need("the end")
        return expression

    def _any(self) -> pl.Expr:
        return self._joined("OR", operator.or_, lambda: self._joined("AND", operator.and_, self._not))

    def _joined(self, word: str, join: Callable[[pl.Expr, pl.Expr], pl.Expr], part: Callable[[], pl.Expr]) -> pl.Expr:
        parts = [part()]
        while self._take(word):
            parts.append(part())
        return self._tree(join, parts)

    @staticmethod
    def _tree(join: Callable[[pl.Expr, pl.Expr], pl.Expr], parts: list[pl.Expr]) -> pl.Expr:
        while len(parts) > 1:  # a flat tree: polars would walk a chain of hundreds by recursion
            parts = [
                join(*pair) if len(pair) == 2 else pair[0]
                for pair in (parts[at : at + 2] for at in range(0, len(parts), 2))
            ]
        return parts[0]

    def _not(self) -> pl.Expr:
        negations = 0
        while self._take("NOT"):
            negations += 1
        expression = self._comparison()
        return ~expression if negations % 2 else expression

    def _comparison(self) -> pl.Expr:
        self.terms += 1
        if self.terms > MAX_TERMS:
            raise self._error(f"it has more than {MAX_TERMS:,} comparisons")
        left = self._operand()
        if self._take("IS"):
            negated = self._take("NOT")
            self._need("NULL")
            return left.is_not_null() if negated else left.is_null()
        negated = self._take("NOT")
        if self._take("IN"):
            expression = self._in(left)
        elif self._take("BETWEEN"):
            low = self._operand()
            self._need("AND")
            high = self._operand()
            self._note(left, low, high)
            expression = (left >= low) & (left <= high)
        elif self._take("LIKE"):
            expression = left.str.contains(_like(self._literal(str)))
        elif negated:
            raise self._error("NOT must be followed by IN, BETWEEN or LIKE here")
        elif self.tokens[self.at][1] in _COMPARE:
            compare = _COMPARE[self._next()[1]]
            right = self._operand()
            self._note(left, right)
            return compare(left, right)
        else:
            return left
        return ~expression if negated else expression

    def _in(self, left: pl.Expr) -> pl.Expr:
        self._need("(")
        values = [self._literal()]
        while self._take(","):
            values.append(self._literal())
        self._need(")")
        known = [value for value in values if value is not None]
        if len({isinstance(value, str) for value in known}) > 1:
            raise self._error("the values of IN are texts and numbers; give one kind")
        if known:
            self._note(left, pl.lit(known[0]))
        kind = self._type(left) or pl.Float64
        if known and isinstance(known[0], str):
            found = left.is_in(known)
        elif len(known) > _COMPARED and kind.is_integer():
            whole = [int(value) for value in known if abs(value) < 2**63 and value == int(value)]
            found = left.cast(pl.Int64, strict=False).is_in(whole)
        elif len(known) > _COMPARED:
            wanted = pl.Float32 if kind == pl.Float32 else pl.Float64  # as `=` compares them
            found = left.cast(wanted).is_in(pl.Series([float(value) for value in known], dtype=wanted))
        else:
            found = self._tree(operator.or_, [pl.lit(False), *(left == value for value in known)])
        return found if len(known) == len(values) else pl.when(found).then(True)  # else null

    def _operand(self) -> pl.Expr:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise self._error(f"more than {MAX_DEPTH} parentheses stand inside one another")
        expression = self._value()
        self.depth -= 1
        return expression

    def _value(self) -> pl.Expr:
        kind, text = self._next()
        if text == "(":
            expression = self._any()
            self._need(")")
            return expression
        if text == "CAST":
            self._need("(")
            expression = self._operand()
            self._need("AS")
            kind, text = self._next()
            if text.upper() not in TYPES:
                raise self._error(f"{text!r:.40} is no type; give {', '.join(TYPES)}")
            self._need(")")
            wanted: Any = TYPES[text.upper()]
            if wanted.is_numeric() and self._type(expression) == pl.String:
                expression = _bare(expression)
            number = expression.cast(wanted, strict=False)
            return number.fill_nan(None) if wanted == pl.Float64 else number
        if text.lower() in ("min", "max") and self._take("("):
            column = self._operand()
            self._need(")")
            return column.min() if text.lower() == "min" else column.max()
        if kind == "column" or (kind == "word" and text not in _WORDS):
            name = text[1:-1].replace('""', '"') if kind == "column" else text
            if name not in self.columns:
                known = ", ".join(self.columns)
                raise UserError(
                    f'`where` is {self.where!r:.200}, but unable to find column "{name}"; the catalogue has {known}.'
                )
            return pl.col(name)
        self.at -= 1
        return pl.lit(self._literal())

    def _type(self, expression: pl.Expr) -> Any:
        try:
            return self.schema.select(expression).collect_schema().dtypes()[0]
        except pl.exceptions.PolarsError:
            return None  # its evaluation says what is wrong

    def _note(self, *sides: pl.Expr) -> None:
        """Keep the names of columns of text that stand beside a number."""
        types = [self._type(side) for side in sides]
        if any(one is not None and one.is_numeric() for one in types):
            texts = [side for side, one in zip(sides, types, strict=True) if one == pl.String]
            self.numbers.update(name for side in texts for name in side.meta.root_names())

    def _literal(self, wanted: type = object) -> Any:
        kind, text = self._next()
        sign = -1 if text == "-" else 1
        if text in ("-", "+"):
            kind, text = self._next()
        elif kind == "text":
            return text[1:-1].replace("''", "'")
        elif text in _VALUES and wanted is object:
            return _VALUES[text]
        if kind != "number" or wanted is not object:
            raise self._error(f"{text!r:.40} is not expected")
        number = sign * (int(text) if text.isdigit() and len(text) < 19 else float(text))
        return number

    def _next(self) -> tuple[str, str]:
        self.at += 1
        return self.tokens[min(self.at, len(self.tokens)) - 1]

    def _take(self, text: str) -> bool:
        kind, found = self.tokens[min(self.at, len(self.tokens) - 1)]
        taken = found == text and kind in ("word", "sign", "end")
        self.at += taken
        return taken

    def _need(self, text: str) -> None:
        if not self._take(text):
            found = self.tokens[min(self.at, len(self.tokens) - 1)][1]
            raise self._error(f"{found!r:.40} stands where {text} is expected")

    def _error(self, reason: str) -> UserError:
        return UserError(
            f'`where` is {self.where!r:.200}: {reason}; give a condition on columns, such as "price < 50 AND brand = '
            "'Fenta'\", without functions and queries."
        )


def _like(pattern: str) -> str:
    """A regular expression for LIKE: % is any text, _ any character."""
    parts = {"%": ".*", "_": "."}
    return "(?s)^" + "".join(parts.get(character) or re.escape(character) for character in pattern) + "$"


def _bare(text: Any) -> Any:
    """An expression or column of texts without what prices are written with."""
    return text.str.strip_chars(" $").str.replace_all(",", "", literal=True)


def _with_numbers(items: pl.DataFrame, names: Collection[str]) -> pl.DataFrame:
    """Those of the named columns that hold nothing but numbers (such as `$1,299.00`) as numbers."""
    columns = []
    for name in items.select(pl.col(pl.String).exclude("item_id", "title")).columns:
        if name not in names:
            continue
        text = _bare(items[name])
        text = text.set(text == "", None)
        number = text.cast(pl.Float64, strict=False)
        if number.null_count() == text.null_count() < len(text):
            columns.append(number.fill_nan(None))
    return items.with_columns(columns)
