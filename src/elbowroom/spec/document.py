"""A spec as text: strict YAML, and `--set a.b=c`.

PyYAML follows YAML 1.1: it reads `1e-3` as text, `no` as a boolean, `010` as eight, and a later key replaces an earlier one
without a warning. `read` follows YAML 1.2's core schema instead, refuses repeated keys, anchors and tags, and executes no code.
Every error is a `SpecError` with line and column.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from elbowroom.components.schema import dotted, short
from elbowroom.errors import SpecError
from elbowroom.system.paths import MAX_BYTES, limited_text


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 scalars; no anchors, no tags, no repeated keys."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise yaml.constructor.ConstructorError(None, None, "anchors and aliases are not allowed", event.start_mark)
        if getattr(event, "tag", None) is not None:
            raise yaml.constructor.ConstructorError(None, None, f"the tag {event.tag} is not allowed", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:str" or not isinstance(key, yaml.ScalarNode):
                raise _problem("a key must be text", key)
            if key.value in seen:
                raise _problem(f"the key {key.value!r} appears twice", key)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> int:
        text = node.value.replace("_", "")
        try:
            number = int(text, 0 if re.match(r"[-+]?0[xob]", text) else 10)
        except ValueError:
            raise _problem("this number has too many digits", node) from None
        if abs(number) >= 2**63:
            raise _problem("this number has too many digits", node)
        return number

    def construct_text(self, node: yaml.ScalarNode) -> str:
        try:
            node.value.encode("utf-8")
        except UnicodeEncodeError:
            raise _problem("this text is not valid Unicode", node) from None
        if "\0" in node.value:
            raise _problem("this text holds a NUL character", node)
        return str(node.value)


def _problem(text: str, node: yaml.Node) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, text, node.start_mark)


_INT = r"[-+]?[0-9][0-9_]*|0x[0-9a-fA-F]+|0o[0-7]+|0b[01]+"
_FLOAT = r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", _INT, "-+0123456789"),
    ("float", _FLOAT, "-+0123456789."),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))
_Loader.yaml_constructors = {
    key: yaml.SafeLoader.yaml_constructors[key]
    for key in (f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "float", "seq", "map"))
}
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_number)
_Loader.add_constructor("tag:yaml.org,2002:str", _Loader.construct_text)


def read(path: str | Path) -> dict[str, Any]:
    """Read a spec file as dictionaries, lists and scalars, unchecked; a SpecError names file, line and column."""
    path = Path(path)
    label = path.name
    try:
        if path.is_dir():
            raise SpecError(f"{path}: this is a folder; name the spec file")
        text = limited_text(path, MAX_BYTES)
    except FileNotFoundError:
        raise SpecError(f"{path}: no such spec; `elbowroom spec init` copies one of those that come with elbowroom") from None
    except UnicodeDecodeError as error:
        raise SpecError(f"{label}: not a text file in UTF-8 (byte {error.start})") from None
    except ValueError as error:
        raise SpecError(f"{label if path.is_file() else path}: {error}") from None
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror or error}") from None
    tree = parse(text, label)
    if tree is None:
        raise SpecError(f"{label}: empty; `elbowroom spec init` copies a spec that comes with elbowroom")
    if not isinstance(tree, dict):
        raise SpecError(f"{label}: a spec is a block of `key: value` lines, this is {short(tree)}")
    return tree


def parse(text: str, label: str) -> Any:
    """Parse YAML text; `label` names it in messages."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise SpecError(f"{label}{place}: {error.problem or error.context}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise SpecError(f"{label}, line {line}: the character {chr(error.character)!r} is not allowed") from None
    except RecursionError:
        raise SpecError(f"{label}: nested too deeply") from None


def write(tree: Any) -> str:
    """Return YAML text that `parse` reads back unchanged, with short lists on one line and keys in their order."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, default_flow_style=False, allow_unicode=True, width=110)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes texts that `_Loader` would read as other types, and writes lists of scalars in flow style."""

    yaml_implicit_resolvers = {
        first: [
            *yaml.SafeDumper.yaml_implicit_resolvers.get(first, []),
            *_Loader.yaml_implicit_resolvers.get(first, []),
        ]
        for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *_Loader.yaml_implicit_resolvers}
    }

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _sequence(dumper: yaml.SafeDumper, data: Sequence[Any]) -> yaml.Node:
    flat = all(not isinstance(item, list | tuple | dict) for item in data)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=flat)


def _float(dumper: yaml.SafeDumper, value: float) -> yaml.Node:
    text = repr(value)
    if value != value or value in (float("inf"), -float("inf")):
        text = {"nan": ".nan", "inf": ".inf", "-inf": "-.inf"}[text]
    return dumper.represent_scalar("tag:yaml.org,2002:float", text)


_Dumper.add_representer(list, _sequence)
_Dumper.add_representer(tuple, _sequence)
_Dumper.add_representer(float, _float)


def assignments(given: Iterable[str]) -> dict[tuple[str, ...], Any]:
    """Parse `a.b=c` strings; a value is YAML, and a comma makes a list (`grid,hmc`). `a.name=c` is the same as `a=c`.

    Raises:
        SpecError: a string has no `=` or an empty part, or a path is set twice.
    """
    found: dict[tuple[str, ...], Any] = {}
    for text in given:
        key, equals, value = text.partition("=")
        path = tuple(part.strip() for part in key.split("."))
        if not equals or not all(path):
            raise SpecError(f"--set {text}: write it as key=value with a dotted key, e.g. --set model.latent_dim=2")
        if path[-1] == "name" and len(path) > 1:
            path = path[:-1]
        if path in found:
            raise SpecError(f"--set {dotted(path)}: given twice")
        label = f"--set {dotted(path)}"
        value = value.strip()
        found[path] = parse(f"[{value}]" if "," in value and value[0] not in "[{\"'" else value, label)
    return found


def assign(tree: dict[str, Any], changes: dict[tuple[str, ...], Any]) -> tuple[dict[str, Any], list[str]]:
    """Apply assignments to a spec tree, outer paths first, whatever their order.

    Naming another component drops the options of the old one, and a note says so.

    Args:
        tree: the content of the file; it is not changed.
        changes: path -> value, from `assignments`.

    Returns:
        The new tree and the notes.
    """
    result = _copy(tree)
    notes: list[str] = []
    for path in sorted(changes, key=lambda p: (len(p), p)):
        node: Any = result
        for depth, part in enumerate(path[:-1]):
            node = _child(node, part, path[: depth + 1])
        key, value = path[-1], _copy(changes[path])
        if isinstance(node, list):
            node[_position(node, key, path)] = value
            continue
        old = node.get(key)
        if isinstance(value, str) and isinstance(old, dict) and "name" in old:
            if old["name"] == value:
                continue  # the name is the same, so the options stay
            dropped = [option for option in old if option != "name"]
            if dropped:
                notes.append(f"--set {dotted(path)}={value}: the options of {old['name']} were reset ({', '.join(dropped)})")
        elif isinstance(value, dict) and isinstance(old, dict):
            dropped = [option for option in old if option not in value and option != "name"]
            if dropped:
                notes.append(f"--set {dotted(path)}: the whole block was replaced (without {', '.join(dropped)})")
        node[key] = value
    return result, notes


def _child(node: Any, part: str, path: tuple[str, ...]) -> Any:
    """Step into `part`; a missing block is created, and a plain name becomes a block."""
    if isinstance(node, list):
        position = _position(node, part, path)
        if isinstance(node[position], str):
            node[position] = {"name": node[position]}
        child = node[position]
    else:
        child = node.get(part)
        if child is None:
            child = node[part] = {}
        elif isinstance(child, str):
            child = node[part] = {"name": child}
    if not isinstance(child, dict | list):
        raise SpecError(f"--set {dotted(path)}: this is {short(child)}, which has nothing inside to set")
    return child


def _position(node: list[Any], part: str, path: tuple[str, ...]) -> int:
    if not (part.isascii() and part.isdigit() and int(part) < len(node)):
        raise SpecError(f"--set {dotted(path)}: the list has {len(node)} entries; name one by its position, from 0")
    return int(part)


def _copy(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _copy(value) for key, value in tree.items()}
    return [_copy(value) for value in tree] if isinstance(tree, list) else tree
