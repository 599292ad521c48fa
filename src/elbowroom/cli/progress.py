"""Progress bars: of a fit, of an audit, of rows; what is being done, and the time left."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Column

from elbowroom.analysis.audit.budget import PLANNED, Progress
from elbowroom.cli.terminal import visible
from elbowroom.inference.fit.plan import Schedule
from elbowroom.inference.fit.record import Row


@contextmanager
def audit_bar(console: Console, plan: Callable[[str], None]) -> Iterator[Callable[[Progress], None]]:
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
        TextColumn("{task.description}", markup=False),
        TextColumn("{task.fields[left]}", table_column=Column(no_wrap=True)),
    )
    bar = Bar(*columns, console=console, disable=not console.is_terminal)
    task = bar.add_task("", total=1.0, left="")

    def report(step: Progress) -> None:
        if step == PLANNED:
            plan(str(step.plan))
            bar.start()
            return
        left = f"{timedelta(seconds=math.ceil(step.seconds_left))} left"
        bar.update(task, description=visible(str(step)), completed=step.done, left=left)

    try:
        yield report
        bar.update(task, completed=1.0, description="", left="")
    finally:
        bar.stop()


@contextmanager
def progress_bar(console: Console) -> Iterator[Callable[[Schedule, Row], None]]:
    """Show a bar on `console` while the context is open; yield the function to give to `Session(report=...)`.

    It shows the epoch, the training ELBO and the validation ELBO (nats per datum) and the time left.
    """
    columns = (
        TextColumn("fit"),
        BarColumn(bar_width=12),
        TextColumn("{task.completed}/{task.total}", table_column=Column(no_wrap=True)),
        TextColumn("ELBO {task.fields[train]}, validation {task.fields[validation]}", table_column=Column(no_wrap=True)),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with _shown(columns, console) as bar:
        task = bar.add_task("fit", total=None, train="-", validation="-")

        def report(plan: Schedule, row: Row) -> None:
            train, validation = f"{row.train_elbo:.2f}", f"{row.validation_elbo:.2f}"
            if math.isnan(row.validation_elbo):
                validation = "-"
            bar.start()
            bar.update(task, total=plan.epochs, completed=row.epoch, train=train, validation=validation)

        yield report


@contextmanager
def rows_bar(console: Console, name: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on `console` while the context is open; yield report(rows done, rows in all)."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=12),
        TextColumn("{task.completed:,} of {task.total:,} rows", table_column=Column(no_wrap=True)),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with _shown(columns, console) as bar:
        task = bar.add_task(visible(name), total=0)

        def report(done: int, total: int) -> None:
            bar.start()
            bar.update(task, total=total, completed=done)

        yield report


@contextmanager
def _shown(columns: Sequence[ProgressColumn], console: Console) -> Iterator[Bar]:
    """Yield a bar that begins with the first report: what fails before leaves one line, the reason."""
    bar = Bar(*columns, console=console)
    try:
        yield bar
    finally:
        if bar.live.is_started:
            bar.stop()
