"""Whose model this is: the library and class, without an import of the library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def of_library(model: Any, library: str, names: Sequence[str], *, exact: bool = True) -> bool:
    """Say whether a model's class has one of the names and is of the library.

    Args:
        model: the object.
        library: first part of the module's name.
        names: of classes.
        exact: False takes subclasses too; a subclass may have another density.
    """
    classes = type(model).__mro__[:1] if exact else type(model).__mro__
    return any(kind.__name__ in names and kind.__module__.split(".")[0] == library for kind in classes)
