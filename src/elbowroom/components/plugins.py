"""Components from outside Elbowroom: from installed packages, and from a user's own file.

An installed package offers components as entry points of the group `elbowroom.components`, under `kind.name`:

    [project.entry-points."elbowroom.components"]
    "prior.wide" = "my_package.priors:Wide"

Listing them reads package metadata only. A package is imported when one of its components is used.

A name `python:my_file.py:Wide` or `python:my_module:Wide` stands for a user's own class. Reading the class executes the file,
so this needs `--allow-python`: otherwise a spec or run folder from others could run code.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from elbowroom.errors import SpecError, nearest
from elbowroom.system.files import sha256
from elbowroom.system.paths import located

GROUP = "elbowroom.components"
PREFIX = "python:"
_FORM = "write python:my_file.py:Class, or python:my_module:Class"

_executed: dict[tuple[str, str], ModuleType] = {}
_imported: dict[str, str] = {}


@dataclass(frozen=True)
class Offer:
    """A component that an installed package offers.

    Attributes:
        kind: as in the registry.
        name: the name for specs.
        target: `module:Class`.
        package: the package that offers it, with its version.
        problem: why it cannot be used, if the metadata show a problem; else empty.
    """

    kind: str
    name: str
    target: str
    package: str
    problem: str = ""

    def load(self) -> type:
        """Import the class; a SpecError names the package at fault."""
        if self.problem:
            raise SpecError(self.problem)
        module, _, attribute = self.target.partition(":")
        who = f"{self.kind} {self.name}: {self.target} of {self.package}"
        try:
            return _class(importlib.import_module(module), attribute, who)
        except SpecError:
            raise
        except (Exception, SystemExit) as error:  # a third-party module may raise anything when it is imported
            raise SpecError(f"{who} cannot be imported ({_reason(error)}); mend or uninstall it") from error


def offers(own: Mapping[str, Collection[str]]) -> tuple[Offer, ...]:
    """Return what installed packages offer, sorted; `own` maps kinds to the names in use. Nothing is imported."""
    found = [_offer(kind, name, target, package, own) for kind, name, target, package in _entry_points()]
    count = {(o.kind, o.name): [p.package for p in found if (p.kind, p.name) == (o.kind, o.name)] for o in found}
    return tuple(
        Offer(o.kind, o.name, o.target, o.package, f"{o.kind} {o.name}: offered by {' and by '.join(who)}; uninstall one")
        if len(who := count[o.kind, o.name]) > 1 and not o.problem
        else o
        for o in sorted(found, key=lambda o: (o.kind, o.name, o.package))
    )


def _offer(kind: str, name: str, target: str, package: str, own: Mapping[str, Collection[str]]) -> Offer:
    problem, where = "", f"{package}: entry point {kind}.{name}"
    if kind not in own or not name:
        problem = f"{package}: entry point {f'{kind}.{name}'.rstrip('.')}: must be called kind.name, such as prior.wide"
        problem += nearest(kind, own)
    elif not name.isidentifier():
        problem = f"{where}: {name!r} is not a name; use letters, digits and underscores"
    elif name in own[kind]:
        problem = f"{where}: there is a {kind} {name!r} in elbowroom; the package must choose another name"
    elif not all(target.partition(":")[::2]):
        problem = f"{where}: {target!r} must be module:Class"
    return Offer(kind, name, target, package, problem)


@functools.cache
def _entry_points() -> tuple[tuple[str, str, str, str], ...]:
    found = set()
    for entry in metadata.entry_points(group=GROUP):
        kind, _, name = entry.name.partition(".")
        package = f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else "a package without a name"
        found.add((kind, name, entry.value.strip(), package))
    return tuple(sorted(found))


def forget() -> None:
    """Clear the caches, so that packages are searched and files are executed again at the next use."""
    _entry_points.cache_clear()
    _executed.clear()


@dataclass(frozen=True)
class Place:
    """The file or module, and the class in it, that a `python:` name refers to.

    Attributes:
        source: the absolute path of a file, or the dotted name of a module.
        attribute: name of the class.
    """

    source: str
    attribute: str

    @property
    def is_file(self) -> bool:
        """Whether the source is a file, not a module."""
        return self.source.endswith(".py")

    @property
    def asks(self) -> str:
        """The message for a user who has not allowed the execution."""
        what = self.source if self.is_file else f"the module {self.source}"
        return f"would execute {what}; allow it with --allow-python (in Python: allow_python=True) if you trust it"

    @property
    def name(self) -> str:
        """The registered name; for a file it contains the absolute path."""
        return f"{PREFIX}{self.source}:{self.attribute}"


def place(name: str, folder: Path) -> Place:
    """Parse a `python:` name; a relative path starts from `folder`. Nothing is executed.

    Raises:
        SpecError: the name has another form, or the file does not exist.
    """
    source, _, attribute = name.removeprefix(PREFIX).rpartition(":")
    if not source or not attribute.isidentifier():
        raise SpecError(f"{name!r} names no class; {_FORM}")
    if source.endswith(".py"):
        try:
            path = located(folder, Path(source))
        except ValueError as error:
            raise SpecError(f"{short(name)}: {error}") from None
        if not path.is_file():
            raise SpecError(f"{short(name)}: there is no file {path}; correct the path, which starts from {folder}")
        return Place(str(path), attribute)
    if not all(part.isidentifier() for part in source.split(".")):
        raise SpecError(f"{name!r}: {source!r} is no module; {_FORM}")
    return Place(source, attribute)


def short(name: str) -> str:
    """Return a name without the folder of its file, so that it stays the same when the file is moved."""
    if not name.startswith(PREFIX):
        return name
    source, _, attribute = name.removeprefix(PREFIX).rpartition(":")
    return f"{PREFIX}{Path(source).name if source.endswith('.py') else source}:{attribute}"


def execute(where: Place, pinned: Any = None, folder: Path | None = None) -> tuple[type, str]:
    """Execute a file or import a module; return the class and the SHA-256 of the source. Call it only if the user allows it.

    Args:
        where: what to execute; an unchanged file is not executed again.
        pinned: the hash that the source must have; None for any.
        folder: folder of the spec, for a hint in the message where a file was given as a module.

    Raises:
        SpecError: the source has changed, cannot be executed, or does not define the class.
    """
    name = short(where.name)
    source, digest = _read(where, folder)
    if pinned is not None and pinned != digest:
        raise SpecError(
            f"{name}: {where.source} is not what it was (sha256 is {digest[:12]}..., not {str(pinned)[:12]}...); "
            "bring the old one back, or leave sha256 out and fit again"
        )
    key = (where.source, digest)
    if key not in _executed:
        try:
            _executed[key] = _run(where, source, digest) if where.is_file else importlib.import_module(where.source)
        except (Exception, SystemExit) as error:  # a user's file may raise anything
            raise SpecError(f"{name} cannot be executed ({_reason(error, where.source)}); correct {where.source}") from error
        if not where.is_file and _imported.setdefault(where.source, digest) != digest:
            del _executed[key]
            raise SpecError(f"{name}: {where.source} has changed since it was imported; start Python anew")
    return _class(_executed[key], where.attribute, name), digest


def _read(where: Place, folder: Path | None) -> tuple[bytes, str]:
    path = where.source
    if not where.is_file:
        try:
            found = importlib.util.find_spec(where.source)
        except (Exception, SystemExit) as error:  # parent packages are imported
            raise SpecError(f"{short(where.name)} cannot be imported ({_reason(error)})") from error
        if found is None or not found.origin or not Path(found.origin).is_file():
            file = f"{where.source.replace('.', '/')}.py"
            beside = folder is not None and (folder / file).is_file()
            cure = f"write python:{file}:{where.attribute}" if beside else "install it, or name a file: python:my_file.py:Class"
            raise SpecError(f"{short(where.name)}: there is no module {where.source}; {cure}")
        path = found.origin
    source = Path(path).read_bytes()
    return source, sha256(source)


class _Source(importlib.abc.InspectLoader):
    """Executes exactly the bytes that were hashed; the file is not read again, and no cache is written next to it."""

    def __init__(self, source: bytes, path: str) -> None:
        self.source, self.path = source, path

    def get_source(self, fullname: str) -> str:
        return importlib.util.decode_source(self.source)

    def get_code(self, fullname: str) -> Any:
        return self.source_to_code(self.source, self.path)

    def is_package(self, fullname: str) -> bool:
        return False


def _run(where: Place, source: bytes, digest: str) -> ModuleType:
    name = f"elbowroom_python_{sha256(where.source.encode(), digest.encode())[:16]}"
    loader = _Source(source, where.source)
    spec = importlib.util.spec_from_loader(name, loader, origin=where.source)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    module.__file__ = where.source
    sys.modules[name] = module  # dataclasses and annotations look their module up
    try:
        loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _class(module: ModuleType, attribute: str, who: str) -> type:
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            offered = [key for key, value in vars(found).items() if isinstance(value, type) and not key.startswith("_")]
            raise SpecError(f"{who}: there is no {part!r}{nearest(part, offered)}")
        found = getattr(found, part)
    if not isinstance(found, type):
        raise SpecError(f"{who}: {attribute} is no class")
    return found


def _reason(error: BaseException, path: str = "") -> str:
    """Describe an error in a few words, with the line of the user's file that raised it."""
    line = error.lineno if isinstance(error, SyntaxError) else None
    trace = error.__traceback__
    while trace is not None:
        if path and trace.tb_frame.f_code.co_filename == path:
            line = trace.tb_lineno
        trace = trace.tb_next
    text = error.msg if isinstance(error, SyntaxError) else " ".join(str(error).split())[:120]
    said = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return f"line {line}: {said}" if line and path else said
