"""What a test made known is taken out of the registry again, as in another process."""

from __future__ import annotations

from elbowroom.components import plugins, registry


def unregister(kind: str, name: str) -> None:
    """Take a component out of the registry."""
    registry.table_of(kind).pop(name)
    registry._changed()


def forget_python() -> None:
    """Take the user's own files out of the registry; they are executed anew when they are asked for."""
    for known in registry.python_classes.values():
        known.clear()
    plugins.forget()
    registry._changed()
