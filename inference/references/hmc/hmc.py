"""Batched Hamiltonian Monte Carlo: thousands of small posteriors at once, each certified or marked as uncertified.

1. Every datum has its own chains, half of them started from the refitted q*, half from the ends of the mode search's annealed
   runs from the prior; its own metric (dense, from q*, re-estimated from its own draws), its own step size (dual averaging,
   then fixed), its own accept/reject.
2. Trajectories have length 1.1 (pi / 2) U(0.8, 1.2) in whitened coordinates: on a normal posterior successive states are
   slightly anti-correlated, which helps means more than it harms squares. Data are run in buckets of similar step size, so that
   one number of leapfrogs fits all of them.
3. Chains run until the datum's certificate holds (`certificate`) or the budget ends. Data that are stuck or multimodal go to
   parallel tempering.
"""

from __future__ import annotations

import math
import time
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, MultipleOf
from torch import Tensor

from elbowroom.inference.posterior import ROUNDED, Evidence, Posterior, Reference, Status, concatenate
from elbowroom.inference.references.hmc.bridge import Bridged, bridge
from elbowroom.inference.references.hmc.certificate import Certificate, certify
from elbowroom.inference.references.hmc.tempering import Tempering
from elbowroom.inference.references.hmc.warmup import warmed_up
from elbowroom.inference.search.modes import Modes
from elbowroom.inference.search.sampler import Chains, Sampler
from elbowroom.inference.search.scout import scout
from elbowroom.inference.search.single_precision import Precision, in_precision
from elbowroom.inference.search.unseen import unseen
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.system.memory import LARGE_ARRAY, fitting
from elbowroom.system.stages import stage

HALVINGS = 5  # at most, of the step size of a datum with divergent trajectories
DEAD = 1e-3  # acceptance of chains that do not move
BLOCK_STEP = 15_485_863  # between the seeds of blocks of data


class HMC(Reference):
    """Batched Hamiltonian Monte Carlo, any number of latents; certified datum by datum.

    Args:
        chains: chains per datum, half from the refitted q*, half from annealed draws of the prior.
        draws: draws per chain in the first round; each further round doubles them.
        max_draws: draws per chain at which a datum that is not certified is given to parallel tempering.
        tempering: whether data that are still not certified are tried by parallel tempering.
        precision: of the chains; auto takes single where its rounding of log p(x, z) stays below 1e-3 nats.
    """

    name: ClassVar[str] = "hmc"

    def __init__(
        self,
        *,
        chains: Annotated[int, Ge(4), MultipleOf(2)] = 8,
        draws: Annotated[int, Ge(100)] = 250,
        max_draws: Annotated[int, Ge(100)] = 4000,
        tempering: bool = True,
        precision: Precision = "auto",
    ) -> None:
        self.chains = chains
        self.draws = draws
        self.max_draws = max_draws
        self.tempering = tempering
        self.precision = precision

    def refusal(self, log_joint: LogJoint) -> str | None:
        """Refuse a model without continuous latents."""
        return "hmc needs a continuous latent, this model has none" if log_joint.dim == 0 else None

    def __call__(self, log_joint: LogJoint, *, keep: int, seed: int, until: float = math.inf) -> Posterior:
        """Run every datum's chains until it is certified, with tempering for the rest; return draws and certificates."""
        parts = enumerate(log_joint.blocks(fitting(self.chains * self.draws * log_joint.dim, LARGE_ARRAY)))
        return concatenate([self._block(log_joint.subset(rows), keep, seed + BLOCK_STEP * k, until) for k, rows in parts])

    def _block(self, log_joint: LogJoint, keep: int, seed: int, until: float) -> Posterior:
        generator, began = torch.Generator(device=log_joint.device).manual_seed(seed), time.monotonic()
        known = scout(log_joint)
        found = Found(log_joint, self.name, self.chains, min(keep // self.chains, self.draws))
        log_joint = in_precision(log_joint, known.refit.q, self.precision, generator)
        with stage("warm-up"):
            sampler = warmed_up(log_joint, known, self.chains, generator)
        everyone = torch.arange(log_joint.n_obs, device=log_joint.device)
        left = self._run(sampler, everyone, known.modes, found, until)
        if self.tempering and len(left) and time.monotonic() < until:
            # within a budget, a few hopeless data take no longer than all the others did
            until = until if math.isinf(until) else min(until, 2 * time.monotonic() - began)
            part, rows, _ = log_joint.some(left)
            modes = known.modes.rows(rows)
            with stage("tempering"):
                ensembles = Tempering(part, modes, known.refit.q.rows(rows), self.chains, generator, seed + 3)
                self._run(ensembles, rows, modes, found, until)
        found.withdraw(log_joint)
        return found.posterior()

    def _run(self, engine: Sampler | Tempering, names: Tensor, modes: Modes, found: Found, until: float) -> Tensor:
        """Run chains until each datum is certified, stuck, or out of budget; returns the data that are not certified.

        `names` holds the row in `found` of each datum of the engine; `found` takes the draws and certificates of finished data.
        """
        halvings = torch.zeros_like(names)
        # replicas that hop between modes mix slowly: R-hat and ESS need twice the draws
        first = 2 * self.draws if isinstance(engine, Tempering) else self.draws
        groups, left = [_Group(torch.arange(len(names), device=names.device))], []
        while groups:
            with stage("chains"):
                new = engine.run(torch.cat([group.rows for group in groups]), first)
            late = time.monotonic() > until
            offset, after, again = 0, [], []
            for group in groups:
                group.add(new, offset)
                offset += len(group.rows)
                if not late and not group.due(first):
                    after.append(group)
                    continue
                chains, certificate = self._judge(engine, group, modes)
                dead = chains.accept.double().mean((0, 1)) < DEAD  # no step size helps where the density is zero
                mend = ~dead & (certificate.diverging_count > 0) & (halvings[group.rows] < HALVINGS) & (not late)
                closed = (certificate.holds | dead | self._hopeless(engine, certificate) | late) & ~mend
                closed |= ~mend & (2 * group.length > self.max_draws)
                index = closed.nonzero()[:, 0]
                note = "the budget ended" if late else ""
                taken, judged = chains.rows(index), certificate.rows(index)
                value = _value(engine, group.rows[index], taken, judged)
                found.take(names[group.rows[index]], taken, judged, value, engine, note)
                left.append(names[group.rows[index][~certificate.holds[index]]])
                again.append(group.rows[mend])
                after.append(group.only(~closed & ~mend))
            anew = torch.cat(again) if again else names[:0]
            engine.shrink(anew)
            halvings[anew] += 1
            groups = [group for group in (*after, _Group(anew)) if len(group.rows)]
        return torch.cat(left)

    @stage("certificate")
    def _judge(self, engine: Sampler | Tempering, group: _Group, modes: Modes) -> tuple[Chains, Certificate]:
        """Judge all draws of a group, or only the second half if that certifies more data (a longer warm-up)."""
        chains = group.joined()
        certificate = certify(chains, modes.rows(group.rows))
        if chains.length <= 2 * self.draws or bool(certificate.holds.all()):
            return chains, self._look(engine, chains, modes.rows(group.rows), group.rows, certificate)
        later = chains.after(chains.length // 2)
        second = certify(later, modes.rows(group.rows))
        if second.holds.sum() > certificate.holds.sum():
            chains, certificate = later, second
        return chains, self._look(engine, chains, modes.rows(group.rows), group.rows, certificate)

    @staticmethod
    def _hopeless(engine: Sampler | Tempering, certificate: Certificate) -> Tensor:
        """Return where longer chains will not help; replicas that swap may always need more draws."""
        return certificate.stuck if isinstance(engine, Sampler) else torch.zeros_like(certificate.unseen)

    @staticmethod
    def _look(engine: Sampler | Tempering, chains: Chains, modes: Modes, rows: Tensor, certificate: Certificate) -> Certificate:
        """Look for modes that the chains have not seen, once all else holds."""
        held = certificate.holds.nonzero()[:, 0]
        if not len(held):
            return certificate
        part, place, at = _together(engine.log_joint, rows, held)
        some, (root, step) = chains.rows(place), engine.metric(rows[place])
        hops = isinstance(engine, Tempering)
        found = unseen(part, modes.rows(place), some.draws, some.lp, root, step, engine.generator, hops=hops)
        return certificate.amended(held, found.rows(at))


def _together(log_joint: LogJoint, rows: Tensor, held: Tensor) -> tuple[LogJoint, Tensor, Tensor]:
    """Return densities of the data `rows[held]`, the places in `rows` of the data that they hold, and where `held` lie in them.

    Data that come along because they cannot be separated take the place of the first.
    """
    part, used, at = log_joint.some(rows[held])
    place = torch.zeros(log_joint.n_obs, dtype=torch.long, device=rows.device)
    place[rows[held]] = held
    return part, place[used], at


def _value(engine: Sampler | Tempering, rows: Tensor, chains: Chains, certificate: Certificate) -> Bridged | None:
    """Return log p(x) of the data that are certified, by bridge sampling from their chains; None if there are none."""
    held = certificate.holds.nonzero()[:, 0]
    if not len(held):
        return None
    part, place, at = _together(engine.log_joint, rows, held)
    with stage("bridge sampling"), part.frozen_weights():
        return bridge(part, chains.rows(place), engine.generator).rows(at)


class _Group:
    """Data with equally many draws since their last change of step size; earlier draws, with divergences, would be biased."""

    def __init__(self, rows: Tensor, parts: list[Chains] | None = None) -> None:
        self.rows, self.parts = rows, parts or []

    def add(self, new: Chains, offset: int) -> None:
        """Add the draws of these data, which begin in `new` at `offset`."""
        self.parts.append(new.rows(torch.arange(offset, offset + len(self.rows), device=self.rows.device)))

    def due(self, first: int) -> bool:
        """Whether the draws have doubled since the last check."""
        rounds = self.length // first
        return rounds & (rounds - 1) == 0

    @property
    def length(self) -> int:
        """Draws per chain."""
        return sum(part.length for part in self.parts)

    def joined(self) -> Chains:
        """Return all draws."""
        whole = self.parts[0]
        for part in self.parts[1:]:
            whole = whole.then(part)
        self.parts = [whole]
        return whole

    def only(self, mask: Tensor) -> _Group:
        """Return the data where `mask`."""
        index = mask.nonzero()[:, 0]
        return _Group(self.rows[index], [part.rows(index) for part in self.parts])


class Found:
    """Results per datum so far, thinned to `keep` draws per chain."""

    def __init__(self, log_joint: LogJoint, method: str, chains: int, keep: int) -> None:
        n, d = log_joint.n_obs, log_joint.dim
        new = lambda *shape: torch.full(shape, torch.nan, dtype=torch.float64, device=log_joint.device)
        self.log_joint, self.method, self.keep = log_joint, method, keep
        self.draws, self.mean, self.covariance = new(chains, keep, n, d), new(n, d), new(n, d, d)
        self.sample_stats = {name: new(chains, keep, n) for name in ("lp", "acceptance_rate", "diverging")}
        self.log_evidence, self.error = new(n), new(n)
        self.stats: dict[str, Tensor] = {}
        self.status: list[Status] = ["uncertified"] * n
        self.reason = [""] * n

    def take(
        self,
        rows: Tensor,
        chains: Chains,
        certificate: Certificate,
        value: Bridged | None,
        engine: Sampler | Tempering,
        note: str,
    ) -> None:
        """Store the draws and certificates of some of the data, and log p(x) of the certified; from tempering, only these."""
        certified = certificate.holds
        if value is not None:
            self.log_evidence[rows[certified]], self.error[rows[certified]] = value.value, value.error
        way = "parallel tempering" if isinstance(engine, Tempering) else ""
        if way:
            held = certificate.holds.nonzero()[:, 0]
            rows, chains, certificate = rows[held], chains.rows(held), certificate.rows(held)
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
        if value is not None:
            for k, row in enumerate(certificate.holds.nonzero()[:, 0].tolist()):
                reason[row] += f"; log p(x) by bridge sampling: {value.words(k)}"
        for row, s, r in zip(rows.tolist(), status, reason, strict=True):
            self.status[row], self.reason[row] = s, f"{r}; {note}" if note and s == "uncertified" else r

    def withdraw(self, log_joint: LogJoint) -> None:
        """Withdraw certificates where too many draws have densities that depend on rounding; `log_joint` made the chains."""
        rounded, words = log_joint.rounded(self.draws.flatten(0, 1))
        for row, share in enumerate(rounded.double().mean(0).tolist()):
            if share > ROUNDED and self.status[row] == "certified":
                self.status[row], self.reason[row] = "uncertified", f"{self.method}: a share {share:.2g} {words}"

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
            evidence=Evidence("estimate", "bridge sampling", self.log_evidence, self.error),
            stats=self.stats,
            sample_stats=self.sample_stats,
        )
