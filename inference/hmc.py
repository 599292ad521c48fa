r"""Batched Hamiltonian Monte Carlo: thousands of small posteriors at once, each certified or openly not.

1. Every datum has its own chains, half of them started from the refitted q*, half from the ends of the mode search's annealed
   runs from the prior; its own metric (dense, from q*, re-estimated from its own draws), its own step size (dual averaging,
   then frozen), its own accept/reject.
2. Trajectories of length (pi / 2) U(0.7, 1.3) in whitened coordinates, which leave a normal posterior nearly independent of its
   last state. Data are run in buckets of similar step size, so that one number of leapfrogs fits all of them.
3. Chains run on until the datum's certificate holds or the budget ends. What is left over, stuck or multimodal, goes to
   parallel tempering.

The certificate, all of: rank-normalised split R-hat < 1.01; bulk ESS >= 1,000 and tail ESS >= 400; no divergence; E-BFMI > 0.3;
chains from q* and from the prior agree within 4.5 standard errors; no mode found by the annealed runs is unseen.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, MultipleOf
from torch import Tensor

from elbowroom.inference.certificate import Certificate, Chains, certify
from elbowroom.inference.modes import Metric, Modes
from elbowroom.inference.posterior import Posterior, Reference, Status, concatenate
from elbowroom.inference.sampler import Sampler
from elbowroom.inference.scout import Scout, scout
from elbowroom.inference.target import LogJoint
from elbowroom.inference.tempering import Tempering

ENTRIES = 2**24  # chains x draws x data x d held at once
HALVINGS = 5  # of the step sizes of a datum with divergent trajectories
CONFIRM = 60  # further trajectories of runs that look like an unseen mode
BLOCK_STEP = 15_485_863  # between the seeds of blocks of data


class HMC(Reference):
    """Batched Hamiltonian Monte Carlo, any number of latents; certified datum by datum.

    Args:
        chains: chains per datum, half from the refitted q*, half from annealed draws of the prior.
        draws: draws per chain in the first round; each further round doubles them.
        max_draws: draws per chain at which a datum that is not certified is given to parallel tempering.
        tempering: whether data that are still not certified are tried by parallel tempering.
    """

    name: ClassVar[str] = "hmc"

    def __init__(
        self,
        *,
        chains: Annotated[int, Ge(4), MultipleOf(2)] = 8,
        draws: Annotated[int, Ge(100)] = 250,
        max_draws: Annotated[int, Ge(100)] = 2000,
        tempering: bool = True,
    ) -> None:
        self.chains = chains
        self.draws = draws
        self.max_draws = max_draws
        self.tempering = tempering

    def refusal(self, log_joint: LogJoint) -> str | None:
        """Without a continuous latent there is nothing to move."""
        return "hmc needs a continuous latent, this model has none" if log_joint.dim == 0 else None

    def __call__(self, log_joint: LogJoint, *, keep: int, seed: int, until: float = math.inf) -> Posterior:
        """Run every datum's chains until it is certified, tempering the rest; returns draws, moments and certificates."""
        size = max(1, ENTRIES // (self.chains * self.draws * log_joint.dim))
        parts = log_joint.blocks(size)
        return concatenate([self._block(part, keep, seed + BLOCK_STEP * k, until) for k, part in enumerate(parts)])

    def _block(self, log_joint: LogJoint, keep: int, seed: int, until: float) -> Posterior:
        generator = torch.Generator(device=log_joint.device).manual_seed(seed)
        known = scout(log_joint)
        sampler = Sampler.warmed_up(log_joint, known, self.chains, generator)
        found = Found(log_joint, self.name, self.chains, min(keep // self.chains, self.draws))
        everyone = torch.arange(log_joint.n_obs, device=log_joint.device)
        groups, left = [_Group(everyone, sampler)], []
        while groups:
            group = groups.pop()
            group.run(self.draws)
            assert group.chains is not None
            certificate = self._certify(group.chains, known.modes.rows(group.rows), group.sampler)
            late = time.monotonic() > until
            full = 2 * group.chains.length > self.max_draws
            again = (certificate.diverging_count > 0) & (group.halvings < HALVINGS) & (not late)
            closed = (certificate.holds | certificate.stuck | full | late) & ~again
            going = ~closed & ~again
            parts = [group.part(mask) for mask in (going, again)]
            if None in parts:  # the arguments cannot be taken apart: all go on together, until none is open
                together = group.halved() if bool(again.any()) else group
                closed = torch.full_like(closed, full or late) & ~again.any()
                parts = [] if bool(closed.all()) else [together]
            groups += [g.halved() if k else g for k, g in enumerate(parts) if g is not None and len(g.rows)]
            index = closed.nonzero()[:, 0]
            found.take(group.rows[index], group.chains.rows(index), certificate.rows(index), "the budget ended" if late else "")
            left.append(group.rows[index][~certificate.holds[index]])
        if self.tempering and time.monotonic() < until:
            self._temper(log_joint, torch.cat(left), known, found, generator, seed, until)
        return found.posterior()

    @staticmethod
    def _certify(chains: Chains, modes: Modes, sampler: Sampler) -> Certificate:
        """Judge the chains; where a run looks like an unseen mode, let it go on before it is believed."""
        certificate = certify(chains, modes)
        rows = certificate.unseen.nonzero()[:, 0]
        some = sampler.log_joint.subset(rows) if len(rows) else None
        if some is None:
            return certificate
        longer = modes.rows(rows).longer(some, sampler.root[rows], sampler.step[rows], CONFIRM, sampler.generator)
        return certificate.amended(rows, longer.unseen_by(chains.draws[:, :, rows], chains.lp[:, :, rows]))

    def _temper(
        self, log_joint: LogJoint, rows: Tensor, known: Scout, found: Found, generator: torch.Generator, seed: int, until: float
    ) -> None:
        """Try the data that are left by parallel tempering, and take what it certifies."""
        if not len(rows):
            return
        part = log_joint if len(rows) == log_joint.n_obs else log_joint.subset(rows)
        if part is None:
            part, rows = log_joint, torch.arange(log_joint.n_obs, device=log_joint.device)
        modes = known.modes.rows(rows)
        q = known.refit.q.rows(rows)
        for halving in range(HALVINGS):
            if not len(rows) or time.monotonic() > until:
                return
            modes = known.modes.rows(rows)
            metric = Metric.of(part, q, seed + 2)
            ensembles = Tempering(part, modes, metric, self.chains, generator, seed + 3 + halving, 0.5**halving)
            so_far = None
            while True:
                new = ensembles.run(self.draws if so_far is None else so_far.length, until)
                so_far = new if so_far is None else so_far.then(new)
                certificate = certify(so_far, modes)
                again = certificate.diverging_count > 0
                late = time.monotonic() > until
                if late or bool((certificate.holds | again).all()) or 2 * so_far.length > self.max_draws:
                    break
            index = certificate.holds.nonzero()[:, 0]
            found.take(rows[index], so_far.rows(index), certificate.rows(index), "", "tempered")
            smaller = part.subset(again.nonzero()[:, 0]) if bool(again.any()) else None
            if smaller is None:
                return
            rows, part, q = rows[again], smaller, q.rows(again)


@dataclass
class _Group:
    """Data whose chains are equally long: their sampler, and what it has drawn since step sizes were last changed."""

    rows: Tensor
    sampler: Sampler
    chains: Chains | None = None
    halvings: int = 0

    def run(self, length: int) -> None:
        """Double the draws, or make the first `length`."""
        new = self.sampler.run(length if self.chains is None else self.chains.length)
        self.chains = new if self.chains is None else self.chains.then(new)

    def part(self, mask: Tensor) -> _Group | None:
        """Return the data where `mask`; None where the arguments cannot be taken apart."""
        index = mask.nonzero()[:, 0]
        if not len(index) or len(index) == len(mask):
            chains = self.chains if len(index) else None
            return _Group(self.rows[index], self.sampler, chains, self.halvings)
        smaller = self.sampler.log_joint.subset(index)
        if smaller is None or self.chains is None:
            return None
        return _Group(self.rows[index], self.sampler.rows(smaller, index), self.chains.rows(index), self.halvings)

    def halved(self) -> _Group:
        """Return the same with half the step sizes and nothing drawn: what divergent trajectories left out is biased."""
        return _Group(self.rows, replace(self.sampler, step=self.sampler.step / 2), None, self.halvings + 1)


class Found:
    """What was found of each datum so far, thinned to the draws that are kept.

    Args:
        log_joint: the model and guide.
        method: name of the method.
        chains: chains per datum.
        keep: draws kept per chain.
    """

    def __init__(self, log_joint: LogJoint, method: str, chains: int, keep: int) -> None:
        n, d = log_joint.n_obs, log_joint.dim
        new = lambda *shape: torch.full(shape, torch.nan, dtype=torch.float64, device=log_joint.device)
        self.log_joint, self.method, self.keep = log_joint, method, keep
        self.draws, self.mean, self.covariance = new(chains, keep, n, d), new(n, d), new(n, d, d)
        self.sample_stats = {name: new(chains, keep, n) for name in ("lp", "acceptance_rate", "diverging")}
        self.stats: dict[str, Tensor] = {}
        self.status: list[Status] = ["uncertified"] * n
        self.reason = [""] * n

    def take(self, rows: Tensor, chains: Chains, certificate: Certificate, note: str, way: str = "") -> None:
        """Take the draws and certificates of some of the data."""
        if not len(rows):
            return
        kept = torch.linspace(0, chains.length - 1, self.keep, device=rows.device).round().long()
        self.draws[:, :, rows] = chains.draws[:, kept].double()
        self.mean[rows], self.covariance[rows] = (moment.double() for moment in chains.moments())
        columns = {"lp": chains.lp, "acceptance_rate": chains.accept, "diverging": chains.divergent.double()}
        for name, values in columns.items():
            self.sample_stats[name][:, :, rows] = values[:, kept].double()
        for name, values in certificate.stats().items():
            self.stats.setdefault(name, torch.full_like(self.mean[:, 0], torch.nan))[rows] = values
        status, reason = certificate.words(f"{self.method}, {way}" if way else self.method)
        for row, s, r in zip(rows.tolist(), status, reason, strict=True):
            self.status[row], self.reason[row] = s, f"{r}; {note}" if note and s == "uncertified" else r

    def posterior(self) -> Posterior:
        """Return everything as a posterior."""
        flat = self.log_joint.constrain(self.draws.flatten(0, 1))
        sites = {name: value.unflatten(0, self.draws.shape[:2]) for name, value in flat.items()}
        return Posterior(
            method=self.method,
            draws=self.draws,
            sites=sites,
            status=self.status,
            reason=self.reason,
            mean=self.mean,
            covariance=self.covariance,
            stats=self.stats,
            sample_stats=self.sample_stats,
        )
