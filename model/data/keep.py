"""--keep: conditions on the metadata of a document, which decide whether it is prepared."""

import datetime
import decimal
import json
import math
import operator
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from halny.model.data.dataset import DataError


class Dropped(NamedTuple):
    reason: str


@dataclass(frozen=True)
class Condition:
    """`--keep KEY=VALUE`: documents whose metadata fulfil it stay. Operators: = != > >= < <=.

    = and != compare strings, or numbers with a JSON number, or JSON as it is written ("true"); the others compare
    numbers. KEY is a key or column, or leads into nested objects by dots. A document without the key, or with null
    there, is dropped.
    """

    text: str
    key: str
    operator: str
    value: str

    def column(self, names: list[str]) -> str | None:
        """The column of a table that holds the key."""
        return next((name for name in (self.key, self.key.split(".")[0]) if name in names), None)

    def find(self, record: dict) -> Any:
        if self.key in record:
            return record[self.key]
        value = record
        for name in self.key.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        return value

    def holds(self, found: Any) -> bool:
        if isinstance(found, bytes | datetime.date):  # of parquet: binary text, dates and times as they are written
            found = found.decode("utf-8", "replace") if isinstance(found, bytes) else str(found)
        left, right = _number(found), _number(self.value)
        if self.operator in ("=", "!="):
            if isinstance(found, str):
                equal = found == self.value
            elif left is not None and right is not None:
                equal = left == right
            else:
                equal = json.dumps(found, ensure_ascii=False, default=str) == self.value
            return equal == (self.operator == "=")
        compare = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}[self.operator]
        return left is not None and compare(left, right)


def parse_conditions(texts: Iterable[str]) -> list[Condition]:
    conditions = []
    for text in texts:
        example = "write KEY=VALUE, for example quality=HIGH or 'quality_prob>0.9'"
        match = re.fullmatch(r"\s*([^=!<>]*[^=!<>\s])\s*(!=|>=|<=|=|>|<)\s*([^=!<>].*?|)\s*", text, re.DOTALL)
        if not match:
            raise DataError(f"--keep {text!r}: not a condition; {example}")
        if match[2] not in ("=", "!=") and _number(match[3]) is None:
            raise DataError(f"--keep {text!r}: {match[2]} compares numbers, and {match[3]!r} is none; {example}")
        conditions.append(Condition(f"{match[1]}{match[2]}{match[3]}", *match.groups()))
    return conditions


def first_failed(keep: Iterable[Condition], record: dict) -> Dropped | None:
    for condition in keep:
        if (found := condition.find(record)) is None:
            return Dropped(f"no {condition.key}")
        if not condition.holds(found):
            return Dropped(f"not {condition.text}")
    return None


def _number(value: Any) -> float | int | None:
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, decimal.Decimal):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        return None
    return value
