"""A progress bar for an audit, with what is being done and the time left."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from elbowroom.analysis.audit.budget import Step

PLANNED = "plan"
"""The first step of an audit."""


@contextmanager
def audit_bar(console: Console, plan: Callable[[str], None]) -> Iterator[Callable[[Step], None]]:
    """Show a bar on a terminal while the context is open; yield the function to give to `audit(progress=...)`.

    The bar shows what is being done, the share of the estimated time that is behind it and the estimated time left.

    Args:
        console: where the bar goes, if it is a terminal.
        plan: told the plan before anything starts: the references, why these, and how long each will take.
    """
    columns = (
        TextColumn("audit"),
        BarColumn(bar_width=12),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.description}"),
        TextColumn("{task.fields[left]}", table_column=Column(no_wrap=True)),
    )
    bar = Progress(*columns, console=console, disable=not console.is_terminal)
    task = bar.add_task("", total=1.0, left="")

    def report(step: Step) -> None:
        if step == PLANNED:
            plan(str(step.plan))
            bar.start()
            return
        left = f"{timedelta(seconds=math.ceil(step.seconds_left))} left"
        bar.update(task, description=str(step), completed=step.done, left=left)

    try:
        yield report
        bar.update(task, completed=1.0, description="", left="")
    finally:
        bar.stop()
