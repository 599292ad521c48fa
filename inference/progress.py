"""A progress bar for a fit, with the training and the validation ELBO."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from elbowroom.inference.history import Row
from elbowroom.inference.schedule import Plan


@contextmanager
def progress_bar(console: Console) -> Iterator[Callable[[Plan, Row], None]]:
    """Show a bar on `console` while the context is open; yield the function to give to `Session(report=...)`.

    It shows the epoch, the training ELBO and the validation ELBO (nats per datum) and the time left.
    """
    columns = (
        TextColumn("fit"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("epochs  train ELBO {task.fields[train]}  validation ELBO {task.fields[validation]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("fit", total=None, train="-", validation="-")

        def report(plan: Plan, row: Row) -> None:
            train, validation = f"{row.train_elbo:.2f}", f"{row.validation_elbo:.2f}"
            if math.isnan(row.validation_elbo):
                validation = "-"
            bar.update(task, total=plan.epochs, completed=row.epoch, train=train, validation=validation)

        yield report
