"""What a fit did, epoch by epoch: rows in memory, `history.csv` on disk."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from elbowroom.files import write_text
from elbowroom.inference.rounding import Effect


@dataclass(frozen=True)
class Row:
    """One epoch. ELBOs and losses are in nats per datum.

    Attributes:
        epoch: counted from 1.
        step: steps taken by the end of the epoch.
        learning_rate: of the epoch's last step.
        kl_weight: of the epoch's last step.
        train_loss: the objective, averaged over the epoch's steps (lower is better).
        train_elbo: the unweighted ELBO of the same draws (higher is better).
        validation_elbo: the unweighted ELBO of the validation data at the end of the epoch; NaN without any.
        seconds: wall time of the fit by the end of the epoch, interruptions not counted.
    """

    epoch: int
    step: int
    learning_rate: float
    kl_weight: float
    train_loss: float
    train_elbo: float
    validation_elbo: float
    seconds: float


@dataclass
class History:
    """The record of a fit.

    Attributes:
        rows: one per epoch.
        best_epoch: the epoch (from 1) whose weights were kept.
        stopped_because: a sentence.
        plan: the plan's sentence.
        effect: what the precision of the training steps does to the ELBO; None in full precision.
    """

    rows: list[Row] = field(default_factory=list)
    best_epoch: int = 0
    stopped_because: str = ""
    plan: str = ""
    effect: Effect | None = None

    @property
    def best(self) -> Row:
        """The row of the epoch whose weights were kept."""
        return self.rows[self.best_epoch - 1]

    def write(self, path: str | Path) -> None:
        """Write the rows to `path` as CSV, atomically; numbers in full precision, a missing one as `nan`."""
        text = io.StringIO()
        writer = csv.DictWriter(text, [column.name for column in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in self.rows)
        write_text(path, text.getvalue())
