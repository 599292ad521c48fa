"""Discrete local latents: joint values, their exact probabilities, and draws of them.

    p(c | x, z) = p(x, z, c) / sum_c' p(x, z, c')          q(c | x, z) likewise, if the guide draws the sites

c runs over the A joint values (`program.assignments`) of a datum's discrete sites. `given` fixes the sites at one of them, so
that a `LogJoint` computes everything for that value. All densities are in nats.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from elbowroom.errors import UnsupportedProgram, first_line
from elbowroom.inference.program.replay import Which
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.system.memory import ARRAY, fitting

TOLERANCE = 1e-5  # of a sum of probabilities; the program may compute in float32
FAILURES = (RuntimeError, ValueError, IndexError, TypeError)


@dataclass(frozen=True)
class Table:
    """Every joint value of the discrete sites of a model without continuous latents, (A, N) each, in nats.

    Attributes:
        log_prior: log p(c).
        log_likelihood: log p(x_n | c).
        log_guide: log q(c | x_n); log p(c | x_n) if the guide leaves all discrete sites to be summed out.
        amortized: whether the guide draws the discrete sites.
    """

    log_prior: Tensor
    log_likelihood: Tensor
    log_guide: Tensor
    amortized: bool

    @property
    def log_joint(self) -> Tensor:
        """Log p(x_n, c), (A, N)."""
        return self.log_prior + self.log_likelihood

    @property
    def log_evidence(self) -> Tensor:
        """Log p(x_n), (N,)."""
        return torch.logsumexp(self.log_joint, 0)

    @property
    def log_posterior(self) -> Tensor:
        """Log p(c | x_n), (A, N)."""
        return self.log_joint - self.log_evidence


def given(log_joint: LogJoint, assignment: dict[str, Tensor]) -> LogJoint:
    """Return a copy with the discrete sites fixed at one joint value c: log p(x, z, c) and log q(z, c | x)."""
    held = log_joint.copy()
    sites = tuple(dataclasses.replace(site, values=assignment[site.name][None]) for site in log_joint.program.discrete)
    held.program = dataclasses.replace(log_joint.program, discrete=sites)
    return held


def table(log_joint: LogJoint) -> Table:
    """Evaluate model and guide at every joint value of the discrete sites; all latents must be discrete (d = 0).

    Raises:
        UnsupportedProgram: a conditional of model or guide does not sum to one over the model's values (a mask around a
            discrete site, a guide that draws other values), or one datum's value changes another's density.
    """
    program = log_joint.program
    z = torch.zeros(1, log_joint.n_obs, 0, dtype=log_joint.dtype or log_joint.own_dtype, device=log_joint.device)
    names = ", ".join(repr(site.name) for site in program.discrete)
    priors, likelihoods, guides = [], [], []
    with torch.no_grad():
        for assignment in program.assignments:
            held = given(log_joint, assignment)
            log_prior, log_likelihood = held.terms(z)
            try:
                log_guide = held.log_guide(z)
            except FAILURES as error:
                values = ", ".join(f"{name}={value.tolist()}" for name, value in assignment.items())
                raise UnsupportedProgram(f"guide: it gives no probability of {values}: {first_line(error)}") from error
            priors.append(log_prior[0])
            likelihoods.append(log_likelihood[0])
            guides.append(log_guide[0])
        amortized = any(site.name in program.guide_sites for site in program.discrete)
        found = Table(torch.stack(priors), torch.stack(likelihoods), torch.stack(guides), amortized)
        _check_sum("model: the prior probabilities", names, found.log_prior)
        if not found.amortized:
            return dataclasses.replace(found, log_guide=found.log_posterior)
        _check_sum("guide: its probabilities", names, found.log_guide)
    _check_local(log_joint, found.log_joint, z[0])
    return found


def _check_sum(what: str, names: str, log_probability: Tensor) -> None:
    total = torch.logsumexp(log_probability, 0).exp()
    off = ~((total - 1).abs() <= TOLERANCE)
    if off.any():
        n = int(off.nonzero()[0])
        raise UnsupportedProgram(
            f"{what} of {names} for datum {n} sum to {total[n].item():.4g} over the model's values, not to 1 (a mask around "
            "the site, or draws outside the model's values)"
        )


def _check_local(log_joint: LogJoint, log_p: Tensor, z: Tensor) -> None:
    """Mix values between data: each datum must keep the density that it has if all data share its value."""
    n = log_joint.n_obs
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(len(log_p), (n,), generator=generator).to(z.device)
    index[: min(n, len(log_p))] = torch.arange(min(n, len(log_p)), device=z.device)  # use every value once if possible
    stacked = _stacked(log_joint)
    mixed = {}
    for site in log_joint.program.discrete:
        value = stacked[site.name][index]
        inner = (1,) * (-site.plate_dim - 1)
        mixed[site.name] = value.reshape(n, *inner, *site.shape[len(site.shape) - site.event_dim :])
    with torch.no_grad(), log_joint.snapshot.scope():
        replay = log_joint.run("model", mixed, z=z)
        other = log_joint.run("model", log_joint.program.assignments[0], z=z)
    tight = 1e-9 if log_p.dtype == torch.float64 else 1e-5
    alone = log_p.gather(0, index[None])[0]
    pairs = [((replay.log_prior + replay.log_likelihood + replay.padding).expand(n), alone)]
    pairs.append((torch.as_tensor(replay.outside), torch.as_tensor(other.outside)))
    for together, expected in pairs:
        finite = expected.isfinite()
        if not torch.allclose(together[finite], expected[finite], rtol=tight, atol=100 * tight):
            raise UnsupportedProgram(
                "model: moving the discrete latents of some data changes log p of others, or of what is observed outside the "
                "plate; the data are coupled, so no per-datum posterior exists"
            )


def _stacked(log_joint: LogJoint) -> dict[str, Tensor]:
    """Return the discrete sites' values in every assignment, in the program's type: name -> (A, *site)."""
    assignments = log_joint.program.assignments
    return {
        site.name: torch.stack([assignment[site.name] for assignment in assignments]).reshape(len(assignments), *site.shape)
        for site in log_joint.program.discrete
    }


def values(log_joint: LogJoint) -> dict[str, Tensor]:
    """Return the discrete sites' values in every assignment: name -> (A, *site), int64 if all are whole numbers."""
    stacked = _stacked(log_joint)
    return {name: value.long() if torch.equal(value, value.round()) else value for name, value in stacked.items()}


def at(log_joint: LogJoint, index: Tensor) -> dict[str, Tensor]:
    """Look up the sites' values for assignments (S, N), int64; -1 marks a draw that failed.

    Returns:
        Values by site, (S, N, *site): integers, or floats with NaN for failed draws.
    """
    found = {}
    for name, value in values(log_joint).items():
        taken = value[index.clamp_min(0)]
        missing = (index < 0).reshape(*index.shape, *(1,) * (value.dim() - 1))
        found[name] = torch.where(missing, torch.nan, taken.double()) if bool(missing.any()) else taken
    return found


def sample(log_probability: Tensor, uniform: Tensor) -> Tensor:
    """Draw an index from each column by inverting its distribution function.

    Args:
        log_probability: (A, ...), need not be normalised.
        uniform: (S, ...), in [0, 1).

    Returns:
        Indices (S, ...), int64; an index of probability zero is never drawn; -1 where a column is not a distribution.
    """
    cumulative = torch.softmax(log_probability.movedim(0, -1), -1).cumsum(-1).contiguous()
    broken = ~cumulative[..., -1].isfinite()
    # divide by the rounded total, so that every uniform number lies below the last value; equal neighbours are skipped
    cumulative /= cumulative[..., -1:].clone()
    index = torch.searchsorted(cumulative, uniform.movedim(0, -1).contiguous(), right=True).movedim(-1, 0)
    return torch.where(broken, -1, index)


def draw(log_probability: Tensor, n_draws: int, seed: int) -> Tensor:
    """Draw S assignments of every datum, (S, N), from log probabilities (A, N); see `sample`."""
    generator = torch.Generator(device=log_probability.device).manual_seed(seed)
    shape = (n_draws, log_probability.shape[1])
    uniform = torch.rand(shape, dtype=log_probability.dtype, device=log_probability.device, generator=generator)
    return sample(log_probability, uniform)


def discrete_draws(log_joint: LogJoint, z: Tensor, seed: int, *, which: Which = "model") -> dict[str, Tensor]:
    """Draw the discrete sites once for each draw of the continuous ones: c ~ p(c | x, z), or q(c | x, z).

    If z ~ p(z|x), the pairs (z, c) are draws of the joint posterior, and the share of a value estimates p(c|x).

    Args:
        log_joint: the model and guide.
        z: (S, N, d), unconstrained.
        seed: random seed.
        which: `model` for p(c | x, z); `guide` for q(c | x, z), which is p(c | x, z) if the guide does not draw the sites.

    Returns:
        Values by site, (S, N, *site), integers; NaN (and then floats) where log p(x, z) is not finite.
    """
    program = log_joint.program
    of_guide = which == "guide" and any(site.name in program.guide_sites for site in program.discrete)
    held = [given(log_joint, assignment) for assignment in program.assignments]
    generator = torch.Generator(device=z.device).manual_seed(seed)
    uniform = torch.rand(z.shape[:2], dtype=torch.float64, device=z.device, generator=generator)
    chunk = fitting(len(held) * log_joint.n_obs, ARRAY)
    found = []
    with torch.no_grad():
        for u, some in zip(uniform.split(chunk), z.split(chunk), strict=True):
            log_p = torch.stack([one.log_guide(some) if of_guide else one(some) for one in held])
            found.append(sample(log_p.double(), u[None])[0])
    return at(log_joint, torch.cat(found))
