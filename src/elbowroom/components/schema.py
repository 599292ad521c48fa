"""From options to a schema: they become fields of a pydantic model, and its errors one line.

`block` makes a strict model of the options that `signatures.options` reads (a quoted number is no number, `no` is no boolean),
and `one_problem` turns pydantic's error into a dotted path in the user's own words and one sentence.
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationError, create_model, model_validator
from pydantic_core import PydanticCustomError

from elbowroom.components.signatures import Option
from elbowroom.errors import nearest


class Block(BaseModel):
    """A mapping in a spec, every key of which is known; an unknown one is an error that names the nearest."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        arbitrary_types_allowed=True,
        populate_by_name=False,
        hide_input_in_errors=True,
    )

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, given: Any) -> Any:
        if isinstance(given, Mapping):
            allowed = [field.alias or name for name, field in cls.model_fields.items()]
            owner = given.get("name") if "name" in allowed else None
            for key in given:
                if key not in allowed:
                    offered = [name for name in allowed if name not in ("name", "record")]
                    context = {"key": str(key), "allowed": offered, "owner": str(owner or "")}
                    raise PydanticCustomError("unknown_key", "unknown", context)
        return given


def block(title: str, found: Iterable[Option], extra: Mapping[str, Any] | None = None) -> type[Block]:
    """Make a strict pydantic model of options; `extra` are further fields, as for `pydantic.create_model`."""
    fields: dict[str, Any] = dict(extra or {})
    for option in found:
        default = ... if option.required else option.default
        fields[option.name] = (strict(option.annotation), Field(default, description=option.doc or None))
    return create_model(title, __base__=Block, **fields)


def strict(annotation: Any) -> Any:
    """Return the annotation with its int, float and bool leaves made strict (no text, no booleans as numbers)."""
    if annotation in (int, float, bool):
        return Annotated[annotation, Strict()]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return Annotated[(strict(arguments[0]), *annotation.__metadata__)]
    if origin in (Union, types.UnionType):
        return Union[tuple(strict(a) for a in arguments)]  # noqa: UP007 - built from a tuple
    if origin is Sequence:  # always a tuple, whether it was a list in a file or the default
        return tuple.__class_getitem__((strict(arguments[0]), ...))
    if origin is not None and isinstance(origin, type) and arguments:
        return origin[tuple(a if a is Ellipsis else strict(a) for a in arguments)]  # type: ignore[index]
    return annotation


def one_problem(error: ValidationError, given: Any) -> tuple[tuple[str | int, ...], str]:
    """Return where (a path in the user's own words) and what is wrong: the most telling of pydantic's errors.

    Misspelt names come first (they explain missing ones), missing keys last.

    Args:
        error: pydantic's error.
        given: what the user wrote; pydantic's locations hold union tags, so they are walked beside it.
    """
    found = [(_path(given, e), e) for e in error.errors(include_url=False)]
    rank = {"unknown_key": 0, "unknown_component": 1, "missing": 3}
    path, first = min(found, key=lambda item: (rank.get(item[1]["type"], 2), -len(item[0])))
    same = [e for p, e in found if p == path]
    if first["type"] in rank:
        same = [first]
    phrases = list(dict.fromkeys(filter(None, (_phrase(e) for e in same))))
    hints = [_hint(e) for e in same]
    wanted = [p for p in phrases if p.startswith("must be ")]
    text = phrases[0]
    if wanted:
        text = "must be " + " or ".join(p.removeprefix("must be ") for p in wanted) + f", got {short(_at(given, path))}"
    return path, text + next((hint for hint in hints if hint), "")


def short(value: Any) -> str:
    """Return a short, one-line form of a value for messages."""
    if isinstance(value, Mapping):
        return "a block"
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def dotted(path: tuple[str | int, ...]) -> str:
    """Join a path with dots."""
    return ".".join(map(str, path))


def _path(given: Any, error: Any) -> tuple[str | int, ...]:
    """Keep of a pydantic location what the user wrote: keys and list positions, no union tags."""
    path: list[str | int] = []
    node, location = given, error["loc"]
    for i, part in enumerate(location):
        in_list = isinstance(node, list | tuple) and isinstance(part, int) and part < len(node)
        if in_list or (isinstance(node, Mapping) and part in node):
            node = node[part]
        elif not (error["type"] == "missing" and i == len(location) - 1):
            continue
        path.append(part)
    if error["type"] == "unknown_key":
        path.append(error["ctx"]["key"])
    if error["type"] == "unknown_component" and isinstance(node, Mapping):
        path.append("name")
    return tuple(path)


def _at(given: Any, path: tuple[str | int, ...]) -> Any:
    for part in path:
        is_list = isinstance(given, list | tuple)
        given = given[part] if is_list else given.get(part) if isinstance(given, Mapping) else None
    return given


_MUST_BE = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "finite",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "path_type": "a path",
    "list_type": "a list such as [64, 64]",
    "tuple_type": "a list such as [64, 64]",
    "sequence_str": "a list such as [64, 64]",
    "is_instance_of": "a list such as [64, 64]",
    "model_type": "a block of `key: value` lines",
    "model_attributes_type": "a block of `key: value` lines",
    "dict_type": "a block of `key: value` lines",
    "none_required": "nothing",
}
_BOUND = {
    "greater_than": ("gt", "greater than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


def _phrase(error: Any) -> str:
    kind, context = error["type"], error.get("ctx", {})
    if kind in _MUST_BE:
        return f"must be {_MUST_BE[kind]}"
    if kind in _BOUND:
        key, words = _BOUND[kind]
        bound = context[key]
        return f"must be {words} {bound if isinstance(bound, int) else format(bound, 'g')}"
    if kind == "literal_error":
        return f"must be {context['expected']}"
    if kind == "missing":
        return "missing"
    if kind == "unknown_key":
        if context["owner"] and not context["allowed"]:
            return f"{context['owner']} takes no options"
        return f"unknown option of {context['owner']}" if context["owner"] else "unknown"
    if kind == "unknown_component":
        return f"unknown {context['kind']} {context['tag']!r}"
    if kind == "too_short":
        return f"must be a list of at least {context['min_length']}"
    if kind == "too_long":
        return f"must be a list of at most {context['max_length']}"
    if kind == "value_error":
        return str(context.get("error", error["msg"]))
    message: str = error["msg"]
    return message[:1].lower() + message[1:]


def _hint(error: Any) -> str:
    kind, context = error["type"], error.get("ctx", {})
    if kind in ("unknown_key", "unknown_component"):
        return nearest(context["key"] if "key" in context else str(context["tag"]), context["allowed"])
    given = error.get("input")
    if kind == "literal_error" and isinstance(given, str):
        hint = nearest(given, _quoted(context["expected"]))
        return hint if hint.startswith("; did") else ""
    if kind in ("int_type", "int_from_float") and isinstance(given, float) and given.is_integer():
        return f"; write {int(given)}"
    if kind in ("int_type", "float_type", "bool_type") and isinstance(given, str) and _looks_like(kind, given):
        return "; write it without quotes" if kind != "bool_type" else ""
    return ""


def _quoted(expected: str) -> Iterator[str]:
    return (match[1] for match in re.finditer(r"'([^']*)'", expected))


def _looks_like(kind: str, text: str) -> bool:
    try:
        (int if kind == "int_type" else float)(text)
    except ValueError:
        return False
    return True
