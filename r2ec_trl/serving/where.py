"""A condition on the catalogue's columns, for `where`."""

import re

import polars as pl

from r2ec_trl.errors import UserError


def matching_rows(items: pl.DataFrame, where: str) -> list[bool]:
    """
    Whether each row meets an SQL condition; unknown (null) is no.

    The condition is an expression over the columns: it can name no file and hold no query. Text that is compared with
    a number counts as one where the whole column holds numbers, such as `$1,299.00`.

    ```python
    >>> matching_rows(pl.DataFrame({"price": [10.0, 80.0, None]}), "price < 50")
    [True, False, False]

    ```
    """
    if re.search(r"\bselect\b", re.sub(r"'[^']*'|\"[^\"]*\"", "", where), flags=re.IGNORECASE):
        raise UserError(f'`where` is {where!r}; give a condition on columns, such as "price < 50", without a query.')
    try:
        try:
            mask = _mask(items, where)
        except pl.exceptions.ComputeError:  # text against a number: prices are often stored as text
            mask = _mask(_with_numbers(items), where)
    except pl.exceptions.ColumnNotFoundError as error:
        raise UserError(
            f"`where` is {where!r}, but {str(error).splitlines()[0].split(';')[0]}; the catalogue has "
            f"{', '.join(items.columns)}."
        ) from error
    except pl.exceptions.PolarsError as error:
        raise UserError(
            f'`where` is {where!r}: {str(error).splitlines()[0]}; give a condition such as "price < 50" (text '
            'columns: "CAST(price AS DOUBLE) < 50").'
        ) from error
    if mask.dtype != pl.Boolean:
        raise UserError(f"`where` is {where!r}, which is {mask.dtype}, not true or false; compare it with something.")
    mask = mask.fill_null(False)
    return mask.to_list() if len(mask) == len(items) else [bool(mask[0])] * len(items)


def _mask(items: pl.DataFrame, where: str) -> pl.Series:
    return items.select(pl.lit(True).alias("_"), pl.sql_expr(where).alias("mask"))["mask"]


def _with_numbers(items: pl.DataFrame) -> pl.DataFrame:
    """Text columns that hold nothing but numbers (such as `$1,299.00`) as numbers."""
    columns = []
    for name in items.select(pl.col(pl.String).exclude("item_id", "title")).columns:
        text = items[name].str.strip_chars(" $").str.replace_all(",", "", literal=True)
        text = text.set(text == "", None)
        number = text.cast(pl.Float64, strict=False)
        if number.null_count() == text.null_count() < len(text):
            columns.append(number)
    return items.with_columns(columns)
