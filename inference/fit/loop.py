"""The loop of a fit: epochs, validation, best weights, checkpoints, and the error for a loss that is not finite."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import pyro
import torch
from torch import Tensor

from elbowroom.errors import NonFiniteLoss, SpecError, first_line
from elbowroom.inference.fit.checkpoint import identity, load, save
from elbowroom.inference.fit.mixed_precision import effect, lowered
from elbowroom.inference.fit.plan import CHECKPOINT, EFFECT, HISTORY, WEIGHTS, Schedule, Session
from elbowroom.inference.fit.record import History, Row
from elbowroom.inference.fit.rows import Rows
from elbowroom.inference.fit.step import Step
from elbowroom.inference.objectives.elbo import ELBO, NonFiniteSite
from elbowroom.inference.program.frozen.promotion import mixed
from elbowroom.inference.randomness import contained, mode
from elbowroom.models.vae import VAE, Batch
from elbowroom.system.files import write_text
from elbowroom.system.memory import fitting

log = logging.getLogger("elbowroom")
# offsets that give independent streams of random numbers: shuffling, validation, binarization, effect of rounding
_SHUFFLE, _VALIDATION, _REDRAW, _EFFECT = 0x5F3759DF, 0x2545F491, 0x1B873593, 0x27D4EB2F


def batches(size: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield a random permutation of 0 .. size - 1 in parts of `batch_size`; the last part may be smaller."""
    yield from torch.randperm(size, generator=generator, device=generator.device).split(batch_size)


def shuffler(seed: int, device: torch.device) -> torch.Generator:
    """Return the generator that shuffles the data of a fit with this seed."""
    return torch.Generator(device).manual_seed(seed + _SHUFFLE)


def evaluate_elbo(vae: VAE, x: Tensor | Rows, *, draws: int = 8, seed: int = 0, rows: int = 2048) -> float:
    """Estimate the mean ELBO of data (N, *event), in nats per datum, without changing any state.

    (1/N) sum_n (1/S) sum_s log p(x_n, z_ns) - log q(z_ns|x_n), z_ns ~ q(z|x_n), S = `draws`, without KL weight, networks in
    eval mode. The same seed gives the same standard noise, so the values of two sets of weights differ because of the weights
    alone. `rows` limits draws times data in one pass.

    Raises:
        NonFiniteSite: a log probability is not finite.
    """
    objective = ELBO()
    total, data = 0.0, Rows.of(x)
    with contained(seed, data.device), mode(vae, training=False), torch.no_grad():
        for part in data.split(fitting(draws, rows)):
            # the batch is repeated along the plate, so any network that takes a batch works
            repeated: dict[str, Any] = {name: value.repeat(draws, *[1] * (value.ndim - 1)) for name, value in part.items()}
            total += float(objective(vae.model, vae.guide, **repeated).elbo) / draws
    return total / len(data)


@dataclass(frozen=True, eq=False)
class Turn:
    """The inputs of one training step.

    Attributes:
        step: its number in the fit, counted from 0.
        index: positions of its training rows, (B,).
        rate: learning rate.
        weight: KL weight.
    """

    step: int
    index: Tensor
    rate: float
    weight: float


class Loop:
    """A running fit: the state that the next epoch needs, and the files that store it."""

    def __init__(
        self,
        vae: VAE,
        train: Rows,
        validation: Rows,
        session: Session,
        planned: Schedule,
        step: Step,
        options: dict[str, Any],
    ) -> None:
        self.vae, self.train, self.validation = vae, train, validation
        self.session, self.plan, self.step, self.options = session, planned, step, options
        self.generator = shuffler(session.seed, train.device)
        self.redraw = torch.Generator(train.device).manual_seed(session.seed + _REDRAW)
        self.history = History(plan=str(planned))
        self.best: dict[str, Tensor] | None = None
        self.saved_epoch: int | None = None
        self.saved_at = -math.inf
        self.started = time.perf_counter()
        self.identity: dict[str, str] = {}
        if session.folder is not None:
            data = (train, validation)
            self.identity = identity(vae, data, options=options, seed=session.seed, spec=session.fingerprint)

    def train_epochs(self) -> None:
        """Run epochs until all are done or the patience is exhausted."""
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
        for turn in turns:
            losses = self._take(turn)
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
        """Return the mini-batch of a step and the training row of each entry; -1 marks an entry drawn from the model."""
        seen = self.train.batch(turn.index, self.redraw)
        if self.session.start is None:
            return seen, turn.index
        seen, drawn = self.session.start.mixed(self.vae, seen)
        return seen, torch.where(drawn, -1, turn.index)

    def _take(self, turn: Turn) -> tuple[float, float]:
        index = turn.index
        try:
            seen, index = self._batch(turn)
            return self.step(**seen, kl_weight=turn.weight, learning_rate=turn.rate)
        except NonFiniteSite as error:
            epoch, batch = divmod(turn.step, self.plan.batches)
            raise self._stop(error, f"epoch {epoch + 1}, batch {batch + 1} of {self.plan.batches}", index) from None

    def _validate(self) -> float:
        """Return the validation ELBO, with the same noise every time; NaN without validation data."""
        if len(self.validation) == 0:
            return math.nan
        draws, seed = int(self.options["validation_draws"]), self.session.seed + _VALIDATION
        return evaluate_elbo(self.vae, self.validation, draws=draws, seed=seed)

    def _judge(self, row: Row) -> None:
        """Keep the weights if they are the best so far; decide whether to stop, and record why."""
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
        """Load the best weights into the VAE, write them, and return the history."""
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
        """Run both programs once with Pyro's checks on, to find wrong shapes and undeclared plates before step 1."""
        two: dict[str, Any] = dict(self.train.first(2))
        with contained(self.session.seed, self.train.device), mode(self.vae, training=False), torch.no_grad():
            try:
                self.step.objective(self.vae.model, self.vae.guide, **two, size=len(self.train))
            except NonFiniteSite:
                return  # Pyro would only report an invalid value; the loop names site and batch
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

    def _bad_parameters(self) -> list[str]:
        return [name for name, value in self.vae.named_parameters() if not bool(value.isfinite().all())]

    def _stop(
        self, error: NonFiniteSite | None, where: str, index: Tensor | None, bad: list[str] | None = None
    ) -> NonFiniteLoss:
        """Return the error that names the site, the place, the parameters that are not finite, and the last good checkpoint."""
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

    def _save(self) -> None:
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
        """Continue from the folder's checkpoint, if there is one."""
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
