"""The log joint: the one object that all methods after training use.

A `LogJoint` is built from any Pyro `(model, guide, *args, **kwargs)` by running the pair. It offers, for all data n at once
and in unconstrained coordinates z (N, d):

    log p(x_n, z_n) + log |d constrained / d unconstrained|        and its gradient
    log q(z_n | x_n) in the same coordinates, draws from q, draws from the prior
    the map to the constrained values of the program's own sites

Latents masked out of a datum are flat in the program, hence improper; they get a N(0, 1) density in model and guide, which
changes no evidence and no other coordinate. Discrete local sites are summed out. All values are in nats.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from elbowroom.inference.compiled.policies import policy
from elbowroom.inference.mcmc.leapfrog import leap
from elbowroom.inference.program.densities.bilinear import Kept
from elbowroom.inference.program.densities.edges import inward, moved, saturated
from elbowroom.inference.program.latents import log_sum
from elbowroom.inference.program.replay import Which
from elbowroom.inference.program.sites import has_edge
from elbowroom.inference.randomness import seeded
from elbowroom.inference.target import shared_points
from elbowroom.inference.target.checks.probe import probe
from elbowroom.inference.target.checks.separation import separates
from elbowroom.inference.target.draws import forward
from elbowroom.inference.target.graphs import Graphs
from elbowroom.inference.target.plain import ROWS, PlainLogJoint
from elbowroom.inference.target.tracing import Kind, by_graph
from elbowroom.system.memory import LARGE_ARRAY, fitting, sizes
from elbowroom.system.stages import stage

log = logging.getLogger("elbowroom")

ROUNDING = 16  # steps of rounding of log p by which two evaluations may differ


class LogJoint(PlainLogJoint):
    """log p(x_n, z) of any Pyro (model, guide) pair, per datum, in unconstrained coordinates.

    The weights are a snapshot, taken at construction and evaluated in `dtype` with every module in eval mode. Modules, Pyro's
    validation and the parameter store are restored after each call.

    Args:
        model: Pyro program p(x, z), with a data plate.
        guide: Pyro program q(z|x), with the same plate.
        *args: arguments of both programs.
        plate: name of the data plate, if there are several candidates.
        hold: names of other plates, whose latents are held at the guide's median, as global ones are.
        dtype: floating-point type of all computations, including tensors in the programs' closures and tensors that they
            make with an explicit dtype; None keeps the program's own.
        **kwargs: keyword arguments of both programs.

    Attributes:
        program: the description of the pair.
        n_obs: number of data N.
        dim: number of unconstrained continuous coordinates d per datum.
        args: copies of the arguments that the programs are run with.
        kwargs: likewise.
        sites: the continuous local sites, in program order.
        mode: how draws are evaluated together: `vmap`, `repeat` or `loop`.
        batched_draws: whether model and guide may be drawn from in an outer plate of draws; None until the first draw.
        shares: whether one grid can be evaluated for all data at once; None until it was tried.
        factorises: whether that evaluation is a single matrix product.
        separates: whether the arguments can be separated by datum; empty until it was tried.
        model_separates: whether the model alone gives each datum of a part what it gives it among all; likewise.
        amortized: whether the guide reads the data; False only where `separates` found that it does not.
        data_dims: dimension of the data in each argument, leaf by leaf; None where it has none.
        probe_points: (S, N, d), draws of guide and prior that the construction was tested at.
        notes: sentences about sites that were pinned, dropped or ignored and methods that were slowed down, and why.

    Raises:
        UnsupportedProgram: the pair is not supported; names the site or plate and the reason.
    """

    def _build(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], plates: tuple[str | None, Sequence[str]], dtype: torch.dtype | None
    ) -> None:
        super()._build(args, kwargs, plates, dtype)
        self.shares: bool | None = None
        self.factorises = False
        self._kept = Kept()
        self.graphs = Graphs()
        with policy("never"):
            self.probe_points = probe(self, self.draw, dtype)

    # -- densities: by a graph if there is one -------------------------------------------------------------------------------

    @stage("log joint", often=True)
    def __call__(self, z: Tensor) -> Tensor:
        """Return log p(x_n, z_sn) with the Jacobian, (S, N), for z of shape (S, N, d)."""
        found = self._fast("joint", z)
        return super().__call__(z) if found is None else found[0]

    @stage("log joint", often=True)
    def terms(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return log p(z) with the Jacobian and log p(x_n|z), each (S, N).

        If discrete sites are summed out, log p(z) is the marginal of the continuous ones, and log p(x_n|z) likewise.
        """
        found = self._fast("terms", z)
        if found is None:
            return super().terms(z)
        prior, likelihood = found
        return prior, likelihood

    @stage("gradient", often=True)
    def grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return log p(x_n, z_sn), (S, N), and its gradient in z, (S, N, d)."""
        found = self._fast("grad", z)
        if found is None:
            return super().grad(z)
        value, gradient = found
        return value, gradient

    @stage("gradient", often=True)
    def parts(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return log p(z) and log p(x_n|z) as `terms`, (S, N) each, and the gradient of each in z, (S, N, d)."""
        found = self._fast("parts", z)
        if found is None:
            return super().parts(z)
        prior, likelihood, of_prior, of_likelihood = found
        return prior, likelihood, of_prior, of_likelihood

    def tempered(self, z: Tensor, b: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        """Return log p(z), log p(x_n|z), (S, N) each, and the gradient of log p(z) + b log p(x_n|z), (S, N, d).

        b is the inverse temperature, a number or broadcastable to (S, N).
        """
        prior, likelihood, of_prior, of_likelihood = self.parts(z)
        power = torch.as_tensor(b, dtype=z.dtype, device=z.device).expand(z.shape[:2])[..., None]
        return prior, likelihood, torch.where(power > 0, of_prior + power * of_likelihood, of_prior)

    def log_guide(self, z: Tensor) -> Tensor:
        """Return log q(z_sn | x_n) in unconstrained coordinates, (S, N), for z of shape (S, N, d)."""
        found = self._fast("guide", z)
        return super().log_guide(z) if found is None else found[0]

    @stage("gradient", often=True)
    def leap(
        self, z: Tensor, momentum: Tensor, size: Tensor, root: Tensor, kick: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Move chains by one leapfrog of this density: `mcmc.leapfrog.leap`, as one graph if there is one."""
        graph = self.graphs.ready(self, "leap")
        if graph is None:
            return leap(self.grad, z, momentum, size, root, kick)
        size = size.expand(*z.shape[:-1], 1)
        z, momentum, value, gradient = by_graph(self, graph, z, momentum, size, root[None], kick)
        return z, momentum, value, gradient

    def _fast(self, kind: Kind, z: Tensor) -> tuple[Tensor, ...] | None:
        """Evaluate by a graph; None if there is none yet, or the caller wants to differentiate."""
        if self.dim == 0 or z.dim() != 3 or tuple(z.shape[1:]) != (self.n_obs, self.dim):
            return None
        if z.requires_grad and torch.is_grad_enabled():
            return None
        graph = self.graphs.ready(self, kind)
        return None if graph is None else by_graph(self, graph, z)

    # -- draws, and values of the program's own sites ------------------------------------------------------------------------

    def sample_guide(self, n_draws: int, seed: int) -> tuple[Tensor, Tensor]:
        """Draw z ~ q(z|x): z (S, N, d) and log q(z|x), (S, N), in unconstrained coordinates."""
        z = self.draw("guide", n_draws, seed)
        return z, self.log_guide(z)

    def sample_prior(self, n_draws: int, seed: int) -> Tensor:
        """Draw the latents from the model, ignoring the data: z (S, N, d), unconstrained."""
        return self.draw("model", n_draws, seed)

    def draw(self, which: Which, n_draws: int, seed: int) -> Tensor:
        """Run a program and return its local sites, in unconstrained coordinates: (S, N, d)."""
        numbers = max(self.dim, self._width() if which == "model" else 1)  # of one datum; the model computes x too
        size = min(fitting(self.n_obs, 8 * ROWS), fitting(self.n_obs * numbers, LARGE_ARRAY))
        with seeded(seed), self.snapshot.scope(), torch.no_grad():
            z = torch.cat([forward(self, which, count) for count in sizes(n_draws, size)])
            if self.program.active is not None:
                z = torch.where(self.program.active, z, torch.randn_like(z))
            return z

    def constrain(self, z: Tensor) -> dict[str, Tensor]:
        """Map z (S, N, d) to the program's own sites: name -> (S, N, *shape); NaN where a latent is masked out."""
        fixed = all(site.transform is not None for site in self.sites)  # otherwise a support may depend on an earlier site

        def values(u: Tensor) -> Tensor:
            drawn = {} if fixed else self.run("model", self.program.assignments[0], z=u).values
            parts = []
            for site in self.sites:
                value = drawn[site.name] if site.transform is None else site.transform(site.split(u))
                parts.append(site.gather(value, site.event_dim).reshape(len(u), -1))
            return torch.cat(parts, -1) if parts else u

        flat = self._map(values, z)
        widths = [math.prod(site.shape) for site in self.sites]
        out = {}
        for site, part in zip(self.sites, flat.split(widths, -1), strict=True):
            if self.program.active is not None:
                shown = self.program.active[:, site.columns]
                if shown.shape[-1] != part.shape[-1]:  # e.g. a simplex: masked as a whole
                    shown = shown.any(-1, keepdim=True)
                part = torch.where(shown, part, torch.full_like(part, torch.nan))
            out[site.name] = part.reshape(*part.shape[:-1], *site.shape)
        return out

    # -- values that round to the edge of a support ---------------------------------------------------------------------------

    @property
    def has_edges(self) -> bool:
        """Whether a latent's support has an edge, next to which its values round."""
        return any(has_edge(site.support) for site in self.sites)

    def rounded(self, z: Tensor) -> tuple[Tensor, str]:
        """Return (S, N), True where a value rounds to an edge of its support and a density feels it; and what to say.

        There a step of rounding of the value changes log p(x, z) or log q(z|x), as a logarithm of the distance to the edge
        changes: the density is then not that of z. Densities that are computed from z itself, and those that do not depend on
        the last digit, are right at the edge.
        """
        with torch.no_grad():
            z = self._checked(z)
            known = z.isfinite().all(-1)
            z = torch.where(known[..., None], z, 0.0)
            flags = {name: flag & known for name, flag in saturated(self.sites, z).items()}
            found = torch.zeros(z.shape[:2], dtype=torch.bool, device=z.device)
            for flag in flags.values():
                found |= flag
            some = found.any(1)
            if not bool(some.any()):
                return found, ""
            if all(site.transform is not None for site in self.sites):
                found[some] &= self._map(self._feels_rounding, z[some])
        names = ", ".join(repr(name) for name, flag in flags.items() if bool((flag & found).any()))
        cure = "" if self.dtype == torch.float64 else "compute in float64, or "
        return found, (
            f"of the mass lies where {names} rounds to the edge of its support and the program's density depends on how; {cure}"
            "give it a prior with less mass at the edge (a larger concentration), or a logit-normal one"
        )

    def rounded_share(self, z: Tensor, log_p: Tensor, log_r: Tensor | None = None) -> tuple[Tensor, Tensor, str]:
        """Return the share of the mass where `rounded` holds, (N,), `rounded` and its words, from z of density r (uniform).

        Where log p(x, z) is not finite at such a point, its value at the last point whose values do not round stands for it.
        """
        rounded, words = self.rounded(z)
        if not words:
            return torch.zeros_like(log_p[0]), rounded, words
        inside = torch.where(rounded[..., None], inward(self.sites, self._checked(z)), z)
        log_w = torch.where(rounded & ~log_p.isfinite(), self(inside).to(log_p.dtype), log_p)
        log_w = log_w if log_r is None else log_w - log_r
        share = (torch.softmax(log_w.masked_fill(~rounded & ~log_w.isfinite(), -torch.inf), 0) * rounded).sum(0)
        return share, rounded, words

    def _feels_rounding(self, z: Tensor) -> Tensor:
        """Return (N,), True where log p(x, z) or log q(z|x) at z (N, d) changes with a step of rounding of the values."""
        free = {s.name: (s.split(z), s.transform) for s in self.sites if s.transform is not None}
        values = {name: transform(u) for name, (u, transform) in free.items()}
        others = {site.name: moved(site, values[site.name]) for site in self.sites}
        felt = torch.zeros(len(z), dtype=torch.bool, device=z.device)
        eps = torch.finfo(z.dtype).eps
        programs: list[tuple[Which, list[dict[str, Tensor]]]]
        programs = [("model", self.program.assignments), ("guide", self._guide_assignments())]
        for which, assignments in programs:
            both = []
            for given in (values, others):
                runs = [self.run(which, a, values=given, free=free) for a in assignments]
                both.append(log_sum([run.log_prior + run.log_likelihood + run.log_det for run in runs]))
            change = (both[0] - both[1]).abs()
            felt = felt | ~(change <= math.sqrt(eps) + ROUNDING * eps * both[0].abs())
        return felt

    def data(self) -> Tensor:
        """Return the first tensor among the arguments that has one row per datum, in the computation's dtype."""
        for leaf in self.leaves():
            if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == self.n_obs:
                return leaf
        raise ValueError("no argument of the model has one row per datum")

    # -- all data at the same points, and some of the data -------------------------------------------------------------------

    def shared(self, z: Tensor) -> Tensor:
        """Return log p(x_n, z_g) of every datum at the same points, (G, N), for z of shape (G, d); without gradient.

        If the program broadcasts over a leading dimension and its likelihood factorises, z is decoded once and the data enter
        through one matrix product. This is checked against plain evaluation, and not used if they differ. The data's side of
        the product is kept for the next call.
        """
        if self.can_share():
            return shared_points.evaluate(self, z, self._kept, factorises=self.factorises)
        return self(z[:, None].expand(-1, self.n_obs, -1))

    def shared_over(self, z: Tensor, blocks: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield `shared` for each block of data in turn, (G, len(rows)), decoding z only once if possible."""
        held = shared_points.columns(self, z) if self.can_share() and self.factorises and len(blocks) > 1 else None
        for rows in blocks:
            if held is not None:
                lefts, right = held
                yield shared_points.product(lefts, right[rows])
                continue
            part, _, at = self.some(rows)
            log_p = shared_points.evaluate(part, z, Kept(), factorises=self.factorises) if self.shares else part.shared(z)
            yield log_p[:, at] if part is self else log_p

    def can_share(self) -> bool:
        """Whether one grid can be evaluated for all data at once; tried once."""
        if self.shares is None:
            self.shares, self.factorises = shared_points.settle(self)
        return self.shares

    def some(self, rows: Tensor) -> tuple[Self, Tensor, Tensor]:
        """Return a log joint that holds the data `rows`, the data that it holds, and the positions of `rows` in it.

        It holds only `rows` if the arguments can be separated by datum; otherwise all data, in order.
        """
        every = torch.arange(self.n_obs, device=self.device)
        if len(rows) < self.n_obs and self.separable():
            return self.subset(rows), rows, every[: len(rows)]
        return self, every, rows

    def separable(self) -> bool:
        """Whether the data can be taken apart: whether model and guide give each datum of a part what they give it among all.

        Determined at the first call, by running both on parts of the data; a note says if the guide is the reason.
        """
        if not self.separates:
            self.separates.append(separates(self.root, LogJoint.draw))
        return self.separates[0]

    def blocks(self, size: int) -> list[Tensor]:
        """Return all data, in order, in blocks of at most `size` rows; one block if the arguments cannot be separated."""
        every = torch.arange(self.n_obs, device=self.device)
        return list(every.split(size)) if self.n_obs > size and self.separable() else [every]

    def copy(self) -> Self:
        """Return a copy with arguments and program that may be replaced."""
        other = super().copy()
        other.graphs = Graphs()
        return other
