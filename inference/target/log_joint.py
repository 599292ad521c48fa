"""The seam: one object that everything below training consumes.

A `LogJoint` is built from any Pyro `(model, guide, *args, **kwargs)` by running the pair. It offers, for all data n at once
and in unconstrained coordinates z (N, d):

    log p(x_n, z_n) + log |d constrained / d unconstrained|        and its gradient
    log q(z_n | x_n) in the same coordinates, draws from q, draws from the prior
    the map to the constrained values of the program's own sites

Latents masked out of a datum are flat in the program, hence improper; they are given a N(0, 1) density in model and guide,
which changes no evidence and no other coordinate. Discrete local sites are summed out. All values are in nats.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from elbowroom.errors import UnsupportedProgram
from elbowroom.inference.compiled.graph import Function
from elbowroom.inference.compiled.policies import policy
from elbowroom.inference.mcmc.leapfrog import leap
from elbowroom.inference.program.bilinear import Kept
from elbowroom.inference.program.inspection import inspect
from elbowroom.inference.program.promotion import Promoted, mixed, mixes
from elbowroom.inference.program.replay import Feed, Which
from elbowroom.inference.program.sites import Program, is_real, per_datum
from elbowroom.inference.program.snapshot import Snapshot
from elbowroom.inference.randomness import seeded
from elbowroom.inference.target import shared_points as shared
from elbowroom.inference.target.checks import probe
from elbowroom.inference.target.draws import forward
from elbowroom.inference.target.graphs import Graphs, Kind, inputs
from elbowroom.system.stages import stage

log = logging.getLogger("elbowroom")

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
ROWS = 2**15  # decoder rows (draws x data) evaluated at once
ENTRIES = 2**20  # rows x width of a datum evaluated at once on a CPU: what its caches hold
FINER = 4  # graphs have no handlers to wait for: smaller parts still, which stay in the nearer caches


class LogJoint:
    """log p(x_n, z) of any Pyro (model, guide) pair, per datum, in unconstrained coordinates.

    The weights are those of the moment of construction (a snapshot), evaluated in `dtype` with every module in eval mode;
    modules, Pyro's validation and the parameter store are put back after each call.

    Args:
        model: Pyro program p(x, z), with a data plate.
        guide: Pyro program q(z|x), with the same plate.
        *args: arguments of both programs.
        plate: name of the data plate, where several could be meant.
        dtype: floating-point type of all computations, of tensors too that the programs close over or make in a type that
            they name; None keeps the program's own.
        **kwargs: keyword arguments of both programs.

    Attributes:
        program: what was learnt from running the pair.
        n_obs: number of data N.
        dim: number of unconstrained continuous coordinates d per datum.
        args: copies of the arguments that the programs are run with.
        kwargs: likewise.
        sites: the continuous local sites, in program order.
        mode: how draws are evaluated together: `vmap`, `repeat` or `loop`.
        joined: whether model and guide may be drawn from in an outer plate of draws; None until the first draw.
        shares: whether one grid can be evaluated for all data at once; None until it was tried.
        factorises: whether it is then a matrix product and nothing else.
        separates: whether the arguments can be taken apart by datum; empty until it was tried.
        along: dimension of the data in each argument, leaf by leaf; None where it has none.
        tested: (S, N, d), draws of guide and prior that the construction was tested at.
        notes: sentences about what was pinned, dropped, ignored or slowed down, and why.

    Raises:
        UnsupportedProgram: naming site or plate and the reason.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        *args: Any,
        plate: str | None = None,
        dtype: torch.dtype | None = torch.float64,
        **kwargs: Any,
    ) -> None:
        self.model, self.guide = model, guide
        self.snapshot = Snapshot((model, guide), args, kwargs)
        try:
            self._build(args, kwargs, plate, dtype)
        except (RuntimeError, UnsupportedProgram) as error:  # e.g. a prior, never drawn from in training, or data from NumPy
            if dtype is None or not (mixed(error) or mixed(error.__cause__)):
                raise
            self.model, self.guide = Promoted(model, dtype), Promoted(guide, dtype)
            self._build(args, kwargs, plate, dtype)
            self.note(f"the program mixes precisions and does not run as it is; all is computed in {dtype}")

    def _build(self, args: tuple[Any, ...], kwargs: dict[str, Any], plate: str | None, dtype: torch.dtype | None) -> None:
        with self.snapshot.eval_mode(), seeded(0), torch.no_grad(), pyro.validation_enabled(True):
            try:
                self.program = inspect(self.model, self.guide, args, kwargs, plate)
            except ZeroDivisionError as error:  # Pyro's word for a plate without entries
                raise UnsupportedProgram("model: a plate is empty; is there no row of data?") from error
        self.n_obs, self.dim, self.sites = self.program.n_obs, self.program.dim, self.program.sites
        self.plate = self.program.plate
        self.notes = self.program.notes
        self.device = next((t.device for t in self.snapshot.leaves() if isinstance(t, Tensor)), torch.device("cpu"))
        self.take(None)
        self._rows = self._rows_at_once()
        self.mode = "loop"
        self.joined: dict[Which, bool | None] = {"model": None, "guide": None}
        self.shares: bool | None = None
        self.factorises = False
        self._kept = Kept()
        self.separates: list[bool] = []
        self.along = self._data_dimensions()
        self.graphs = Graphs()
        self._whole: LogJoint | None = None
        with policy("never"):
            self.tested = probe(self, dtype)

    # -- the interface --------------------------------------------------------------------------------------------------

    @stage("log joint", often=True)
    def __call__(self, z: Tensor) -> Tensor:
        """Return log p(x_n, z_sn) with the Jacobian, (S, N), for z of shape (S, N, d)."""
        found = self._fast("joint", z)
        return self._map(self.density, z) if found is None else found[0]

    @stage("log joint", often=True)
    def terms(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return log p(z) with the Jacobian and log p(x_n|z), each (S, N).

        Where discrete sites are summed out, log p(z) is the marginal of the continuous ones, and log p(x_n|z) likewise.
        """
        found = self._fast("terms", z)
        if found is None:
            found = self._map(lambda u: torch.stack(self.densities(u), -1), z).unbind(-1)
        prior, likelihood = found
        return prior, likelihood

    @stage("gradient", often=True)
    def grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return log p(x_n, z_sn), (S, N), and its gradient in z, (S, N, d)."""

        def evaluate(u: Tensor) -> tuple[Tensor, ...]:
            value = self(u)
            return value.detach(), *torch.autograd.grad(value.sum(), u)

        value, gradient = self._fast("grad", z) or self._backward(z, evaluate)
        return value, gradient

    @stage("gradient", often=True)
    def parts(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return log p(z) and log p(x_n|z) as `terms`, (S, N) each, and the gradient of each in z, (S, N, d)."""

        def evaluate(u: Tensor) -> tuple[Tensor, ...]:
            prior, likelihood = self._map_chunk(self.densities, u)
            (of_prior,) = torch.autograd.grad(prior.sum(), u, retain_graph=True)
            (of_likelihood,) = torch.autograd.grad(likelihood.sum(), u, allow_unused=True)
            nothing = torch.zeros_like(of_prior)
            return prior.detach(), likelihood.detach(), of_prior, nothing if of_likelihood is None else of_likelihood

        prior, likelihood, of_prior, of_likelihood = self._fast("parts", z) or self._backward(z, evaluate)
        return prior, likelihood, of_prior, of_likelihood

    def tempered(self, z: Tensor, b: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        """Return log p(z), log p(x_n|z), (S, N) each, and the gradient of log p(z) + b log p(x_n|z), (S, N, d).

        Args:
            z: (S, N, d).
            b: inverse temperature, a number or broadcastable to (S, N).
        """
        prior, likelihood, of_prior, of_likelihood = self.parts(z)
        power = torch.as_tensor(b, dtype=z.dtype, device=z.device).expand(z.shape[:2])[..., None]
        return prior, likelihood, torch.where(power > 0, of_prior + power * of_likelihood, of_prior)

    def _pair(self, z: Tensor, assignment: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return log p(z) and log p(x_n|z) of one assignment, (N,) each."""
        feed = self.run("model", assignment, z=z)
        prior = feed.log_prior + feed.log_det + self._padding(z)
        likelihood = torch.as_tensor(feed.log_likelihood, dtype=z.dtype, device=z.device).expand_as(prior)
        return prior, likelihood

    def _backward(self, z: Tensor, evaluate: Callable[[Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Evaluate with gradients, keeping the graph of few rows at a time."""
        if z.dim() != 3 or tuple(z.shape[1:]) != (self.n_obs, self.dim):
            raise ValueError(f"z has shape {tuple(z.shape)}; expected (draws, {self.n_obs}, {self.dim})")
        z = z.to(self.dtype or self.own_dtype)
        # the backward pass reads the weights too: both happen in one scope
        with self.snapshot.scope(), torch.enable_grad():
            parts = [evaluate(u.detach().requires_grad_()) for u in z.split(max(1, self._rows // max(1, self.n_obs)))]
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))

    def log_guide(self, z: Tensor) -> Tensor:
        """Return log q(z_sn | x_n) in unconstrained coordinates, (S, N), for z of shape (S, N, d)."""
        found = self._fast("guide", z)
        return self._map(self.guide_density, z) if found is None else found[0]

    @stage("gradient", often=True)
    def leap(
        self, z: Tensor, momentum: Tensor, size: Tensor, root: Tensor, kick: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Move chains by one leapfrog of this density: `mcmc.leapfrog.leap`, as one graph where there is one."""
        graph = self.graphs.ready(self, "leap")
        if graph is None:
            return leap(self.grad, z, momentum, size, root, kick)
        size = size.expand(*z.shape[:-1], 1)
        z, momentum, value, gradient = self.by_graph(graph, z, momentum, size, root[None], kick)
        return z, momentum, value, gradient

    # -- the densities of one draw of all data, (N, d) -> (N,) -------------------------------------------------------------

    def density(self, z: Tensor) -> Tensor:
        """Return log p(x_n, z_n) with the Jacobian, (N,), for z of shape (N, d)."""
        return _logsumexp([self._joint(z, a) for a in self.program.assignments])

    def densities(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return log p(z_n) with the Jacobian and log p(x_n|z_n), (N,) each, for z of shape (N, d)."""
        return _summed_out([self._pair(z, a) for a in self.program.assignments])

    def guide_density(self, z: Tensor) -> Tensor:
        """Return log q(z_n|x_n), (N,), for z of shape (N, d)."""
        return _logsumexp([self._guide_density(z, a) for a in self._guide_assignments()])

    def assignment_probabilities(self, z: Tensor) -> Tensor:
        """Return p(discrete assignment | x_n, z_sn), (A, S, N), over `program.assignments`."""
        parts = torch.stack([self._map(partial(self._joint, assignment=a), z) for a in self.program.assignments])
        return torch.softmax(parts, 0)

    def sample_guide(self, n_draws: int, seed: int) -> tuple[Tensor, Tensor]:
        """Draw z ~ q(z|x): z (S, N, d) and log q(z|x), (S, N), in unconstrained coordinates."""
        z = self.draw("guide", n_draws, seed)
        return z, self.log_guide(z)

    def sample_prior(self, n_draws: int, seed: int) -> Tensor:
        """Draw the latents from the generative program, ignoring the data: z (S, N, d), unconstrained."""
        return self.draw("model", n_draws, seed)

    def saturated(self, z: Tensor) -> Tensor:
        """Return (S, N) True where a constrained value has rounded to its support's edge, so that z cannot be had back."""

        def lost(u: Tensor) -> Tensor:
            bad = torch.zeros(len(u), dtype=torch.bool, device=u.device)
            for site in self.sites:
                if site.transform is not None and site.columns.stop > site.columns.start:
                    part = site.split(u)
                    off = (site.transform.inv(site.transform(part)) - part).abs()
                    off = site.gather(off, site.free_event_dim).reshape(len(u), -1)
                    bad = bad | ~(off <= 1e-3 * (1 + part.abs().max())).all(-1)
            return bad

        if all(is_real(site.support) for site in self.sites):
            return torch.zeros(z.shape[:2], dtype=torch.bool, device=z.device)
        return torch.stack([lost(u) for u in z])

    def data(self) -> Tensor:
        """Return the first tensor among the arguments that has one row per datum, in the computation's dtype."""
        for leaf in pytree.tree_leaves((self.args, self.kwargs)):
            if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == self.n_obs:
                return leaf
        raise ValueError("no argument of the model has one row per datum")

    def constrain(self, z: Tensor) -> dict[str, Tensor]:
        """Map z (S, N, d) to the program's own sites: name -> (S, N, *shape); NaN where a latent is masked out."""
        fixed = all(site.transform is not None for site in self.sites)  # else a support may depend on an earlier site

        def values(u: Tensor) -> Tensor:
            drawn = {} if fixed else self.run("model", self.program.assignments[0], z=u).values
            parts = []
            for site in self.sites:
                value = drawn[site.name] if site.transform is None else site.transform(site.split(u))
                parts.append(site.gather(value, site.event_dim).reshape(len(u), -1))
            return torch.cat(parts, -1) if parts else u

        flat = self._map(values, z)
        sizes = [math.prod(site.shape) for site in self.sites]
        out = {}
        for site, part in zip(self.sites, flat.split(sizes, -1), strict=True):
            if self.program.active is not None:
                shown = self.program.active[:, site.columns]
                if shown.shape[-1] != part.shape[-1]:  # e.g. a simplex: masked as a whole
                    shown = shown.any(-1, keepdim=True)
                part = torch.where(shown, part, torch.full_like(part, torch.nan))
            out[site.name] = part.reshape(*part.shape[:-1], *site.shape)
        return out

    def shared(self, z: Tensor) -> Tensor:
        """Return log p(x_n, z_g) of every datum at the same points, (G, N), for z of shape (G, d).

        Where the program broadcasts over a leading dimension and its likelihood factorises, z is decoded once and the data
        enter through one matrix product; this is checked against plain evaluation and left where they differ. It has no
        gradient. The data's side of the product is kept for the next call.
        """
        if self.can_share():
            return shared.evaluate(self, z, self._kept)
        return self(z[:, None].expand(-1, self.n_obs, -1))

    def shared_over(self, z: Tensor, blocks: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield `shared` of the data `rows` of each block in turn, (G, len(rows)), decoding z once where that is possible."""
        self.can_share()
        return shared.over(self, z, blocks)

    def can_share(self) -> bool:
        """Whether one grid can be evaluated for all data at once; tried once."""
        if self.shares is None:
            self.shares = shared.settle(self)
        return self.shares

    def subset(self, rows: Tensor) -> LogJoint | None:
        """Return the same object for some of the data, (len(rows),) indices; None where the arguments cannot be taken apart.

        The tensors among the arguments are indexed along the dimension that has N entries; the first time, the result for
        most data in another order is compared with the full evaluation before this is trusted.
        """
        if self.program.index:
            return None
        return self._subset(rows) if self.separable() else None

    def _subset(self, rows: Tensor) -> LogJoint:
        def take(t: Any, dim: int | None) -> Any:
            return t if dim is None else t.index_select(dim, rows)

        part = copy.copy(self)
        part.args, part.kwargs = self.with_leaves([take(t, dim) for t, dim in zip(self.leaves(), self.along, strict=True)])
        active = None if self.program.active is None else self.program.active[rows]
        part.program = dataclasses.replace(self.program, n_obs=len(rows), active=active)
        part.n_obs, part._whole = len(rows), self.root
        part.joined = dict(self.joined)
        part.tested = self.tested[:, rows]
        return part

    def separable(self) -> bool:
        """Whether the arguments can be taken apart by datum; found out the first time."""
        if not self.separates:
            with policy("never"):
                self.separates.append(self._separable())
        return self.separates[0]

    def _separable(self) -> bool:
        """Compare most of the data, in reverse, and the last one alone with the full evaluation."""
        whole = self(self.tested)
        close = 1e-6 if whole.dtype == torch.float64 else 1e-4
        last = self.n_obs - 1
        try:
            for rows in (torch.arange(max(1, last), device=self.device).flip(0), torch.tensor([last], device=self.device)):
                part = self._subset(rows)
                mine, full = part(part.tested), whole[:, rows]
                finite = full.isfinite()
                if not torch.allclose(mine[finite], full[finite], rtol=close, atol=close):
                    return False
        except (RuntimeError, ValueError, IndexError):
            return False
        return True

    def leaves(self) -> list[Any]:
        """Return the leaves of the arguments."""
        return pytree.tree_leaves((self.args, self.kwargs))

    def with_leaves(self, leaves: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return arguments of the same structure with other leaves."""
        args, kwargs = pytree.tree_unflatten(leaves, pytree.tree_structure((self.args, self.kwargs)))
        return args, kwargs

    @property
    def root(self) -> LogJoint:
        """The object of all data, of which this is a part."""
        return self._whole or self

    def _data_dimensions(self) -> list[int | None]:
        """Return the dimension with N entries of each leaf of the arguments, the first where there are several."""
        leaves, n = self.leaves(), self.n_obs
        return [list(t.shape).index(n) if isinstance(t, Tensor) and n in t.shape else None for t in leaves]

    def converted(self, dtype: torch.dtype) -> LogJoint:
        """Return the same densities, of the same weights and arguments, evaluated in another precision."""
        other = self.variant()
        other.snapshot = self.snapshot.converted(dtype)

        def convert(t: Any) -> Any:
            return Snapshot.convert(t, dtype) if isinstance(t, Tensor) else t

        other.args, other.kwargs = pytree.tree_map(convert, (self.args, self.kwargs))
        other.program = _in(dtype, self.program)
        if isinstance(self.model, Promoted) and isinstance(self.guide, Promoted):
            other.model, other.guide = Promoted(self.model.program, dtype), Promoted(self.guide.program, dtype)
        other.tested = self.tested.to(dtype)
        return other

    def variant(self) -> LogJoint:
        """Return a copy whose arguments or program may be replaced."""
        other = copy.copy(self)
        other.graphs, other._whole, other.joined = Graphs(), None, dict(self.joined)
        return other

    def blocks(self, size: int) -> list[LogJoint]:
        """Split the data, in order, into parts of at most `size`; one part where the arguments cannot be taken apart."""
        if self.n_obs <= size:
            return [self]
        parts = []
        for rows in torch.arange(self.n_obs, device=self.device).split(max(1, size)):
            part = self.subset(rows)
            if part is None:
                return [self]
            parts.append(part)
        return parts

    def held(self) -> contextlib.AbstractContextManager[None]:
        """Keep the weights swapped in around many evaluations."""
        return self.snapshot.scope()

    # -- running the program --------------------------------------------------------------------------------------------

    def run(self, which: Which, assignment: dict[str, Tensor], **options: Any) -> Feed:
        """Run one of the two programs once, inside the snapshot's scope, and return what was read off."""
        with Feed(self.program, assignment, index=self._index, **options) as feed:
            (self.model if which == "model" else self.guide)(*self.args, **self.kwargs)
        return feed

    def _joint(self, z: Tensor, assignment: dict[str, Tensor]) -> Tensor:
        feed = self.run("model", assignment, z=z)
        return feed.log_prior + feed.log_likelihood + feed.log_det + self._padding(z)

    def _guide_density(self, z: Tensor, assignment: dict[str, Tensor]) -> Tensor:
        if self.program.active is None and all(site.transform is not None for site in self.sites):
            values, log_det = self._transform(z)
        else:  # a support depends on an earlier site, or a mask on the site: the model says how
            model = self.run("model", assignment or self.program.assignments[0], z=z)
            values, log_det = model.values, model.log_det
        feed = self.run("guide", assignment, values=values)
        return feed.log_prior + log_det + self._padding(z)

    def _transform(self, z: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Constrain z (N, d) without running the model: values by site, and the log Jacobian (N,)."""
        values, log_det = {}, z.new_zeros(len(z))
        for site in self.sites:
            transform = site.transform
            if transform is None:
                raise ValueError(f"site {site.name!r} has a support that depends on other sites")
            u = site.split(z)
            values[site.name] = transform(u)
            det = transform.log_abs_det_jacobian(u, values[site.name])
            batch_ndim = u.dim() - site.free_event_dim
            det = det.flatten(batch_ndim).sum(-1) if det.dim() > batch_ndim else det
            log_det = log_det + per_datum(det, site.plate_dim, len(z))
        return values, log_det

    def _guide_assignments(self) -> list[dict[str, Tensor]]:
        """The discrete values to sum over in q: those of the sites that the guide draws."""
        if any(site.name in self.program.guide_sites for site in self.program.discrete):
            names = {s.name for s in self.program.discrete} - self.program.guide_sites
            if names:
                raise UnsupportedProgram(
                    f"guide: it draws some discrete sites but not {sorted(names)[0]!r}: draw all of them or none"
                )
            return self.program.assignments
        return [{}]

    def _padding(self, z: Tensor) -> Tensor | float:
        """Return the N(0, 1) log density of the coordinates that a mask removed."""
        active = self.program.active
        if active is None:
            return 0.0
        if len(active) != len(z):
            active = active.repeat(len(z) // len(active), 1)
        return (torch.where(active, 0.0, 1.0) * (-0.5 * z.square() - HALF_LOG_2PI)).sum(-1)

    def _fast(self, kind: Kind, z: Tensor) -> tuple[Tensor, ...] | None:
        """Evaluate by a graph; None where there is none yet, or the caller wants to differentiate."""
        if self.dim == 0 or z.dim() != 3 or tuple(z.shape[1:]) != (self.n_obs, self.dim):
            return None
        if z.requires_grad and torch.is_grad_enabled():
            return None
        graph = self.graphs.ready(self, kind)
        return None if graph is None else self.by_graph(graph, z)

    def by_graph(self, graph: Function, z: Tensor, *beside: Tensor) -> tuple[Tensor, ...]:
        """Evaluate a graph of `elbowroom.inference.target.graphs` at z (S, N, d), in parts that stay in the caches.

        Args:
            graph: with outputs (S, N, ...).
            z: (S, N, d).
            *beside: what it takes beside z and the data: (S or 1, N, ...) or numbers.
        """
        n, draws = self.n_obs, len(z)
        given_data = inputs(self)
        rows = max(64, self._rows // FINER) if self.device.type == "cpu" else self._rows
        several = -(-n // rows)  # blocks of equal size, of about so many data
        block = -(-n // several)
        chunk = max(1, rows // block)
        out: list[Tensor] = []
        with self.snapshot.scope():
            z = z.to(self.dtype or self.own_dtype)
            for data in range(0, n, block):
                some = slice(data, min(data + block, n))
                leaves = [t if dim is None else t.narrow(dim, data, some.stop - data) for t, dim in given_data]
                for start in range(0, draws, chunk):
                    here = slice(start, start + chunk)
                    given = [t if t.dim() == 0 else t[here if len(t) > 1 else slice(1), some] for t in beside]
                    found = graph(z[here, some], *given, *leaves)
                    if block >= n and chunk >= draws:
                        return found
                    out = out or [t.new_empty(draws, n, *t.shape[2:]) for t in found]
                    for whole, part in zip(out, found, strict=True):
                        whole[here, some] = part
        return tuple(out)

    def _map(self, function: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
        """Apply a function of (N, d) to every draw of (S, N, d), a bounded number of rows at a time."""
        if z.dim() != 3 or tuple(z.shape[1:]) != (self.n_obs, self.dim):
            raise ValueError(f"z has shape {tuple(z.shape)}; expected (draws, {self.n_obs}, {self.dim})")
        with self.snapshot.scope():
            z = z.to(self.dtype or self.own_dtype)
            chunk = max(1, self._rows // self.n_obs)
            parts = z.split(chunk)
            first = self._map_chunk(function, parts[0])
            if len(parts) == 1 or first.requires_grad:
                return torch.cat([first, *(self._map_chunk(function, part) for part in parts[1:])])
            out = first.new_empty(len(z), *first.shape[1:])  # small results between large ones would tear the heap apart
            out[:chunk] = first
            for i, part in enumerate(parts[1:], 1):
                out[i * chunk : (i + 1) * chunk] = self._map_chunk(function, part)
            return out

    def _map_chunk(self, function: Callable[[Tensor], Any], z: Tensor) -> Any:
        """Apply a function of (N, d) to every draw of (S, N, d); it returns a tensor (N, ...) or a tuple of them."""
        if self.mode == "vmap":
            return torch.func.vmap(function, randomness="different")(z)
        if self.mode == "repeat" and len(z) > 1:
            with self._repeated(len(z)):
                return pytree.tree_map(lambda t: t.unflatten(0, z.shape[:2]), function(z.flatten(0, 1)))
        return pytree.tree_map(lambda *t: torch.stack(t), *[function(u) for u in z])

    def draw(self, which: Which, n_draws: int, seed: int) -> Tensor:
        """Run a program forward and read off the local sites, in unconstrained coordinates: (S, N, d)."""
        with seeded(seed), self.snapshot.scope(), torch.no_grad():
            chunk = max(1, 8 * ROWS // self.n_obs)
            sizes = [chunk] * (n_draws // chunk) + [n_draws % chunk] * (n_draws % chunk > 0)
            z = torch.cat([forward(self, which, size) for size in sizes])
            if self.program.active is not None:
                z = torch.where(self.program.active, z, torch.randn_like(z))
            return z

    # -- construction ---------------------------------------------------------------------------------------------------

    def take(self, dtype: torch.dtype | None) -> None:
        """Copy weights, arguments and pinned values in `dtype`."""
        self.snapshot.take(dtype)
        self.args, self.kwargs = self.snapshot.args, self.snapshot.kwargs
        self._index: dict[str, Tensor] = dict(self.program.index)
        self.program = _in(dtype or self.own_dtype, self.program)

    def promote(self, dtype: torch.dtype) -> None:
        """Compute both programs in `dtype` throughout, where one of them holds or makes numbers of another precision."""
        if isinstance(self.model, Promoted):
            return
        with seeded(0), self.snapshot.scope(), torch.no_grad():
            if any(mixes(partial(self.run, which, {}), dtype) for which in ("model", "guide")):
                self.model, self.guide = Promoted(self.model, dtype), Promoted(self.guide, dtype)

    def _rows_at_once(self) -> int:
        """Return how many rows (draws x data) to evaluate together: wide data in small parts, which stay in the caches."""
        if self.device.type != "cpu":
            return ROWS
        leaves = [t for t in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(t, Tensor) and self.n_obs in t.shape]
        width = max((t.numel() // self.n_obs for t in leaves), default=1)
        return max(64, min(ROWS, ENTRIES // max(1, width)))

    @property
    def dtype(self) -> torch.dtype | None:
        """The floating-point type of all computations; None for the program's own."""
        return self.snapshot.dtype

    @property
    def own_dtype(self) -> torch.dtype:
        """The floating-point type that the programs themselves compute in."""
        floating = (t.dtype for t in self.snapshot.leaves() if t.is_floating_point())
        return next(floating, torch.get_default_dtype())

    def note(self, sentence: str) -> None:
        """Record and log one sentence."""
        self.notes.append(sentence)
        log.info(sentence)

    # -- scopes --------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _repeated(self, times: int) -> Iterator[None]:
        """Repeat the arguments along the data plate, draw by draw."""
        args, kwargs, index = self.args, self.kwargs, self._index
        if index:
            self._index = {name: value.repeat(times) for name, value in index.items()}
        else:

            def repeat(t: Any, dim: int | None) -> Any:
                return t if dim is None else t.repeat(*[times if i == dim else 1 for i in range(t.dim())])

            leaves = [repeat(t, dim) for t, dim in zip(self.leaves(), self.along, strict=True)]
            self.args, self.kwargs = self.with_leaves(leaves)
        try:
            yield
        finally:
            self.args, self.kwargs, self._index = args, kwargs, index


def _logsumexp(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.logsumexp(torch.stack(list(parts)), 0)


def _summed_out(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Sum discrete assignments out of pairs log p(z, c), log p(x|z, c): log p(z) and log p(x|z)."""
    if len(pairs) == 1:
        return pairs[0]
    priors = torch.stack([prior for prior, _ in pairs])
    joints = torch.stack([prior + likelihood for prior, likelihood in pairs])
    prior = torch.logsumexp(priors, 0)
    return prior, torch.logsumexp(joints, 0) - prior


def _in(dtype: torch.dtype, program: Program) -> Program:
    """Return a program whose pinned values and tables of discrete values are in `dtype`, where they are floating point."""
    pinned = {name: Snapshot.convert(value, dtype) for name, value in program.pinned.items()}
    tables = [site.values for site in program.discrete]
    discrete = tuple(
        site if table is None else dataclasses.replace(site, values=Snapshot.convert(table, dtype))
        for site, table in zip(program.discrete, tables, strict=True)
    )
    return dataclasses.replace(program, pinned=pinned, discrete=discrete)
