"""The fit of a VAE by stochastic variational inference: an objective, one fused Adam, best weights by validation.

Each step maximises the objective of `elbowroom.inference.objectives.elbo` on a mini-batch whose plate stands for all N data,
so that every gradient estimates that of the objective of the whole data set (Kingma and Welling 2014,
https://arxiv.org/abs/1312.6114; Hoffman et al. 2013, https://arxiv.org/abs/1206.7055). A step is what `pyro.infer.SVI`
with `pyro.optim.Adam` does, with one optimiser over all parameters in place of one for each.

Everything reported is in nats per datum: a `loss` is lower-better, an `elbo` is higher-better.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pyro
import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from elbowroom.errors import NonFiniteLoss, SpecError, first_line
from elbowroom.inference.checkpoint import identity, load, save
from elbowroom.inference.compiled.graph import Compile
from elbowroom.inference.fit.mixed_precision import Precision, check, effect, lowered
from elbowroom.inference.fit.plan import Plan, Schedule, plan
from elbowroom.inference.fit.record import History, Row
from elbowroom.inference.fit.rows import Batch, Rows
from elbowroom.inference.fit.step import Step
from elbowroom.inference.fit.step_graph import generators
from elbowroom.inference.fit.warm_start import Start
from elbowroom.inference.objectives.elbo import ELBO, NonFiniteSite, Objective
from elbowroom.inference.program.promotion import mixed
from elbowroom.inference.randomness import contained, mode
from elbowroom.inference.window import Turn, Window
from elbowroom.models.vae import VAE
from elbowroom.system.files import write_text

CHECKPOINT, WEIGHTS, HISTORY, EFFECT = "checkpoint.pt", "weights.pt", "history.csv", "precision.json"

log = logging.getLogger("elbowroom")

# five streams of random numbers from one seed: noise and initial state, shuffling, validation, binarization, effect of rounding
_SHUFFLE, _VALIDATION, _REDRAW, _EFFECT = 0x5F3759DF, 0x2545F491, 0x1B873593, 0x27D4EB2F


@dataclass(frozen=True)
class Session:
    """The circumstances of a fit: facts that the caller supplies and that are not options of the fit.

    Attributes:
        folder: where `checkpoint.pt`, `weights.pt` and `history.csv` go; None writes no files.
        resume: go on from the folder's checkpoint, if it has one.
        seed: of all random numbers. The caller's generators are left as they were.
        fingerprint: anything that tells runs apart beyond what `fit` sees itself (data, options, seed, module), such
            as a hash of the spec. A checkpoint with another fingerprint is refused.
        report: called as report(plan, row) after each epoch, when its files are written.
        checkpoint_seconds: least time between checkpoints; one is written after the first epoch and at the end anyway.
        start: weights that the fit starts at, and whether the model is trained further; None starts at the VAE's own.
    """

    folder: Path | None = None
    resume: bool = False
    seed: int = 0
    fingerprint: str = ""
    report: Callable[[Plan, Row], None] | None = None
    checkpoint_seconds: float = 10.0
    start: Start | None = None


def batches(size: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Shuffle 0 .. size - 1 with `generator` and yield it in parts of `batch_size`, the last one perhaps smaller."""
    yield from torch.randperm(size, generator=generator, device=generator.device).split(batch_size)


def shuffler(seed: int, device: torch.device) -> torch.Generator:
    """Return the generator that shuffles the data of a fit with this seed."""
    return torch.Generator(device).manual_seed(seed + _SHUFFLE)


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


def evaluate_elbo(vae: VAE, x: Tensor | Rows, *, draws: int = 8, seed: int = 0, rows: int = 2048) -> float:
    """Estimate the mean ELBO of data, in nats per datum, without changing anything.

    (1/N) sum_n (1/S) sum_s log p(x_n, z_ns) - log q(z_ns|x_n), z_ns ~ q(z|x_n), unweighted, networks in eval mode. The
    same seed gives the same standard noise, so that the values of two sets of weights differ by the weights alone.

    Args:
        vae: on the device and in the dtype of x.
        x: data, (N, *event), perhaps with covariates and exposure beside them (`Rows`).
        draws: S.
        seed: of the noise; the caller's generators are left as they were.
        rows: draws times data in one pass.

    Raises:
        NonFiniteSite: a log probability is not finite.
    """
    objective = ELBO()
    total, data = 0.0, Rows.of(x)
    with contained(seed, data.device), mode(vae, training=False), torch.no_grad():
        for part in data.split(max(1, rows // draws)):
            # the draws stand beside each other in the plate, so any network that takes a batch will do
            repeated: dict[str, Any] = {name: value.repeat(draws, *[1] * (value.ndim - 1)) for name, value in part.items()}
            total += float(objective(vae.model, vae.guide, **repeated).elbo) / draws
    return total / len(data)


def fit(
    vae: VAE,
    train: Tensor | Rows,
    validation: Tensor | Rows,
    session: Session | None = None,
    *,
    objective: Objective | None = None,
    epochs: Annotated[int, Ge(1)] = 100,
    batch_size: Annotated[int, Ge(1)] = 128,
    learning_rate: Annotated[float, Gt(0)] = 1e-3,
    schedule: Schedule = "cosine",
    kl_warmup: Annotated[int, Ge(0)] = 0,
    patience: Annotated[int, Ge(1)] | None = None,
    gradient_clip: Annotated[float, Gt(0)] | None = None,
    validation_draws: Annotated[int, Ge(1), Le(10_000)] = 8,
    dtype: Literal["float32", "float64"] = "float32",
    device: str = "auto",
    compile: Compile = "auto",
    precision: Precision = "highest",
) -> History:
    """Fit a VAE by stochastic variational inference and leave it with its best weights.

    The best weights are those of the epoch with the highest validation ELBO among the epochs that end at KL weight 1;
    without validation data, the last ones. The VAE is adapted to the training data (`vae.adapt`), moved to the device
    and dtype, and stays there. With a folder in the session, `weights.pt` (the best weights), `history.csv` and
    `checkpoint.pt` are written (and `precision.json`, the effect of rounding), each as a whole or not at all. On a CPU a
    resumed fit equals an uninterrupted one bit for bit. Pyro's parameter store and validation, torch's generators and its
    precision are left as they were.

    Args:
        vae: the model and guide, trained in place.
        train: training data, (N, *event), in memory or read as they are needed; the result is the same.
        validation: validation data, (M, *event); M = 0 is allowed.
        session: folder, seed, resumption and report (facts of the run).
        objective: what is maximised; the ELBO by default. The best weights are chosen by the plain ELBO whatever it is.
        epochs: passes over the training data.
        batch_size: data per step; the last batch of an epoch may be smaller.
        learning_rate: Adam's, at the first step.
        schedule: `constant`, or `cosine` down to 0 at the last step.
        kl_warmup: epochs over which the weight of the KL part rises from 0 to 1; 0 switches it off.
        patience: epochs without a better validation ELBO after which the fit stops; null never stops early.
        gradient_clip: largest norm of the gradient of the loss per datum; null clips nothing.
        validation_draws: draws of z per validation datum, with the same noise in every epoch.
        dtype: precision of weights and data.
        device: `auto` (the GPU where there is one), `cpu`, `cuda` or `cuda:1`.
        compile: make the training step one compiled graph: `auto` where the planned steps repay it, `always` wherever it can
            be done, `never`. The draws are the same, the numbers agree to rounding.
        precision: of matrix products in training steps: `highest`; `tf32` rounds their factors on a GPU; `bf16` computes
            encoder and decoder in bfloat16. Validation is in full precision, and the effect on the ELBO is stated.

    Returns:
        The history: one row per epoch, the best epoch, and why the fit stopped.

    Raises:
        NonFiniteLoss: a loss was not finite; names site, epoch, batch and the last good checkpoint.
        RunFolderError: the checkpoint to resume from is unreadable or belongs to another fit.
        SpecError: the device does not exist, or an option does not apply.
        DataError: there are no training data.
    """
    session, objective = session or Session(), objective or ELBO()
    options: dict[str, Any] = {
        "objective": repr(objective),
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "schedule": schedule,
        "kl_warmup": kl_warmup,
        "patience": patience,
        "gradient_clip": gradient_clip,
        "validation_draws": validation_draws,
        "dtype": dtype,
        "device": resolve_device(device).type,
        "compile": compile,
        "precision": precision,
    }
    planned = plan(len(train), **options)
    if patience is not None and len(validation) == 0:
        raise SpecError("fit.patience: needs validation data to judge by; set it to null or make a validation split")
    place, kind = resolve_device(device), getattr(torch, dtype)
    check(precision, dtype, place)
    train, validation = Rows.of(train).to(place, kind), Rows.of(validation).to(place, kind)
    vae.to(place, kind)
    vae.adapt(**train.sample())
    start = session.start
    if start is not None:
        options["start"] = f"{start.sha256}, freeze {start.freeze}, simulated {start.simulated:g}"
        start.apply(vae)
    frozen: AbstractContextManager[None] = nullcontext() if start is None else start.frozen(vae)
    with contained(session.seed, place), mode(vae, training=True), frozen:
        step = Step(
            vae,
            size=len(train),
            learning_rate=learning_rate,
            gradient_clip=gradient_clip,
            objective=objective,
            compile=compile,
            steps=planned.steps,
            precision=precision,
        )
        run = _Run(vae, train, validation, session, planned, step, options)
        if session.resume:
            run.resume()
        run.train_epochs()
        return run.finish()


class _Run:
    """A fit on its way: what the next epoch needs, and the files that keep it."""

    def __init__(
        self,
        vae: VAE,
        train: Rows,
        validation: Rows,
        session: Session,
        planned: Plan,
        step: Step,
        options: dict[str, Any],
    ) -> None:
        self.vae, self.train, self.validation = vae, train, validation
        self.session, self.plan, self.step, self.options = session, planned, step, options
        self.generator = shuffler(session.seed, train.device)
        self.redraw = torch.Generator(train.device).manual_seed(session.seed + _REDRAW)
        self.window = Window(step, [*generators(train.device), self.redraw])
        self.history = History(plan=str(planned))
        self.best: dict[str, Tensor] | None = None
        self.saved_epoch: int | None = None
        self.saved_at = -math.inf
        self.started = time.perf_counter()
        self.identity: dict[str, str] = {}
        if session.folder is not None:
            data = (train, validation)
            self.identity = identity(vae, data, options=options, seed=session.seed, spec=session.fingerprint)

    # the loop

    def train_epochs(self) -> None:
        """Run epochs until the plan or the patience is at its end."""
        if not self.history.rows:
            self._rehearse()
        if not self.history.stopped_because:
            self.step.prepare(self.train.example(self.plan.batch_size))
        while not self.history.stopped_because:
            epoch = len(self.history.rows) + 1
            row = self._epoch(epoch)
            self.history.rows.append(row)
            self._judge(row)
            due = time.perf_counter() - self.saved_at >= self.session.checkpoint_seconds
            if due or self.history.stopped_because:
                self._save()
            if self.session.report is not None:
                self.session.report(self.plan, row)

    def _epoch(self, epoch: int) -> Row:
        """Take the steps of one epoch, then evaluate."""
        loss = elbo = 0.0
        first = (epoch - 1) * self.plan.batches
        turns = [
            Turn(step, index, self.plan.learning_rate_at(step), self.plan.kl_weight_at(step))
            for step, index in enumerate(batches(len(self.train), self.plan.batch_size, self.generator), start=first)
        ]
        for turn, losses in self.window(turns, lambda turn: self._batch(turn)[0], self._take):
            share = len(turn.index) / len(self.train)
            loss, elbo = loss + share * losses[0], elbo + share * losses[1]
        try:
            validation = self._validate()
        except NonFiniteSite as error:
            raise self._stop(error, f"the validation after epoch {epoch}", None) from None
        if bad := self._bad_parameters():
            last = f"epoch {epoch}, batch {self.plan.batches} of {self.plan.batches}"
            raise self._stop(None, last, None, bad)
        seconds = time.perf_counter() - self.started
        last_turn = turns[-1]
        return Row(epoch, last_turn.step + 1, last_turn.rate, last_turn.weight, loss, elbo, validation, seconds)

    def _batch(self, turn: Turn) -> tuple[Batch, Tensor]:
        """Return the mini-batch of a step, and which training row each of it is, -1 for what is drawn from the model."""
        seen = self.train.batch(turn.index, self.redraw)
        if self.session.start is None:
            return seen, turn.index
        seen, drawn = self.session.start.mixed(self.vae, seen)
        return seen, torch.where(drawn, -1, turn.index)

    def _take(self, turn: Turn) -> tuple[float, float]:
        """Take one step and look at it."""
        index = turn.index
        try:
            seen, index = self._batch(turn)
            return self.step(**seen, kl_weight=turn.weight, learning_rate=turn.rate)
        except NonFiniteSite as error:
            epoch, batch = divmod(turn.step, self.plan.batches)
            raise self._stop(error, f"epoch {epoch + 1}, batch {batch + 1} of {self.plan.batches}", index) from None

    def _validate(self) -> float:
        """Return the validation ELBO, the same noise every time; NaN without validation data."""
        if len(self.validation) == 0:
            return math.nan
        draws, seed = int(self.options["validation_draws"]), self.session.seed + _VALIDATION
        return evaluate_elbo(self.vae, self.validation, draws=draws, seed=seed)

    def _judge(self, row: Row) -> None:
        """Keep the weights if they are the best so far; decide whether to stop, and say why."""
        history, patience = self.history, self.plan.patience
        judged = len(self.validation) > 0
        if self.plan.counts(row.epoch) and (
            not judged or not history.best_epoch or row.validation_elbo > history.best.validation_elbo
        ):
            history.best_epoch = row.epoch
            if judged:
                self.best = {name: value.detach().clone() for name, value in self.vae.state_dict().items()}
        if row.epoch == self.plan.epochs:
            history.stopped_because = f"all {row.epoch} epochs done"
        elif patience is not None and history.best_epoch and row.epoch - history.best_epoch >= patience:
            history.stopped_because = f"stopped after epoch {row.epoch}: no better validation ELBO in {patience} epochs"
        if history.stopped_because and judged:
            best = history.best
            history.stopped_because += (
                f"; kept the weights of epoch {best.epoch}, validation ELBO {best.validation_elbo:.3f} nats per datum"
            )
        elif history.stopped_because:
            history.stopped_because += "; kept the last weights, for there are no validation data"

    def finish(self) -> History:
        """Give the VAE its best weights, write them, and return the history."""
        if self.best is not None:
            self.vae.load_state_dict(self.best)
        folder = self.session.folder
        self.history.effect = found = effect(self.vae, self.train, self.step.precision, self.session.seed + _EFFECT)
        if found is not None:
            log.info(f"fit: {found}")
            if folder is not None:
                write_text(folder / EFFECT, json.dumps(asdict(found) | {"difference": found.difference}, indent=2) + "\n")
        if folder is not None:
            weights = {name: value.detach().cpu() for name, value in self.vae.state_dict().items()}
            save(folder / WEIGHTS, weights)
            self.history.write(folder / HISTORY)
        return self.history

    def _rehearse(self) -> None:
        """Run both programs once with Pyro's checks on: wrong shapes and undeclared plates are found before step 1."""
        two: dict[str, Any] = dict(self.train.first(2))
        with contained(self.session.seed, self.train.device), mode(self.vae, training=False), torch.no_grad():
            try:
                self.step.objective(self.vae.model, self.vae.guide, **two, size=len(self.train))
            except NonFiniteSite:
                return  # Pyro's checks would call it an invalid value; the loop names site and batch
            except RuntimeError as error:
                if not mixed(error):
                    raise
                own = next(self.vae.parameters()).dtype
                raise SpecError(
                    f"fit.dtype: a component computes with tensors of its own in another precision than {own} "
                    f"({str(error).splitlines()[0]}); make them parameters or buffers (register_buffer)"
                ) from error
            with pyro.validation_enabled(True):
                self.step.objective(self.vae.model, self.vae.guide, **two, size=len(self.train))
            self._rehearse_lowered(two)

    def _rehearse_lowered(self, two: Batch) -> None:
        """Run both programs once in the precision of the steps."""
        if (precision := self.step.precision) == "highest":
            return
        try:
            with lowered(self.vae, precision):
                self.step.objective(self.vae.model, self.vae.guide, **two, size=len(self.train))
        except NonFiniteSite:
            return  # the loop names site and batch
        except RuntimeError as error:
            raise SpecError(
                f"fit.precision: a network does not run with {precision} ({first_line(error)}); use highest"
            ) from error

    # what went wrong

    def _bad_parameters(self) -> list[str]:
        return [name for name, value in self.vae.named_parameters() if not bool(value.isfinite().all())]

    def _stop(
        self, error: NonFiniteSite | None, where: str, index: Tensor | None, bad: list[str] | None = None
    ) -> NonFiniteLoss:
        """Return the error that names site, place, culprits and the last good checkpoint."""
        parts = [f"fit: the weights are not finite after {where}"]
        if error is not None:
            parts = [f"fit: the loss is not finite in {where}: {error.sentence()}"]
            if index is not None and error.rows and int(index[error.rows[0]]) >= 0:
                parts[0] += f" (training row {int(index[error.rows[0]])}, counted from 0)"
        bad = self._bad_parameters() if bad is None else bad
        if bad:
            parts.append(f"not finite: parameter {bad[0]}" + (f" and {len(bad) - 1} more" if len(bad) > 1 else ""))
        if self.saved_epoch is None or self.session.folder is None:
            parts.append("no checkpoint was written yet")
        else:
            parts.append(f"last good checkpoint: {self.session.folder / CHECKPOINT} (epoch {self.saved_epoch})")
        parts.append("lower fit.learning_rate, set fit.gradient_clip, or use fit.dtype = float64")
        return NonFiniteLoss("; ".join(parts))

    # the checkpoint

    def _save(self) -> None:
        """Write history and checkpoint."""
        folder, place = self.session.folder, self.train.device
        if folder is None:
            return
        state = {
            "identity": self.identity,
            "rows": [asdict(row) for row in self.history.rows],
            "best_epoch": self.history.best_epoch,
            "stopped_because": self.history.stopped_because,
            "model": self.vae.state_dict(),
            "optimizer": self.step.optimizer.state_dict(),
            "best": self.best,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(place) if place.type == "cuda" else None,
            "shuffle": self.generator.get_state(),
            "redraw": self.redraw.get_state(),
        }
        self.history.write(folder / HISTORY)
        save(folder / CHECKPOINT, state)
        self.saved_epoch, self.saved_at = len(self.history.rows), time.perf_counter()

    def resume(self) -> None:
        """Go on from the folder's checkpoint; start from the beginning where there is none."""
        if self.session.folder is None or not (self.session.folder / CHECKPOINT).exists():
            return
        path = self.session.folder / CHECKPOINT
        state = load(path, self.identity)
        self.vae.load_state_dict(state["model"])
        self.step.optimizer.load_state_dict(state["optimizer"])
        place = self.train.device
        if state["best"] is not None:
            self.best = {name: value.to(place) for name, value in state["best"].items()}
        self.history.rows = [Row(**row) for row in state["rows"]]
        self.history.best_epoch, self.history.stopped_because = state["best_epoch"], state["stopped_because"]
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], place)
        self.generator.set_state(state["shuffle"])
        self.redraw.set_state(state["redraw"])
        self.saved_epoch, self.saved_at = len(self.history.rows), time.perf_counter()
        self.started = time.perf_counter() - self.history.rows[-1].seconds
