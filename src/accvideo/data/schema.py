"""Dataclasses from JSON that anybody may have written."""

import json
from dataclasses import MISSING, fields
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

Record = TypeVar("Record")

MAX_DEPTH = 100
"""Of lists and objects within each other. Python's recursion ends at about a thousand calls, some of them a level."""


class TooDeepError(ValueError):
    """JSON whose lists and objects lie deeper within each other than is allowed."""


def loads(text: str | bytes, max_depth: int = MAX_DEPTH) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is none.
        TooDeepError: it is nested deeper than `max_depth`.
    """
    try:
        value = json.loads(text)
        if not is_deep(value, max_depth):
            return value
    except RecursionError:
        pass
    raise TooDeepError(f"lists or objects more than {max_depth} deep within each other")


def is_deep(value: Any, limit: int) -> bool:
    """Whether lists and objects of a JSON value lie more than `limit` deep within each other."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return inner is not None and (limit == 0 or any(is_deep(each, limit - 1) for each in inner))


def parse(kind: type[Record], text: str | bytes) -> Record:
    """The dataclass that a JSON object describes; fields with a default may be left out.

    Raises:
        ValueError: it is no such object, or a value is not of the type that the field is annotated with.
    """
    values = loads(text)
    if not isinstance(values, dict):
        raise ValueError(f"a JSON {type(values).__name__}, not an object")
    own: Any = kind
    known, types = {each.name: each for each in fields(own)}, get_type_hints(kind)
    if unknown := sorted(values.keys() - known.keys()):
        raise ValueError(f"unknown field {unknown[0][:40]!r}")
    for name, each in known.items():
        if name not in values and each.default is MISSING and each.default_factory is MISSING:
            raise ValueError(f"no field {name!r}")
        if name in values and not fits(values[name], types[name]):
            raise ValueError(f"{name} is {str(values[name])[:40]!r}, not of type {types[name]}")
    return kind(**values)


def fits(value: Any, annotation: Any) -> bool:
    """Whether a JSON value is of an annotated type: plain types, unions, and lists and dictionaries of them."""
    if annotation is Any:
        return True
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return any(fits(value, part) for part in parts)
    if origin is list:
        return isinstance(value, list) and all(fits(each, parts[0]) for each in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(each, parts[1]) for each in value.values())
    if annotation in (int, float):
        return isinstance(value, (int, annotation)) and not isinstance(value, bool)
    return isinstance(value, NoneType if annotation is None else annotation)
