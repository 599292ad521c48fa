"""The libraries that Elbowroom stands on: which one is missing or broken, and the command that mends it."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib import metadata
from traceback import walk_tb
from typing import TYPE_CHECKING

from elbowroom.errors import first_line

if TYPE_CHECKING:
    from packaging.requirements import Requirement

ANOTHER_NAME = {"pyro": "pyro-ppl", "sklearn": "scikit-learn", "yaml": "pyyaml"}
"""Import name -> distribution, where they differ by more than a dash, of what may not be installed."""

LONGEST = 120  # characters of a library's own message


def trouble(error: BaseException) -> str | None:
    """Say in one line which library made an import fail, and what mends it; None if the error did not come from an import."""
    name = culprit(error)
    if name is None:
        return None
    distribution = next(iter(metadata.packages_distributions().get(name, ())), ANOTHER_NAME.get(name, name.replace("_", "-")))
    version, ours = _version(distribution), {_normal(one.name): one for one in _requirements()}
    wanted = str(ours.get(_normal(distribution), distribution)).partition(";")[0].strip()
    if version is None and isinstance(error, ModuleNotFoundError) and error.name == name:
        return f"{distribution} is not installed; install it with: pip install '{wanted}'"
    outside = [str(one).partition(";")[0].strip() for one in ours.values() if _is_outside(one)]
    cure = " ".join(f"'{one}'" for one in outside) or f"--upgrade --force-reinstall '{wanted}'"
    reason = f"{type(error).__name__}: {first_line(error)[:LONGEST]}"
    which = distribution if version is None else f"{distribution} {version}"
    return f"{which} cannot be imported ({reason}); mend it with: pip install {cure}"


def culprit(error: BaseException) -> str | None:
    """Return the import name of the library whose import failed with this error; None if it did not come from an import.

    That is a library that was not found, else the last one whose own code was being run for the first time.
    """
    if isinstance(error, ModuleNotFoundError) and error.name and "." not in error.name and _is_library(error.name):
        return error.name
    found = None
    for frame, _ in walk_tb(error.__traceback__):
        module, code = str(frame.f_globals.get("__name__") or ""), frame.f_code
        if code.co_name == "<module>" and code.co_filename == frame.f_globals.get("__file__") and _is_library(module):
            found = module.partition(".")[0]
    if found is None and isinstance(error, ImportError) and error.name and _is_library(error.name):
        return error.name.partition(".")[0]
    return found


def _is_library(module: str) -> bool:
    return module.partition(".")[0] not in {"", "elbowroom", "__main__", *sys.stdlib_module_names}


def _requirements() -> Iterator[Requirement]:
    """Yield what Elbowroom declares to need on this Python, optional parts included; nothing where that cannot be known."""
    try:
        from packaging.requirements import Requirement

        lines = metadata.requires("elbowroom") or []
    except Exception:  # it runs from its sources, or packaging is what is broken
        return
    for one in map(Requirement, lines):
        if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in ("", "parquet")):
            yield one


def _is_outside(wanted: Requirement) -> bool:
    version = _version(wanted.name)
    return version is not None and not wanted.specifier.contains(version, prereleases=True)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _normal(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()
