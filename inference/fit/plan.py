"""The plan of a fit, counted in steps: number of steps, learning rates and KL weights.

    learning rate   constant: a;   cosine: a / 2 (1 + cos(pi t / T)) at step t = 0 .. T - 1
    KL weight       min(1, t / W)

T is the number of steps, W the length of the KL warm-up. W is clipped so that the run always ends at weight 1, because a loss
with a weight below 1 is no bound on the evidence.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from elbowroom.errors import DataError, SpecError
from elbowroom.inference.fit.record import Row
from elbowroom.inference.fit.warm_start import Start

Decay = Literal["constant", "cosine"]


@dataclass(frozen=True)
class Schedule:
    """The steps, learning rates and KL weights of a fit; `str(plan)` describes them in a sentence.

    Attributes:
        size: number of training data N.
        epochs: passes over the data.
        batch_size: data per step, at most N.
        learning_rate: at the first step.
        schedule: `constant` or `cosine`.
        warmup: steps W over which the KL weight rises from 0 to 1; 0 means weight 1 throughout.
        asked_warmup: the steps of warm-up that were asked for, before clipping.
        patience: epochs without a better validation ELBO after which the fit stops, or None.
    """

    size: int
    epochs: int
    batch_size: int
    learning_rate: float
    schedule: Decay
    warmup: int
    asked_warmup: int
    patience: int | None

    @property
    def batches(self) -> int:
        """Steps per epoch; the last batch may be partial."""
        return math.ceil(self.size / self.batch_size)

    @property
    def steps(self) -> int:
        """Steps of the whole run, T."""
        return self.epochs * self.batches

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of step t, counted from 0."""
        if self.schedule == "constant":
            return self.learning_rate
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * step / self.steps))

    def kl_weight_at(self, step: int) -> float:
        """Return the KL weight of step t, counted from 0."""
        return 1.0 if step >= self.warmup else step / self.warmup

    def counts(self, epoch: int) -> bool:
        """Say whether the warm-up ends within this epoch or earlier (epochs from 1); only such an epoch can be the best."""
        return epoch * self.batches > self.warmup

    def __str__(self) -> str:
        """Return the plan as a sentence."""
        rest = self.size % self.batch_size
        batches = f"{self.batches} batch{'es' if self.batches > 1 else ''} of {self.batch_size}"
        batches += f", the last of {rest}" if rest else ""
        parts = [f"{self.steps} steps ({self.epochs} epoch{'s' if self.epochs > 1 else ''} x {batches})"]
        change = "cosine to 0" if self.schedule == "cosine" else "constant"
        parts.append(f"learning rate {self.learning_rate:g}, {change}")
        kl = f"KL weight 0 -> 1 over {self.warmup} steps" if self.warmup else "KL weight 1"
        if self.warmup < self.asked_warmup:
            kl += f" (the {self.asked_warmup} steps asked for are clipped, so that the run ends at weight 1)"
        parts.append(kl)
        if self.patience is not None:
            epochs = f"{self.patience} epoch{'s' if self.patience > 1 else ''}"
            parts.append(f"stops after {epochs} without a better validation ELBO")
        return "; ".join(parts)


def plan(
    size: int,
    *,
    epochs: int = 100,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    schedule: Decay = "cosine",
    kl_warmup: int = 0,
    patience: int | None = None,
    **_: object,
) -> Schedule:
    """Plan a fit of `size` training data, with the options of `fit`; options without effect on the plan are ignored.

    The KL warm-up is clipped to end one epoch before the run does (in a run of one epoch: at its last step).

    Raises:
        DataError: there are no training data.
        SpecError: an option is out of range.
    """
    if size < 1:
        raise DataError("data: the training split is empty")
    for name, value, least in (("epochs", epochs, 1), ("batch_size", batch_size, 1), ("kl_warmup", kl_warmup, 0)):
        if value < least:
            raise SpecError(f"fit.{name}: must be at least {least}, got {value}")
    if not learning_rate > 0:
        raise SpecError(f"fit.learning_rate: must be greater than 0, got {learning_rate}")
    if patience is not None and patience < 1:
        raise SpecError(f"fit.patience: must be at least 1 epoch, or null, got {patience}")
    if schedule not in ("constant", "cosine"):
        raise SpecError(f"fit.schedule: must be constant or cosine, got {schedule!r}")
    batches = math.ceil(size / min(batch_size, size))
    asked = kl_warmup * batches
    longest = (epochs - 1) * batches if epochs > 1 else batches - 1
    return Schedule(
        size=size,
        epochs=epochs,
        batch_size=min(batch_size, size),
        learning_rate=learning_rate,
        schedule=schedule,
        warmup=min(asked, longest),
        asked_warmup=asked,
        patience=patience,
    )


CHECKPOINT, WEIGHTS, HISTORY, EFFECT = "checkpoint.pt", "weights.pt", "history.csv", "precision.json"


@dataclass(frozen=True)
class Session:
    """Facts about one run of a fit that the caller supplies; they are not options of the fit.

    Attributes:
        folder: where `checkpoint.pt`, `weights.pt` and `history.csv` go; None writes no files.
        resume: continue from the folder's checkpoint, if there is one.
        seed: of all random numbers. The caller's generators are restored.
        fingerprint: text that distinguishes runs beyond data, options, seed and module, such as a hash of the spec. A
            checkpoint with another fingerprint is refused.
        report: called as report(plan, row) after each epoch, once its files are written.
        checkpoint_seconds: least time between checkpoints; one is always written after the first epoch and at the end.
        start: weights that the fit starts at, and whether the model is trained further; None starts at the VAE's own.
    """

    folder: Path | None = None
    resume: bool = False
    seed: int = 0
    fingerprint: str = ""
    report: Callable[[Schedule, Row], None] | None = None
    checkpoint_seconds: float = 10.0
    start: Start | None = None


def resolve_device(device: str) -> torch.device:
    """Turn `auto`, `cpu`, `cuda` or `cuda:1` into a device that exists.

    Raises:
        SpecError: there is no such device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
    except RuntimeError:
        place = torch.device("meta")
    if place.type not in ("cpu", "cuda"):
        raise SpecError(f"fit.device: must be auto, cpu, cuda or cuda:NUMBER, got {device!r}")
    if place.type == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (place.index or 0) >= count:
        raise SpecError(f"fit.device: {device!r} was asked for, but torch sees {count} CUDA devices; use auto or cpu")
    return torch.device("cuda", torch.cuda.current_device() if place.index is None else place.index)
