"""Ranks of a true draw among draws of the guide, for many quantities at once. `checks.calibration` gives the formula.

Draws come in chunks and are counted, not kept. Coordinates are unconstrained, in float64 on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from elbowroom.inference.compiled.policies import at_most
from elbowroom.inference.program.replay import Which
from elbowroom.inference.target import discrete
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.system.memory import ARRAY, fitting, sizes

MOST = 10  # entries of discrete sites used
PROJECTIONS = 3
OF_PRIOR = 32  # draws per datum for the variance of a prior that all data share
SALT = {"guide": 32_452_843, "ties": 49_979_687, "prior": 67_867_967, "truth": 104_395_301}
CHUNK_STEP = 122_949_823


@dataclass(frozen=True)
class Found:
    """Results at n data for Q quantities, the coordinates first.

    Attributes:
        names: of the quantities.
        pit: (n, Q), NaN where a value is NaN or masked out.
        infinite: whether a value is infinite, (n, Q).
        masked: whether the program masks the latent out, (n, Q).
        z_score: (n, d).
        contraction: (n, d).
    """

    names: list[str]
    pit: Tensor
    infinite: Tensor
    masked: Tensor
    z_score: Tensor
    contraction: Tensor

    def rows(self, index: Tensor) -> Found:
        """Return the results of some of the data."""
        parts = (self.pit, self.infinite, self.masked, self.z_score, self.contraction)
        return Found(self.names, *(part[index] for part in parts))


def joined(parts: list[Found]) -> Found:
    """Concatenate the results of different data."""
    columns = zip(*((p.pit, p.infinite, p.masked, p.z_score, p.contraction) for p in parts), strict=True)
    return Found(parts[0].names, *map(torch.cat, columns))


def measure(log_joint: LogJoint, truth: Tensor, draws: int, seed: int) -> Found:
    """Rank the truth, draws of p(z|x) (n, d), among `draws` draws of the guide per datum.

    Where all latents are discrete, `truth` is ignored, and exact draws of the posterior are used.
    """
    with torch.no_grad(), at_most(draws + 2):  # the draws, the truth and a draw of the prior
        return _of_discrete(log_joint, draws, seed) if log_joint.dim == 0 else _of_continuous(log_joint, truth, draws, seed)


def _of_continuous(log_joint: LogJoint, truth: Tensor, draws: int, seed: int) -> Found:
    n, d = log_joint.n_obs, log_joint.dim
    variance = _prior_variance(log_joint, draws, seed)
    generator = torch.Generator().manual_seed(0)  # of the directions: the same for every seed
    direction = torch.randn(PROJECTIONS if d > 1 else 0, d, dtype=torch.float64, generator=generator)
    direction = direction / direction.norm(dim=-1, keepdim=True)
    names = [f"z[{j}]" for j in range(d)] + ["|z|"] + [f"projection[{k}]" for k in range(len(direction))]
    entries = [site.name for site in log_joint.program.discrete if site.name in log_joint.program.guide_sites]

    def quantities(z: Tensor, salt: int, which: Which) -> tuple[Tensor, list[str]]:
        prior, likelihood = (t.double().cpu() for t in log_joint.terms(z))
        also = torch.empty(*z.shape[:2], 0, dtype=torch.float64)
        labels: list[str] = []
        if entries:
            drawn = discrete.discrete_draws(log_joint, z, salt, which=which)
            also, labels = _entries({name: drawn[name] for name in entries})
        u = z.double().cpu()
        if log_joint.program.active is not None:
            u = u * log_joint.program.active.cpu()
        scaled = (u / variance.sqrt()) @ direction.T
        last = torch.stack([prior, likelihood, prior + likelihood], -1)
        return torch.cat([u, u.norm(dim=-1, keepdim=True), scaled, also, last], -1), labels

    right, labels = quantities(truth[None].to(log_joint.device), seed + SALT["truth"], "model")
    names += [*labels, "log p(z)", "log p(x|z)", "log p(x, z)"]
    ranks, moments = _Ranks(right[0]), _Moments()
    for number, size in enumerate(sizes(draws, fitting(n * len(names), ARRAY))):
        z = log_joint.draw("guide", size, seed + SALT["guide"] + CHUNK_STEP * number)
        moments.add(z.double().cpu())
        ranks.add(quantities(z, seed + SALT["guide"] + CHUNK_STEP * number + 1, "guide")[0])
    masked = torch.zeros_like(ranks.infinite)
    if log_joint.program.active is not None:
        masked[:, :d] = ~log_joint.program.active.cpu()
    score = (moments.mean - truth.double().cpu()) / moments.variance.sqrt()
    contraction = 1 - moments.variance / variance
    hide = masked[:, :d]
    return Found(
        names,
        ranks.pit(seed + SALT["ties"]).masked_fill(masked, torch.nan),
        ranks.infinite & ~masked,
        masked,
        score.masked_fill(hide | ~score.isfinite(), torch.nan),
        contraction.masked_fill(hide | ~contraction.isfinite(), torch.nan),
    )


def _of_discrete(log_joint: LogJoint, draws: int, seed: int) -> Found:
    """Rank a draw of p(c|x), which is known exactly, among draws of q(c|x)."""
    found, n = discrete.table(log_joint), log_joint.n_obs

    def quantities(index: Tensor) -> tuple[Tensor, list[str]]:
        values, names = _entries(discrete.at(log_joint, index))
        densities = (found.log_prior, found.log_likelihood, found.log_joint)
        last = [t.gather(0, index.clamp_min(0)).double().masked_fill(index < 0, torch.nan).cpu() for t in densities]
        return torch.cat([values, torch.stack(last, -1)], -1), [*names, "log p(z)", "log p(x|z)", "log p(x, z)"]

    right, names = quantities(discrete.draw(found.log_posterior, 1, seed + SALT["truth"]))
    ranks = _Ranks(right[0])
    for number, size in enumerate(sizes(draws, fitting(n * len(names), ARRAY))):
        ranks.add(quantities(discrete.draw(found.log_guide, size, seed + SALT["guide"] + CHUNK_STEP * number))[0])
    none = torch.empty(n, 0, dtype=torch.float64)
    masked = torch.zeros_like(ranks.infinite)
    return Found(names, ranks.pit(seed + SALT["ties"]), ranks.infinite, masked, none, none)


def _entries(sites: dict[str, Tensor]) -> tuple[Tensor, list[str]]:
    """Return the first ten entries of discrete sites as quantities, (S, n, E), and their names."""
    columns, names = [], []
    for name, value in sites.items():
        flat = value.double().cpu().flatten(2) if value.dim() > 2 else value.double().cpu()[..., None]
        columns.append(flat)
        names += [name] if flat.shape[-1] == 1 else [f"{name}[{j}]" for j in range(flat.shape[-1])]
    return torch.cat(columns, -1)[..., :MOST], names[:MOST]


class _Ranks:
    """Counts of the draws below the truth, (n, Q), and equal to it."""

    def __init__(self, truth: Tensor) -> None:
        self.truth, self.total = truth, 0
        self.less, self.same = torch.zeros_like(truth), torch.zeros_like(truth)
        self.lost, self.infinite = truth.isnan(), truth.isinf()

    def add(self, values: Tensor) -> None:
        """Count draws (S, n, Q)."""
        self.total += len(values)
        self.less += (values < self.truth).sum(0)
        self.same += (values == self.truth).sum(0)
        self.lost |= values.isnan().any(0)
        self.infinite |= values.isinf().any(0)

    def pit(self, seed: int) -> Tensor:
        """Return the PIT values, (n, Q), with ties broken at random."""
        generator = torch.Generator().manual_seed(seed)
        place = torch.rand(self.truth.shape, dtype=torch.float64, generator=generator)
        return ((self.less + place * (1 + self.same)) / (self.total + 1)).masked_fill(self.lost, torch.nan)


class _Moments:
    """Mean and variance of draws that come in chunks, by the parallel form of Welford's algorithm (Chan et al. 1979)."""

    def __init__(self) -> None:
        self.total = 0

    def add(self, z: Tensor) -> None:
        """Add draws (S, n, d)."""
        mean, scatter = z.mean(0), (z - z.mean(0)).square().sum(0)
        if not self.total:
            self.total, self.mean, self.scatter = len(z), mean, scatter
            return
        total, delta = self.total + len(z), mean - self.mean
        self.mean = self.mean + delta * len(z) / total
        self.scatter = self.scatter + scatter + delta.square() * self.total * len(z) / total
        self.total = total

    @property
    def variance(self) -> Tensor:
        """(n, d)."""
        return self.scatter / (self.total - 1)


def _prior_variance(log_joint: LogJoint, draws: int, seed: int) -> Tensor:
    """Return var p(z_j): (1, d) where all data share the prior, (n, d) where it depends on covariates or masks."""
    few = log_joint.sample_prior(3, seed + SALT["prior"])
    log_p = log_joint.terms(few[:, :1].expand(-1, log_joint.n_obs, -1))[0]
    shared = log_joint.program.active is None and torch.allclose(log_p, log_p[:, :1], rtol=1e-6, atol=1e-6)
    moments = _Moments()
    for number, size in enumerate(sizes(OF_PRIOR if shared else draws, fitting(log_joint.n_obs * log_joint.dim, ARRAY))):
        z = log_joint.sample_prior(size, seed + SALT["prior"] + CHUNK_STEP * (number + 1)).double().cpu()
        moments.add(z.flatten(0, 1)[:, None] if shared else z)
    return moments.variance
