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
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.distributions import biject_to
from torch.utils import _pytree as pytree

from elbowroom.errors import UnsupportedProgram
from elbowroom.inference.feed import Feed
from elbowroom.inference.inspection import inspect
from elbowroom.inference.program import per_datum
from elbowroom.inference.snapshot import Snapshot

log = logging.getLogger("elbowroom")

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
ROWS = 2**15  # decoder rows (draws x data) evaluated at once
ENTRIES = 2**20  # rows x width of a datum evaluated at once on a CPU: what its caches hold


class LogJoint:
    """log p(x_n, z) of any Pyro (model, guide) pair, per datum, in unconstrained coordinates.

    The weights are those of the moment of construction (a snapshot), evaluated in `dtype` with every module in eval mode;
    modules, Pyro's validation and the parameter store are put back after each call.

    Args:
        model: Pyro program p(x, z), with a data plate.
        guide: Pyro program q(z|x), with the same plate.
        *args: arguments of both programs.
        plate: name of the data plate, where several could be meant.
        dtype: floating-point type of all computations; None keeps the program's own.
        **kwargs: keyword arguments of both programs.

    Attributes:
        program: what was learnt from running the pair.
        n_obs: number of data N.
        dim: number of unconstrained continuous coordinates d per datum.
        sites: the continuous local sites, in program order.
        mode: how draws are evaluated together: `vmap`, `repeat` or `loop`.
        draws_in_plate: whether the guide broadcasts over an outer plate of draws.
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
        with self.snapshot.eval_mode(), _seeded(0), torch.no_grad(), pyro.validation_enabled(True):
            self.program = inspect(model, guide, args, kwargs, plate)
        self.n_obs, self.dim, self.sites = self.program.n_obs, self.program.dim, self.program.sites
        self.plate = self.program.plate
        self.notes = self.program.notes
        self.device = next((t.device for t in self.snapshot.leaves() if isinstance(t, Tensor)), torch.device("cpu"))
        self._take(None)
        self._rows = self._rows_at_once()
        self.mode = "loop"
        self.draws_in_plate: bool | None = None
        self._probe(dtype)
        self.shares: bool | None = None

    # -- the interface --------------------------------------------------------------------------------------------------

    def __call__(self, z: Tensor) -> Tensor:
        """Return log p(x_n, z_sn) with the Jacobian, (S, N), for z of shape (S, N, d)."""
        parts = [self._map(partial(self._joint, assignment=a), z) for a in self.program.assignments]
        return parts[0] if len(parts) == 1 else torch.logsumexp(torch.stack(parts), 0)

    def terms(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return log p(z) with the Jacobian and log p(x_n|z), each (S, N); only where no discrete site is summed out."""
        if self.program.discrete:
            raise ValueError("terms: the joint is a sum over discrete values and has no single prior and likelihood term")

        def both(u: Tensor) -> Tensor:
            feed = self._run(self.model, {}, z=u, index=self._index)
            prior = feed.log_prior + feed.log_det + self._padding(u)
            return torch.stack([prior, torch.as_tensor(feed.log_likelihood).expand_as(prior)], -1)

        pair = self._map(both, z)
        return pair[..., 0], pair[..., 1]

    def grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return log p(x_n, z_sn), (S, N), and its gradient in z, (S, N, d)."""
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            value = self(z)
            (gradient,) = torch.autograd.grad(value.sum(), z)
        return value.detach(), gradient

    def log_guide(self, z: Tensor) -> Tensor:
        """Return log q(z_sn | x_n) in unconstrained coordinates, (S, N), for z of shape (S, N, d)."""
        parts = [self._map(partial(self._guide_density, assignment=a), z) for a in self._guide_assignments()]
        return parts[0] if len(parts) == 1 else torch.logsumexp(torch.stack(parts), 0)

    def assignment_probabilities(self, z: Tensor) -> Tensor:
        """Return p(discrete assignment | x_n, z_sn), (A, S, N), over `program.assignments`."""
        parts = torch.stack([self._map(partial(self._joint, assignment=a), z) for a in self.program.assignments])
        return torch.softmax(parts, 0)

    def sample_guide(self, n_draws: int, seed: int) -> tuple[Tensor, Tensor]:
        """Draw z ~ q(z|x): z (S, N, d) and log q(z|x), (S, N), in unconstrained coordinates."""
        z = self._draw(self.guide, n_draws, seed)
        return z, self.log_guide(z)

    def sample_prior(self, n_draws: int, seed: int) -> Tensor:
        """Draw the latents from the generative program, ignoring the data: z (S, N, d), unconstrained."""
        return self._draw(self.model, n_draws, seed)

    def data(self) -> Tensor:
        """Return the first tensor among the arguments that has one row per datum, in the computation's dtype."""
        for leaf in pytree.tree_leaves((self._args, self._kwargs)):
            if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == self.n_obs:
                return leaf
        raise ValueError("no argument of the model has one row per datum")

    def constrain(self, z: Tensor) -> dict[str, Tensor]:
        """Map z (S, N, d) to the program's own sites: name -> (S, N, *shape); NaN where a latent is masked out."""

        def values(u: Tensor) -> Tensor:
            feed = self._run(self.model, self.program.assignments[0], z=u)
            parts = [site.gather(feed.values[site.name], site.event_dim) for site in self.sites]
            return torch.cat([part.reshape(len(u), -1) for part in parts], -1) if parts else u

        flat = self._map(values, z)
        sizes = [math.prod(site.shape) for site in self.sites]
        out = {}
        for site, part in zip(self.sites, flat.split(sizes, -1), strict=True):
            if self.program.active is not None:
                shown = self.program.active[:, site.columns].any(-1)
                part = torch.where(shown[:, None], part, torch.full_like(part, torch.nan))
            out[site.name] = part.reshape(*part.shape[:-1], *site.shape)
        return out

    def shared(self, z: Tensor) -> Tensor:
        """Return log p(x_n, z_g) of every datum at the same points, (G, N), for z of shape (G, d).

        Where the program broadcasts over a leading dimension and its likelihood factorises, z is decoded once and the data
        enter through one matrix product; this is checked against plain evaluation and left where they differ.
        """
        if self.shares is None:
            self.shares = self._probe_shared(z)
        if self.shares:
            return self._shared(z)
        return self(z[:, None].expand(-1, self.n_obs, -1))

    def subset(self, rows: Tensor) -> LogJoint | None:
        """Return the same object for some of the data, (len(rows),) indices; None where the arguments cannot be taken apart.

        The tensors among the arguments are indexed along the dimension that has N entries; the result is compared with the
        full evaluation before it is trusted.
        """
        if self.program.index:
            return None

        def take(t: Any) -> Any:
            if not isinstance(t, Tensor) or self.n_obs not in t.shape:
                return t
            return t.index_select(list(t.shape).index(self.n_obs), rows)

        part = copy.copy(self)
        part._args, part._kwargs = pytree.tree_map(take, (self._args, self._kwargs))
        active = None if self.program.active is None else self.program.active[rows]
        part.program = dataclasses.replace(self.program, n_obs=len(rows), active=active)
        part.n_obs = len(rows)
        z = torch.linspace(-0.5, 0.5, self.n_obs * self.dim, dtype=self.dtype, device=self.device)
        z = z.reshape(1, self.n_obs, self.dim)
        try:
            same = torch.allclose(part(z[:, rows]), self(z)[:, rows], rtol=1e-6, atol=1e-6)
        except (RuntimeError, ValueError, IndexError):
            return None
        return part if same else None

    # -- running the program --------------------------------------------------------------------------------------------

    def _run(self, program: Callable[..., Any], assignment: dict[str, Tensor], **options: Any) -> Feed:
        with Feed(self.program, assignment, **options) as feed:
            program(*self._args, **self._kwargs)
        return feed

    def _joint(self, z: Tensor, assignment: dict[str, Tensor]) -> Tensor:
        feed = self._run(self.model, assignment, z=z, index=self._index)
        return feed.log_prior + feed.log_likelihood + feed.log_det + self._padding(z)

    def _guide_density(self, z: Tensor, assignment: dict[str, Tensor]) -> Tensor:
        if self.program.active is None and all(site.transform is not None for site in self.sites):
            values, log_det = self._transform(z)
        else:  # a support depends on an earlier site, or a mask on the site: the model says how
            model = self._run(self.model, assignment or self.program.assignments[0], z=z, index=self._index)
            values, log_det = model.values, model.log_det
        feed = self._run(self.guide, assignment, values=values, index=self._index)
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

    def _map(self, function: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
        """Apply a function of (N, d) to every draw of (S, N, d), a bounded number of rows at a time."""
        if z.dim() != 3 or tuple(z.shape[1:]) != (self.n_obs, self.dim):
            raise ValueError(f"z has shape {tuple(z.shape)}; expected (draws, {self.n_obs}, {self.dim})")
        with self.snapshot.scope():
            z = z if self.dtype is None else z.to(self.dtype)
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

    def _map_chunk(self, function: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
        if self.mode == "vmap":
            return torch.func.vmap(function, randomness="different")(z)
        if self.mode == "repeat" and len(z) > 1:
            with self._repeated(len(z)):
                return function(z.flatten(0, 1)).unflatten(0, z.shape[:2])
        return torch.stack([function(u) for u in z])

    def _draw(self, program: Callable[..., Any], n_draws: int, seed: int) -> Tensor:
        """Run a program forward and read off the local sites, in unconstrained coordinates: (S, N, d)."""
        with _seeded(seed), self.snapshot.scope(), torch.no_grad():
            chunk = max(1, 8 * ROWS // self.n_obs)
            sizes = [chunk] * (n_draws // chunk) + [n_draws % chunk] * (n_draws % chunk > 0)
            z = torch.cat([self._forward(program, size) for size in sizes])
            if self.program.active is not None:
                z = torch.where(self.program.active, z, torch.randn_like(z))
            return z

    def _forward(self, program: Callable[..., Any], n_draws: int) -> Tensor:
        """Draw all at once in an outer plate, where the program broadcasts; else one run per draw."""
        if self.draws_in_plate is not False:
            dim = -self.program.nesting - 1
            try:
                with pyro.plate("_draws", n_draws, dim=dim):
                    drawn = self._run(program, {}, index=self._index)
                values = {}
                for site in (*self.sites, *self.program.discrete):
                    if site.name in drawn.values:
                        value = drawn.values[site.name].movedim(dim - site.event_dim, 0)
                        keep = value.dim() - site.batch_ndim - site.event_dim
                        values[site.name] = value.flatten(0, keep - 1) if keep > 1 else value
                z = self._free(values)
                if z.shape != (n_draws, self.n_obs, self.dim):
                    raise RuntimeError(f"draws have shape {tuple(z.shape)}")
                self.draws_in_plate = True
                return z
            except (RuntimeError, ValueError, IndexError) as error:
                if self.draws_in_plate:
                    raise
                self.draws_in_plate = False
                self._note(f"drawn one at a time, the program does not broadcast over draws: {_first_line(error)}")
        runs = [self._run(program, {}, index=self._index).values for _ in range(n_draws)]
        return self._free({name: torch.stack([run[name] for run in runs]) for name in runs[0]})

    def _free(self, values: dict[str, Tensor]) -> Tensor:
        """Map constrained values (S, batch, event) of all local sites to unconstrained coordinates (S, N, d)."""
        n_draws = len(next(iter(values.values()))) if values else 0
        if all(site.transform is not None for site in self.sites):
            parts = []
            for site in self.sites:
                u = site.transform.inv(values[site.name])  # type: ignore[union-attr]
                parts.append(u.movedim(site.plate_dim - site.free_event_dim, 1).reshape(n_draws, self.n_obs, -1))
            return torch.cat(parts, -1)
        runs = []
        for s in range(n_draws):
            given = {name: value[s] for name, value in values.items()}
            discrete = {site.name: given.pop(site.name) for site in self.program.discrete if site.name in given}
            model = self._run(self.model, discrete, values=given, index=self._index)
            parts = []
            for site in self.sites:
                u = biject_to(model.supports[site.name]).inv(model.values[site.name])
                parts.append(site.gather(u, site.free_event_dim).reshape(self.n_obs, -1))
            runs.append(torch.cat(parts, -1))
        return torch.stack(runs)

    def _shared(self, z: Tensor) -> Tensor:
        with self.snapshot.scope():
            z = z if self.dtype is None else z.to(self.dtype)
            rows = max(1, min(ROWS * 8 // self.n_obs, self._rows))
            parts = []
            for u in z.split(rows):
                totals = []
                for a in self.program.assignments:
                    feed = self._run(self.model, a, z=u[:, None], index=self._index, shared=True)
                    totals.append((feed.log_prior + feed.log_likelihood + feed.log_det).expand(len(u), self.n_obs))
                parts.append(totals[0] if len(totals) == 1 else torch.logsumexp(torch.stack(totals), 0))
            return torch.cat(parts)

    def _probe_shared(self, z: Tensor) -> bool:
        if any(site.plate_dim != -1 or site.batch_ndim != 1 for site in self.sites) or self.program.active is not None:
            return False
        some = z[torch.linspace(0, len(z) - 1, 3, device=z.device).long()]
        try:
            fast = self._shared(some)
        except (RuntimeError, ValueError, IndexError) as error:
            self._note(f"shared grid: the program does not broadcast over draws ({_first_line(error)}); evaluated per datum")
            return False
        slow = self(some[:, None].expand(-1, self.n_obs, -1))
        agree = fast.shape == slow.shape and torch.allclose(fast, slow, rtol=1e-5, atol=1e-5)
        if not agree:
            self._note("shared grid: broadcasting the program over draws changed its values; evaluated per datum")
        return agree

    # -- construction ---------------------------------------------------------------------------------------------------

    def _probe(self, dtype: torch.dtype | None) -> None:
        """Check on real values that the density is deterministic and local, then choose the fastest right evaluation."""
        z = self._draw(self.guide, 2, seed=0)
        base = self(z)
        if not base.isfinite().all():
            row = int((~base.isfinite()).any(0).nonzero()[0])
            raise UnsupportedProgram(f"model: log p(x, z) of datum {row} is not finite at a draw of the guide")
        if not torch.equal(base, self(z)):
            raise UnsupportedProgram(
                "model: its log density changes between two evaluations at the same z; something draws random numbers outside "
                "a sample site (dropout left on?) or depends on a value that was integrated out"
            )
        self._check_local(z, base)
        self._check_outside(z)
        own = next((t.dtype for t in self.snapshot.leaves() if t.is_floating_point()), torch.get_default_dtype())
        if dtype is not None:
            try:
                self._take(dtype)
                in_dtype = self(z.to(dtype))
                if not torch.allclose(in_dtype, base.to(dtype), rtol=1e-3, atol=1e-2):
                    raise RuntimeError("values differ by more than rounding")
                base, z = in_dtype, z.to(dtype)
            except (RuntimeError, TypeError) as error:
                self._take(None)
                self._note(f"evaluated in {own}, not {dtype}: {_first_line(error)}")
        for mode in ("vmap", "repeat"):
            self.mode = mode
            try:
                ok = torch.allclose(self(z), base, rtol=1e-4, atol=1e-4) and self.log_guide(z).shape == base.shape
                gradient = self.grad(z)[1] if ok and self.dim else None
                if ok and (gradient is None or gradient.isfinite().all()):
                    return
                reason = "its values differ from one draw at a time"
            except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
                reason = _first_line(error)
            self._note(f"{mode} over draws does not apply: {reason}")
        self.mode = "loop"

    def _check_local(self, z: Tensor, base: Tensor) -> None:
        if self.n_obs < 2 or self.dim == 0:
            return
        moved = z.clone()
        moved[:, 0] += 0.3
        after = self(moved)
        if not torch.allclose(after[:, 1:], base[:, 1:], rtol=1e-4, atol=1e-4):
            raise UnsupportedProgram(
                "model: moving the latent of datum 0 changes log p of other data; the data are coupled (batch normalisation "
                "in train mode, or a latent shared between data), so no per-datum posterior exists"
            )

    def _check_outside(self, z: Tensor) -> None:
        if self.dim == 0:
            return
        with self.snapshot.scope():
            a, b = (self._run(self.model, self.program.assignments[0], z=u, index=self._index).outside for u in (z[0], z[1]))
        if not torch.allclose(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-4, atol=1e-4):
            raise UnsupportedProgram(
                f"model: an observed site outside plate {self.plate!r} depends on the local latents, so the data are coupled "
                "through it; move it inside the plate"
            )

    def _take(self, dtype: torch.dtype | None) -> None:
        """Copy weights, arguments and pinned values in `dtype`."""
        self.snapshot.take(dtype)
        self._args, self._kwargs = self.snapshot.args, self.snapshot.kwargs
        self._index: dict[str, Tensor] = dict(self.program.index)
        pinned = {name: Snapshot.convert(value, dtype) for name, value in self.program.pinned.items()}
        self.program = dataclasses.replace(self.program, pinned=pinned)

    def _rows_at_once(self) -> int:
        """Return how many rows (draws x data) to evaluate together: wide data in small parts, which stay in the caches."""
        if self.device.type != "cpu":
            return ROWS
        leaves = [t for t in pytree.tree_leaves((self._args, self._kwargs)) if isinstance(t, Tensor) and self.n_obs in t.shape]
        width = max((t.numel() // self.n_obs for t in leaves), default=1)
        return max(64, min(ROWS, ENTRIES // max(1, width)))

    @property
    def dtype(self) -> torch.dtype | None:
        """The floating-point type of all computations; None for the program's own."""
        return self.snapshot.dtype

    def _note(self, sentence: str) -> None:
        self.notes.append(sentence)
        log.info(sentence)

    # -- scopes --------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _repeated(self, times: int) -> Iterator[None]:
        """Repeat the arguments along the data plate, draw by draw."""
        args, kwargs, index = self._args, self._kwargs, self._index
        if index:
            self._index = {name: value.repeat(times) for name, value in index.items()}
        else:

            def repeat(t: Any) -> Any:
                if not isinstance(t, Tensor) or self.n_obs not in t.shape:
                    return t
                dim = list(t.shape).index(self.n_obs)
                return t.repeat(*[times if i == dim else 1 for i in range(t.dim())])

            self._args, self._kwargs = pytree.tree_map(repeat, (args, kwargs))
        try:
            yield
        finally:
            self._args, self._kwargs, self._index = args, kwargs, index


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]
