"""The registry: the priors, likelihoods, networks, guides, references and data sets that a spec can name.

A component is an ordinary class. The POSITIONAL parameters of its constructor are facts that Elbowroom passes (`FACTS`); the
KEYWORD-ONLY ones are the user's options. The schema, the checks and the list of `elbowroom components` are derived from them,
the documentation from the docstring's `Args`. Importing this module does not import torch. Components of installed packages
and of a user's own files are found by `plugins`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from elbowroom.components import plugins, schema, signatures
from elbowroom.components.schema import Block
from elbowroom.components.signatures import Option
from elbowroom.components.table import BASES, FACTS, PLACES, TABLE
from elbowroom.errors import SpecError, nearest

_own = {kind: frozenset(table) for kind, table in TABLE.items()}
python_classes: dict[str, dict[str, tuple[type, str]]] = {kind: {} for kind in TABLE}
in_use: dict[str, set[str]] = {kind: set() for kind in TABLE}
_on_change: list[Callable[[], None]] = []


@dataclass(frozen=True)
class Component:
    """One entry of the registry.

    Attributes:
        kind: `prior`, `likelihood`, ...
        name: the name that a spec uses.
        cls: the class.
        summary: the first line of its docstring.
        options: its keyword-only parameters.
        facts: its positional parameters.
        origin: the package that offers it; empty for Elbowroom's own and for components registered by Python code.
        sha256: hash of the user's own file that defines it, else empty.
    """

    kind: str
    name: str
    cls: type
    summary: str
    options: tuple[Option, ...]
    facts: tuple[str, ...]
    origin: str = ""
    sha256: str = ""


def kinds() -> list[str]:
    """Return all kinds of component."""
    return list(TABLE)


def names(kind: str) -> list[str]:
    """Return the names that a spec can use for a kind, sorted: built-in, registered, or offered by installed packages."""
    return sorted({*table_of(kind), *_offered(kind)})


def own_names(kind: str) -> list[str]:
    """Return the names of the built-in components of a kind, sorted."""
    table_of(kind)
    return sorted(_own[kind])


def broken() -> list[plugins.Offer]:
    """Return the offers of installed packages that cannot be used, as far as their metadata show it."""
    return [offer for offer in plugins.offers(_own) if offer.problem]


@functools.cache
def component(kind: str, name: str) -> Component:
    """Import a component, check its constructor, and return it.

    Raises:
        SpecError: unknown kind or name; the message suggests the most similar one.
    """
    entry, origin, digest = table_of(kind).get(name), "", ""
    if name in python_classes[kind]:
        entry, digest = python_classes[kind][name]
    elif entry is None and name in _offered(kind):
        offer = _offered(kind)[name]
        entry, origin = offer.load(), offer.package
        _foreign(kind, name, entry)
        _check_constructor(kind, name, entry)
    elif entry is None:
        raise SpecError(f"unknown {kind} {name!r}{nearest(name, names(kind))}")
    elif isinstance(entry, str):
        entry = _named(entry)
        _protocol(kind, name, entry)
        _check_constructor(kind, name, entry)
    options, facts = tuple(signatures.options(entry)), tuple(signatures.facts(entry))
    return Component(kind, name, entry, signatures.summary(entry), options, facts, origin, digest)


def register(kind: str, name: str, cls: type) -> None:
    """Add a component, so that specs can name it.

    The positional parameters of the constructor must be facts of its kind; options must be keyword-only and annotated. The
    constructor is wrapped in place: keyword arguments from Python code are checked like options in a spec.

    Args:
        kind: `data`, `prior`, `likelihood`, `network`, `guide`, `objective` or `reference`.
        name: the name for specs.
        cls: the class.

    Raises:
        SpecError: the kind is unknown, the name is in use, or the constructor does not follow these rules.

    Example:
        >>> import elbowroom as er
        >>> from elbowroom.models.priors.base import Normal
        >>> class Wide(Normal):
        ...     "A normal prior under another name."
        >>> er.register("prior", "wide", Wide)
    """
    table = table_of(kind)
    if name in table and table[name] is not cls:
        raise SpecError(f"register: there is a {kind} {name!r} already; choose another name")
    if not name.isidentifier():
        raise SpecError(f"register: {name!r} is not a name; use letters, digits and underscores")
    _protocol(kind, name, cls)
    table[name] = cls
    _changed()
    _check_constructor(kind, name, cls)


def prepare(tree: Mapping[str, Any], *, folder: Path, allow_python: bool = False, label: str = "spec") -> dict[str, Any]:
    """Make the components of a spec available: import those of installed packages, and execute the user's own files.

    Args:
        tree: the spec; it is not changed.
        folder: the folder that paths of files start from.
        allow_python: execute the files and modules of `python:` names; without it they are refused unread.
        label: name of the spec in messages.

    Returns:
        The spec, with absolute paths in its `python:` names.

    Raises:
        SpecError: a `python:` name is not allowed, or something cannot be imported.
    """
    result = dict(tree)
    for where, kind in PLACES.items():
        parent, _, key = where.rpartition(".")
        block = result.get(parent) if parent else result
        if not isinstance(block, Mapping) or key not in block:
            continue

        def known(given: Any, kind: str = kind, where: str = where) -> Any:
            try:
                return _known(kind, given, folder, allow_python)
            except SpecError as error:
                raise SpecError(f"{label}: {where}: {error}") from error

        given = block[key]
        value = [known(each) for each in given] if isinstance(given, list) else known(given)
        if parent:
            result[parent] = {**block, key: value}
        else:
            result[key] = value
    return result


def python(kind: str, name: str, *, folder: Path, sha256: Any = None) -> str:
    """Execute the source of a `python:` name and register the class; return the name with the absolute path of the file.

    A relative path starts from `folder`; `sha256` is the hash that the source must have, None for any.

    Raises:
        SpecError: the class does not exist, cannot be executed, or is not a component of this kind.
    """
    table_of(kind)
    where = plugins.place(name, folder)
    found = plugins.execute(where, sha256, folder)
    if python_classes[kind].get(where.name) != found:
        cls, said = found[0], plugins.short(name)
        _foreign(kind, said, cls)
        python_classes[kind][where.name] = found
        _changed()
        _check_constructor(kind, said, cls)
    return where.name


def portable(tree: Any) -> Any:
    """Return a spec without the folders in `python:` names, so that moving a file does not change the experiment."""
    if isinstance(tree, Mapping):
        return {k: plugins.short(v) if k == "name" and isinstance(v, str) else portable(v) for k, v in tree.items()}
    return [portable(value) for value in tree] if isinstance(tree, list) else tree


def use_all() -> None:
    """Add every importable component of installed packages to the schema."""
    for kind in kinds():
        for name in _offered(kind):
            with suppress(SpecError):
                _known(kind, name, Path(), False)


@functools.cache
def options_model(kind: str, name: str) -> type[Block]:
    """Return the pydantic model of a component's options, with its `name`, and the hash of a user's own file."""
    found = component(kind, name)
    extra: dict[str, Any] = {"name": (Literal[name], ...)}
    if found.sha256:
        extra["sha256"] = (Literal[found.sha256], Field(found.sha256, description="hash of the file, as it was executed"))
    return schema.block(f"{kind}_{name}", found.options, extra)


def on_change(clear: Callable[[], None]) -> None:
    """Register a function that is called whenever the registry changes, to clear cached schemas."""
    _on_change.append(clear)


def _changed() -> None:
    component.cache_clear()
    options_model.cache_clear()
    for clear in _on_change:
        clear()


def table_of(kind: str) -> dict[str, str | type]:
    """Return the components of a kind, by name."""
    if kind not in TABLE:
        raise SpecError(f"unknown kind of component {kind!r}{nearest(kind, TABLE)}")
    return TABLE[kind]


def _offered(kind: str) -> dict[str, plugins.Offer]:
    found = (offer for offer in plugins.offers(_own) if offer.kind == kind and offer.name not in _own[kind])
    return {offer.name: offer for offer in found if offer.name.isidentifier()}


def _known(kind: str, given: Any, folder: Path, allow_python: bool) -> Any:
    """Make one component of a spec available; return its entry, a `python:` name with the absolute path."""
    name = given.get("name") if isinstance(given, Mapping) else given
    if not isinstance(name, str):
        return given
    if name.startswith(plugins.PREFIX):
        if not allow_python:
            raise SpecError(f"{name} {plugins.place(name, folder).asks}")
        name = python(kind, name, folder=folder, sha256=given.get("sha256") if isinstance(given, Mapping) else None)
        return {**given, "name": name} if isinstance(given, Mapping) else name
    if name not in TABLE[kind] and name not in in_use[kind] and name in _offered(kind):
        component(kind, name)
        in_use[kind].add(name)
        _changed()
    return given


def _named(target: str) -> type:
    module, _, attribute = target.partition(":")
    found = getattr(importlib.import_module(module), attribute)
    assert isinstance(found, type)  # the entries of TABLE are classes
    return found


def _foreign(kind: str, name: str, cls: type) -> None:
    """Refuse a class of another kind, or one whose options have no schema, which would break the schema of all components."""
    if not issubclass(cls, _named(BASES[kind])):
        module, _, base = BASES[kind].partition(":")
        raise SpecError(f"{kind} {name}: {cls.__name__} is no {kind}; derive it from {module}.{base}")
    _protocol(kind, name, cls)
    for option in signatures.options(cls):
        try:
            model = schema.block(option.name, [option])
            model.model_json_schema()
            if not option.required:
                model.model_validate({option.name: option.default})
        except ValidationError as error:
            said = schema.one_problem(error, {option.name: option.default})[1]
            raise SpecError(f"{kind} {name}: option {option.name}: its default {said}") from error
        except Exception as error:  # pydantic raises errors of several types here
            raise SpecError(
                f"{kind} {name}: option {option.name}: {option.type_text} cannot be written in a spec; use numbers, text, "
                "true or false, Literal, lists or mappings of them"
            ) from error


def _protocol(kind: str, name: str, cls: type) -> None:
    """Refuse a class whose options cannot be listed, or which asks for facts that its kind does not have."""
    try:
        asked = signatures.facts(cls)
        found = signatures.options(cls)
    except (TypeError, NameError) as error:
        raise SpecError(f"{kind} {name}: {error}") from error
    for fact in asked:
        if fact not in FACTS[kind]:
            known = ", ".join(sorted(FACTS[kind])) or "none"
            raise SpecError(
                f"{kind} {name}: the positional parameter {fact!r} is no fact of a {kind} (these are: {known}); "
                "make it keyword-only if the user chooses it"
            )
    for option in found:
        if option.name in ("name", "sha256"):
            raise SpecError(f"{kind} {name}: an option cannot be called {option.name!r}")


def _check_constructor(kind: str, name: str, cls: type) -> None:
    """Wrap `cls.__init__` in place, once, so that its options are validated as in a spec."""
    original = cls.__init__  # type: ignore[misc]
    if getattr(cls.__dict__.get("__init__"), "checked_by_elbowroom", False) or not signatures.options(cls):
        return
    model = schema.block(f"{kind}_{name}_options", signatures.options(cls))

    @functools.wraps(original)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        known = {key: value for key, value in kwargs.items() if key in model.model_fields}
        if type(self) is cls and known:
            required = {k: f for k, f in model.model_fields.items() if f.is_required()}
            if all(key in known for key in required):
                try:
                    valid = model.model_validate(known)
                except ValidationError as error:
                    path, problem = schema.one_problem(error, known)
                    raise SpecError(f"{name}: {schema.dotted(path)}: {problem}") from None
                kwargs = {**kwargs, **{key: getattr(valid, key) for key in known}}
        original(self, *args, **kwargs)

    checked.checked_by_elbowroom = True  # type: ignore[attr-defined]
    cls.__init__ = checked  # type: ignore[misc]
