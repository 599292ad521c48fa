"""What a signature says: the parameters of a function, with their types, defaults and docs, as options of a user.

Read from the signature and from the docstring's `Args`, without pydantic or torch. Specs are made of it, and commands.
"""

from __future__ import annotations

import inspect
import re
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


@dataclass(frozen=True)
class Option:
    """One parameter that a user may set: its name, annotation, default (`inspect.Parameter.empty` if required), and docs."""

    name: str
    annotation: Any
    default: Any
    doc: str

    @property
    def required(self) -> bool:
        """Whether the user must give it."""
        return self.default is inspect.Parameter.empty

    @property
    def sentence(self) -> str:
        """The first sentence of its docs."""
        return first_sentence(self.doc)

    @property
    def type_text(self) -> str:
        """The annotation in words, e.g. `number > 0, or one of shared, per_dimension`."""
        return type_text(self.annotation)


def options(function: Callable[..., Any] | type, *, positional: bool = False) -> list[Option]:
    """Return the keyword-only parameters of a function or of a class's constructor, with their docs.

    Args:
        function: the function or class.
        positional: the positional parameters that have a default, too.

    Raises:
        TypeError: if the signature has *args or **kwargs (its options could not be listed or checked) or an option has
            no annotation.
    """
    found = [p for p in _parameters(function) if p.kind is p.KEYWORD_ONLY or (positional and p.default is not p.empty)]
    holder = type("Holder", (), {"__annotations__": {p.name: p.annotation for p in found}})
    hints = get_type_hints(holder, globalns=_globals(function), include_extras=True)
    for p in found:
        if p.annotation is inspect.Parameter.empty:
            raise TypeError(f"{function.__qualname__}: option {p.name} has no type annotation")
    docs = argument_docs(function)
    return [Option(p.name, hints[p.name], p.default, docs.get(p.name, "")) for p in found]


def facts(function: Callable[..., Any] | type) -> list[str]:
    """Return the names of the positional parameters: what the program knows and the user does not choose."""
    return [p.name for p in _parameters(function) if p.kind is not inspect.Parameter.KEYWORD_ONLY]


def summary(documented: Any) -> str:
    """Return the first line of a docstring."""
    text = inspect.getdoc(documented) or ""
    return text.split("\n", 1)[0].strip()


def first_sentence(doc: str) -> str:
    """Return the first sentence of a text, without backticks and its full stop."""
    return doc.split(". ")[0].rstrip(".").replace("`", "")


def argument_docs(documented: Any) -> dict[str, str]:
    """Return name -> text from the `Args:` section of a Google-style docstring."""
    lines = iter((inspect.getdoc(documented) or "").splitlines())
    docs: dict[str, str] = {}
    if not any(line.strip() == "Args:" for line in lines):
        return docs
    name, indent = "", 0
    for line in lines:
        if line.strip() and not line.startswith(" "):
            break
        entry = re.match(r"(\s+)(\w+)(?: \([^)]*\))?:\s*(.*)", line)
        if entry and (not name or len(entry[1]) <= indent):
            indent, name = len(entry[1]), entry[2]
            docs[name] = entry[3].strip()
        elif name and line.strip():
            docs[name] = f"{docs[name]} {line.strip()}".strip()
    return docs


def shared_docs(cls: type[T]) -> type[T]:
    """Complete the docstrings of a class's methods: what their `Args` leave out is said in the `Args` of the class."""
    shared = argument_docs(cls)
    for method in vars(cls).values():
        before, args, after = (inspect.getdoc(method) or "").partition("Args:\n")
        if callable(method) and args:
            own, blank, rest = after.partition("\n\n")
            said = {*argument_docs(method)}
            more = [f"\n    {p}: {shared[p]}" for p in inspect.signature(method).parameters if p in shared and p not in said]
            method.__doc__ = "".join([before, args, own, *more, blank, rest])
    return cls


def type_text(annotation: Any) -> str:
    """Say an annotation in words for the list of components."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is type(None):
        return "nothing"
    if origin is Annotated:
        bounds = [
            f"{sign} {getattr(m, attribute):g}"
            for m in annotation.__metadata__
            for attribute, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
            if getattr(m, attribute, None) is not None
        ]
        return " ".join([type_text(arguments[0]), " and ".join(bounds)]).strip()
    if origin in (Union, types.UnionType):
        return ", or ".join(type_text(a) for a in arguments if a is not type(None)) + (
            ", or nothing" if type(None) in arguments else ""
        )
    words = {int: "whole number", float: "number", bool: "true or false", str: "text"}
    if annotation in words:
        return words[annotation]
    if origin is not None and str(origin).endswith("Literal"):
        return ("one of " if len(arguments) > 1 else "") + ", ".join(map(str, arguments))
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        return f"mapping of {type_text(arguments[0])} to {type_text(arguments[1])}"
    if origin is not None and arguments:
        return f"list of {type_text(arguments[0])}".replace("number", "numbers", 1)
    name = getattr(annotation, "__name__", str(annotation))
    return "path" if name == "Path" else name


def _parameters(function: Callable[..., Any] | type) -> list[inspect.Parameter]:
    parameters = list(inspect.signature(function).parameters.values())
    for p in parameters:
        if p.kind in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL):
            star = "**" if p.kind is inspect.Parameter.VAR_KEYWORD else "*"
            raise TypeError(f"{function.__qualname__} takes {star}{p.name}: name every option, so that it can be checked")
    return parameters


def _globals(function: Callable[..., Any] | type) -> dict[str, Any]:
    initializer = inspect.unwrap(function.__init__ if isinstance(function, type) else function)  # type: ignore[misc]
    module = sys.modules.get(function.__module__)
    return {**(vars(module) if module else {}), **getattr(initializer, "__globals__", {})}
