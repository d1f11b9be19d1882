r"""Values that clients write as text, in JSON and in forms alike: what they mean, and the schema.

    ""  and blanks alone     not set, as null is
    "2", "0.5", " 7 "        the number, where the field is one
    "true", "False"          the truth value, where the field is one
    2.0                      the integer 2, where the field is one (JSON Schema, 6.1.1)

All other text stays what it is, so a number field that says "two" is refused.

    typed_values({"n": "2", "style": "", "seed": None}, ImageRequest.model_fields)    # {"n": 2}
"""

from __future__ import annotations

import re
import typing
from collections.abc import Mapping
from typing import Any

from pydantic.fields import FieldInfo

BLANK = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
"""Unicode's white space (White_Space=yes), as the inside of a regular expression's class."""

NOT_SET = {"type": "string", "pattern": rf"^[{BLANK}]*$"}
"""JSON Schema of text that stands for no value."""

_BLANKS = re.compile(rf"[{BLANK}]+")
_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,19}")
_DECIMAL = re.compile(r"(0|-?[1-9][0-9]{0,19})(\.[0-9]+)?")
_TRUTH = {"true": True, "True": True, "false": False, "False": False}


def one_line(text: str) -> str:
    """The text with single spaces for blanks, tabs and line breaks, and none around it."""
    return _BLANKS.sub(" ", text).strip(" ")


def typed_values(body: Mapping[str, Any], fields: Mapping[str, FieldInfo]) -> dict[str, Any]:
    """A request's body without what is not set, and with text read as its field's type; fields that
    the model does not have are left as they are.

    Args:
        body: as parsed from JSON or from a form.
        fields: of the model that the body is to be validated by.
    """
    read = {k: _read(v, fields[k]) if k in fields else v for k, v in body.items()}
    return {k: v for k, v in read.items() if v is not None or k not in fields}


def _read(value: Any, field: FieldInfo) -> Any:
    """One value; None if it is not set."""
    kinds = typing.get_args(field.annotation) or (field.annotation,)
    if isinstance(value, float) and value.is_integer() and int in kinds:
        return int(value)
    if not isinstance(value, str):
        return value
    text = one_line(value)
    if not text:
        return None
    if int in kinds and _INTEGER.fullmatch(text):
        return int(text)
    if float in kinds and _DECIMAL.fullmatch(text):
        return float(text)
    if bool in kinds and text in _TRUTH:
        return _TRUTH[text]
    return value


def allow_text(schema: dict[str, Any]) -> None:
    """Say in a JSON body's schema what `typed_values` makes of it: every field that may be left out
    may be null or blank as well, and a number or truth value may be written as text."""
    for name in schema["properties"].keys() - set(schema.get("required", ())):
        field = schema["properties"][name]
        if "anyOf" not in field:
            kept = {k: field.pop(k) for k in field.keys() - {"title", "description", "default"}}
            field["anyOf"] = [kept]
        choices = [choice for choice in field["anyOf"] if choice != {"type": "null"}]
        patterns = [pattern for choice in choices if (pattern := _as_text(choice))]
        choices += [{"type": "string", "pattern": amid_blanks(pattern)} for pattern in patterns]
        field["anyOf"] = [*choices, NOT_SET, {"type": "null"}]


def _as_text(choice: Mapping[str, Any]) -> str | None:
    """The regular expression of a number's or truth value's text; None for other types."""
    if choice["type"] == "boolean":
        return "|".join(_TRUTH)
    if choice["type"] not in ("integer", "number"):
        return None
    low = choice["minimum"]
    high = choice["maximum"] if "maximum" in choice else int(choice["exclusiveMaximum"]) - 1
    if choice["type"] == "integer":
        return integers(int(low), int(high))
    return rf"({integers(int(low), int(high) - 1)})(\.[0-9]+)?|{int(high)}(\.0+)?"


def integers(low: int, high: int) -> str:
    """A regular expression of the decimal integers from `low`, which is at most 1, to `high`."""
    digits = str(high)
    branches = [str(number) for number in range(low, 1)]
    if len(digits) > 1:
        branches.append(f"[1-9][0-9]{{0,{len(digits) - 2}}}")
    for place, digit in enumerate(digits):  # as long as `high`, and smaller first in this place
        least = 1 if place == 0 else 0
        if int(digit) > least:
            rest = len(digits) - place - 1
            branches.append(f"{digits[:place]}[{least}-{int(digit) - 1}][0-9]{{{rest}}}")
    return "|".join([*branches, digits])


def amid_blanks(pattern: str) -> str:
    """A regular expression of text that may have blanks around it."""
    return rf"^[{BLANK}]*({pattern})[{BLANK}]*$"
