"""The record of a fit, epoch by epoch: rows in memory, `history.csv` on disk."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from elbowroom.system.files import write_text


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


@dataclass(frozen=True)
class Effect:
    """The mean ELBO of a sample of training rows in two precisions, with the same draws, in nats per datum.

    Attributes:
        precision: the lower one.
        rows: training rows n, evenly spaced.
        full: mean ELBO in full precision.
        rounded: mean ELBO in the lower one.
        standard_error: of rounded - full, paired over rows; NaN for one row.
    """

    precision: str
    rows: int
    full: float
    rounded: float
    standard_error: float

    @property
    def difference(self) -> float:
        """The effect, rounded - full; negative where rounding lowers the ELBO."""
        return self.rounded - self.full

    def __str__(self) -> str:
        """Return the effect as a sentence."""
        rows = f"{self.rows} training row{'s' if self.rows > 1 else ''}"
        places = _places(self.standard_error)
        return (
            f"ELBO of {rows} at the weights kept: {self.full:.4f} nats per datum in full precision, {self.rounded:.4f} with "
            f"{self.precision}, difference {self.difference:+.{places}f} +- {self.standard_error:.{places}f}"
        )


@dataclass
class History:
    """The record of a fit.

    Attributes:
        rows: one per epoch.
        best_epoch: the epoch (from 1) that gave the weights that were kept.
        stopped_because: a sentence.
        plan: the plan's sentence.
        effect: the effect of the training precision on the ELBO; None in full precision.
    """

    rows: list[Row] = field(default_factory=list)
    best_epoch: int = 0
    stopped_because: str = ""
    plan: str = ""
    effect: Effect | None = None

    @property
    def best(self) -> Row:
        """The row of the epoch that gave the weights that were kept."""
        return self.rows[self.best_epoch - 1]

    def write(self, path: str | Path) -> None:
        """Write the rows to `path` as CSV, atomically; numbers in full precision, a missing one as `nan`."""
        text = io.StringIO()
        writer = csv.DictWriter(text, [column.name for column in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in self.rows)
        write_text(path, text.getvalue())


def _places(error: float) -> int:
    """Return the decimal places (4 to 9) that show one digit of an error."""
    return min(9, max(4, math.ceil(-math.log10(error)))) if math.isfinite(error) and error > 0 else 4
