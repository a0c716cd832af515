"""`where` is a small grammar: what it says equals a plain Python twin, anything else is refused."""

import time

import hypothesis.strategies as st
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings

from r2ec_trl.errors import UserError
from r2ec_trl.serving.where import matching_rows

ITEMS = pl.DataFrame({"price": [1.0, 60.0, None], "title": ["a", "b", "select"], "n": ["1", "2", "3"]}).with_columns(
    shown=pl.Series(["$5.00", None, "$1,299.90"])
)


@pytest.mark.parametrize(
    "where, expected",
    [
        ("price < 50", [True, False, False]),
        ("NOT price < 50", [False, True, False]),  # unknown stays unknown
        ("price IS NULL", [False, False, True]),
        ("title IN ('a', 'select')", [True, False, True]),
        ("title LIKE 's%' OR n = '2'", [False, True, True]),
        ("title = 'a' OR title = 'b' AND n = '3'", [True, False, False]),  # AND binds first
        ("n = '3' AND title = 'b' OR title = 'a'", [True, False, False]),
        ("CAST(n AS DOUBLE) >= 2", [False, True, True]),
        ("n >= 2", [False, True, True]),  # text that holds nothing but numbers
        ("shown > 1000 OR shown < 6", [True, False, True]),
        ("1 = 1", [True, True, True]),
        ("price = max(price)", [False, True, False]),
    ],
)
def test_conditions(where, expected):
    assert matching_rows(ITEMS, where) == expected


@pytest.mark.parametrize("where", ["price > 50", "CAST(shown AS DOUBLE) > 50", "shown > 50", "price = max(price)"])
def test_nan_is_unknown_and_not_above_every_number(where):
    items = pl.DataFrame({"price": [60.0, float("nan"), 10.0], "shown": ["60", "nan", "10"]})
    assert matching_rows(items, where) == [True, False, False]


@pytest.mark.parametrize(
    "where",
    [
        "",
        "price",
        "price <",
        "title < 3",
        "price < 50; DROP TABLE items",
        "read_csv('/etc/passwd')",
        "title IN (SELECT * FROM read_csv('/etc/passwd'))",
        "EXISTS (select 1)",
        "title = (SELECT column_1 FROM read_parquet('x'))",
        "*",
        "/* ' */ title IN (SELECT * FROM read_csv('FOLDER')) /* ' */",
        "price < 5 -- comment",
        "price + 1 < 5",
        "title || 'a' = 'aa'",
        "UPPER(title) = 'A'",
        "max(price, 3) = 3",
        "CASE WHEN price < 5 THEN TRUE END",
        "title ~ 'a'",
        "title LIKE n",
        "title LIKE 'a' ESCAPE '!'",
        "price IN ()",
        "price IN (1, 'a')",
        "price NOT NULL",
        "price IS 3",
        "price BETWEEN 1",
        "CAST(price AS INTERVAL)",
        "CAST(price)",
        "price < 5)",
        "(price < 5",
        "price < 5 price > 3",
        "title = 'open",
        '"price < 5',
        "price < 5abc",
        "- title = 3",
        "\x00",
        "price <\n",
        "(" * 5_000 + "price < 5" + ")" * 5_000,
        "CAST(" * 5_000 + "price" + " AS DOUBLE)" * 5_000 + " < 5",
        "MIN(" * 5_000 + "price" + ")" * 5_000 + " < 5",
        "NOT " * 5_000 + "(" * 60 + "price < 5" + ")" * 60,
        " OR ".join(["price < 5"] * 3_000),
        "title = '" + "a" * 100_000 + "'",
    ],
)
def test_conditions_that_are_none(where):
    with pytest.raises(UserError, match="`where` is ") as caught:
        matching_rows(ITEMS, where)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("where", [None, 3, ["price < 5"]])
def test_a_condition_is_a_text(where):
    with pytest.raises(UserError, match="`where` is "):
        matching_rows(ITEMS, where)


@pytest.mark.parametrize(
    "where, expected",
    [
        ("title = 'it''s' OR title <> 'a'", [False, True, True]),
        ('"price" <= 1 and not TRUE = false', [True, False, False]),
        ("price not between 2 and 100", [True, False, False]),
        ("price NOT IN (60, 7)", [True, False, False]),
        ("price NOT IN (60, NULL)", [False, False, False]),
        ("price IN (60, NULL)", [False, True, False]),
        ("price = NULL", [False, False, False]),
        ("NOT NOT price > -1.5e0", [True, True, False]),
        ("title NOT LIKE '_'", [False, False, True]),
        ("title LIKE '.'", [False, False, False]),
        ("price IS NOT NULL", [True, True, False]),
        ("CAST(price AS VARCHAR) LIKE '6%'", [False, True, False]),
        ("CAST(title AS DOUBLE) IS NULL", [True, True, True]),
        ("price > 1000000000000000000000", [False, False, False]),
        ("price = min(price)", [True, False, False]),
    ],
)
def test_the_words_of_the_grammar(where, expected):
    assert matching_rows(ITEMS, where) == expected


@pytest.mark.parametrize("more", [0, 60])
def test_a_long_list_compares_as_a_short_one(more):
    """Rounded numbers and large whole ones, too."""
    frame = pl.DataFrame({"price": pl.Series([19.99, 5.5], dtype=pl.Float32), "number": [2**53 + 1, 2**53]})
    others = "".join(f", {n}.5" for n in range(more))
    assert matching_rows(frame, f"price IN (19.99{others})") == [True, more > 0]
    assert matching_rows(frame, f"number IN ({2**53 + 1}{others})") == [True, False]
    assert matching_rows(frame, f"number IN (1e999, {2**53}{others})") == [False, True]


def test_prices_with_a_currency_are_numbers():
    frame = pl.DataFrame({"title": ["red bow", "it's"], "price": ["$1,299.00", "80"], "year": [1, 2]})
    assert matching_rows(frame, "price < 100") == [False, True]
    assert matching_rows(frame, "title LIKE '%b%' AND NOT year = 2") == [True, False]


@pytest.mark.parametrize(
    "where, expected",
    [
        ("year = '2019' AND price < 50", [True, False]),
        ("year LIKE '20%' AND NOT price <= 9.99", [False, True]),
        ("CAST(price AS DOUBLE) > 1000", [False, True]),
        ("CAST(price AS BIGINT) IS NULL AND year IN ('2019')", [True, False]),  # 9.99 is none
        ("CAST(price AS DOUBLE) > 1000 AND price BETWEEN 1 AND 2000 AND MAX(price) > 1000", [False, True]),
        ("price IN (9.99, 3) OR year IN (2020)", [True, True]),
        ("price < stock", [True, False]),
    ],
)
def test_only_text_that_stands_beside_a_number_counts_as_one(where, expected):
    frame = pl.DataFrame({"year": ["2019", "2020"], "price": ["$9.99", "1,299.00"], "stock": [10, 10]})
    assert matching_rows(frame, where) == expected


def test_eight_hundred_terms_are_quick():
    frame = pl.DataFrame({"price": list(range(20_000))})
    start = time.perf_counter()
    found = matching_rows(frame, " OR ".join(f"price = {number}" for number in range(800)))
    assert found == [price < 800 for price in range(20_000)]
    assert matching_rows(frame, f"price IN ({', '.join(map(str, range(10_000)))})").count(True) == 10_000
    assert time.perf_counter() - start < 10


# ------------------------------------------------------------------------------ the twin
ROWS = [
    {"price": price, "count": count, "name": name, "new": new}
    for price in (None, -1.5, 0.0, 7.25)
    for count in (None, 0, 7)
    for name in (None, "", "Bow", "bow%")
    for new in (None, True, False)
]
FRAME = pl.DataFrame(ROWS, schema={"price": pl.Float64, "count": pl.Int64, "name": pl.String, "new": pl.Boolean})
NUMBERS, TEXTS = st.sampled_from([-1.5, 0, 7, 7.25, 8, None]), st.sampled_from(["", "Bow", "bow%", "b'q", None])


def sql(value):
    if isinstance(value, str):
        return "'" + value.replace("'", "''") + "'"
    return {None: "NULL"}.get(value, repr(value))


def known(function):
    """A function of values that is unknown where one of them is."""
    return lambda *values: None if None in values else function(*values)


def like(text, pattern):
    if not pattern:
        return not text
    if pattern[0] == "%":
        return like(text, pattern[1:]) or (bool(text) and like(text[1:], pattern))
    return bool(text) and pattern[0] in ("_", text[0]) and like(text[1:], pattern[1:])


def either(left, right):
    return True if True in (left, right) else None if None in (left, right) else False


def negated(value):
    return None if value is None else not value


COMPARE = {
    "=": lambda a, b: a == b,
    "<>": lambda a, b: a != b,
    "!=": lambda a, b: a != b,
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
}


@st.composite
def leaves(draw):
    """A condition without AND and OR, and its twin."""
    column, values = draw(st.sampled_from([("price", NUMBERS), ("count", NUMBERS), ("name", TEXTS)]))
    kind = draw(st.sampled_from(["compare", "in", "between", "null", "like", "flag"]))
    no = draw(st.booleans())
    word, turn = (" NOT", negated) if no else ("", lambda value: value)
    if kind == "flag":
        return "new", lambda row: row["new"]
    if kind == "null":
        return f"{column} IS{word} NULL", lambda row: (row[column] is None) != no
    if kind == "like":
        pattern = draw(st.text("bBow%_", max_size=5))
        return f"name{word} LIKE {sql(pattern)}", lambda row: turn(known(like)(row["name"], pattern))
    if kind == "in":
        chosen = draw(st.lists(values, min_size=1, max_size=3))

        def is_in(row):
            found = False
            for value in chosen:
                found = either(found, known(COMPARE["="])(row[column], value))
            return turn(found)

        return f"{column}{word} IN ({', '.join(map(sql, chosen))})", is_in
    low, high = draw(values.filter(lambda value: value is not None)), draw(values.filter(lambda v: v is not None))
    if kind == "between":
        inside = known(lambda value: low <= value <= high)
        return f"{column}{word} BETWEEN {sql(low)} AND {sql(high)}", lambda row: turn(inside(row[column]))
    sign = draw(st.sampled_from(sorted(COMPARE)))
    return f"{column} {sign} {sql(low)}", lambda row: known(COMPARE[sign])(row[column], low)


def joined(children):
    def make(pair, word):
        (left, one), (right, two) = pair
        if word == "OR":
            return f"({left} OR {right})", lambda row: either(one(row), two(row))
        if word == "NOT":
            return f"NOT ({left})", lambda row: negated(one(row))
        return f"({left} AND {right})", lambda row: negated(either(negated(one(row)), negated(two(row))))

    return st.builds(make, st.tuples(children, children), st.sampled_from(["AND", "OR", "NOT"]))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.recursive(leaves(), joined, max_leaves=6))
def test_a_condition_means_what_its_python_twin_does(condition):
    where, twin = condition
    assert matching_rows(FRAME, where) == [twin(row) is True for row in ROWS], where
    lowered = where.replace(" AND ", " and ").replace(" OR ", "\tor\n").replace("NOT ", "not ")
    assert matching_rows(FRAME, lowered) == [twin(row) is True for row in ROWS], lowered


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.sampled_from("price count name new < = ( ) , AND OR NOT IN BETWEEN LIKE IS NULL 'a' 3 - CAST AS".split()),
        max_size=9,
    )
)
def test_any_words_are_a_condition_or_one_sentence(words):
    try:
        assert len(matching_rows(FRAME, " ".join(words))) == len(ROWS)
    except UserError as error:
        assert "\n" not in str(error)
