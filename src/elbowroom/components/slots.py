"""Fields of a spec that hold a component: how they are validated, and how the component is built."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from elbowroom.components import plugins
from elbowroom.components.registry import component, in_use, names, options_model, python_classes, table_of
from elbowroom.components.schema import Block
from elbowroom.errors import SpecError


def slot(kind: str) -> Any:
    """Return the annotation of a spec field that names a component; a plain string is short for `{name: ...}`."""
    known = sorted({*table_of(kind), *in_use[kind], *python_classes[kind]})
    models = [options_model(kind, name) for name in known]
    union: Any = models[0] if len(models) == 1 else Annotated[Union[tuple(models)], Field(discriminator="name")]  # noqa: UP007
    bare = Literal[tuple(n for n in known if not any(o.required for o in component(kind, n).options))]  # type: ignore[valid-type]
    own: Any = Annotated[str, Field(pattern=f"^{plugins.PREFIX}")] | _Own

    def expand(given: Any) -> Any:
        if isinstance(given, str):
            given = {"name": given}
        if isinstance(given, Block):
            return given
        if not isinstance(given, Mapping):
            raise PydanticCustomError("no_component", "must be a name, or a block with a name")
        if "name" not in given:
            if any(":" in str(key) for key in given):  # YAML reads {name:gamma} as one key without a value
                spaced = ", ".join(
                    re.sub(r":\s*", ": ", str(k), count=1) + ("" if v is None else f": {v}") for k, v in given.items()
                )
                raise PydanticCustomError("no_name", f"needs a name; put a space after the colon: {{{spaced}}}")
            raise PydanticCustomError("no_name", f"needs a name, one of {', '.join(names(kind))}")
        if given["name"] not in known:
            context = {"kind": kind, "tag": str(given["name"]), "allowed": names(kind)}
            raise PydanticCustomError("unknown_component", "unknown", context)
        return given

    return Annotated[union, BeforeValidator(expand, json_schema_input_type=union | bare | own)]


class _Own(BaseModel):
    """A user's own class in the JSON schema; its options are known only after its file is executed."""

    model_config = ConfigDict(extra="allow", title="python")

    name: Annotated[str, Field(pattern=f"^{plugins.PREFIX}", description="python:file.py:Class or python:module:Class")]


def build(kind: str, chosen: Block, *, where: str = "", **facts: Any) -> Any:
    """Construct a component from its validated options and the facts that it asks for.

    Args:
        kind: the kind.
        chosen: an instance of `options_model(kind, name)`.
        where: the dotted path in the spec, for messages.
        facts: all known facts of `FACTS[kind]`; only those that the constructor asks for are passed.

    Raises:
        SpecError: the constructor refuses a combination of options (ValueError).
    """
    found = component(kind, chosen.name)  # type: ignore[attr-defined]
    given = {option.name: getattr(chosen, option.name) for option in found.options}
    try:
        return found.cls(*(facts[name] for name in found.facts), **given)
    except ValueError as error:
        raise SpecError(f"{where or found.name}: {error}") from error
