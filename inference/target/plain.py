"""The log joint by Pyro's handlers: log p(x_n, z) of any (model, guide) pair.

`PlainLogJoint` contains everything that runs the two programs. `LogJoint` (log_joint.py) adds compiled graphs, shared points
and draws; its results are compared with the evaluations here.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Self

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.utils import _pytree as pytree

from elbowroom.errors import UnsupportedProgram
from elbowroom.inference.program.carriers import clean, with_density
from elbowroom.inference.program.frozen import arguments
from elbowroom.inference.program.frozen.promotion import Promoted, mixed, mixes
from elbowroom.inference.program.frozen.snapshot import Snapshot, program_in
from elbowroom.inference.program.inspection.pair import inspect
from elbowroom.inference.program.latents import log_sum, summed_out
from elbowroom.inference.program.replay import Replay, Which
from elbowroom.inference.randomness import seeded
from elbowroom.system.memory import fitting

log = logging.getLogger("elbowroom")

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
ROWS = 2**15  # decoder rows (draws x data) evaluated at once
ENTRIES = 2**20  # rows x width of a datum evaluated at once on a CPU, to fit its caches


class PlainLogJoint:
    """log p(x_n, z) and log q(z|x_n) per datum in unconstrained coordinates, by running the programs.

    See `LogJoint` for arguments, attributes and errors.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    _index: dict[str, Tensor]

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        *args: Any,
        plate: str | None = None,
        hold: Sequence[str] = (),
        dtype: torch.dtype | None = torch.float64,
        **kwargs: Any,
    ) -> None:
        guide = with_density(guide, args, kwargs)
        self.model, self.guide = model, guide
        self.snapshot = Snapshot((model, guide), args, kwargs)
        try:
            self._build(args, kwargs, (plate, hold), dtype)
        except (RuntimeError, UnsupportedProgram) as error:  # e.g. from a prior never drawn in training, or NumPy data
            if dtype is None or not (mixed(error) or mixed(error.__cause__)):
                raise
            self.model, self.guide = Promoted(model, dtype), Promoted(guide, dtype)
            self._build(args, kwargs, (plate, hold), dtype)
            self.note(f"the program mixes precisions and does not run as it is; all is computed in {dtype}")

    def _build(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], plates: tuple[str | None, Sequence[str]], dtype: torch.dtype | None
    ) -> None:
        with self.snapshot.eval_mode(), seeded(0), torch.no_grad(), pyro.validation_enabled(True):
            try:
                self.program = inspect(self.model, self.guide, args, kwargs, *plates)
            except ZeroDivisionError as error:  # Pyro raises it for a plate without entries
                raise UnsupportedProgram("model: a plate is empty; is there no row of data?") from error
        self.n_obs, self.dim, self.sites = self.program.n_obs, self.program.dim, self.program.sites
        self.plate = self.program.plate
        self.notes = self.program.notes
        self.device = next((t.device for t in self.snapshot.leaves() if isinstance(t, Tensor)), torch.device("cpu"))
        self.set_dtype(None)
        self._rows = self._rows_at_once()
        self.mode = "loop"
        self.batched_draws: dict[Which, bool | None] = {"model": None, "guide": None}
        self.separates: list[bool] = []
        self.model_separates: list[bool] = []
        self.amortized = True
        self.data_dims = self._data_dimensions()
        self.probe_points = torch.empty(0, self.n_obs, self.dim)  # until the probe
        self._whole: Self | None = None

    # -- log densities of draws of all data, (S, N, d) -> (S, N) -----------------------------------------------------------

    def __call__(self, z: Tensor) -> Tensor:
        """Return log p(x_n, z_sn) with the Jacobian, (S, N), for z of shape (S, N, d)."""
        return self._map(self.density, z)

    def terms(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return log p(z) with the Jacobian and log p(x_n|z), each (S, N), with discrete sites summed out."""
        prior, likelihood = self._map(lambda u: torch.stack(self.densities(u), -1), z).unbind(-1)
        return prior, likelihood

    def grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return log p(x_n, z_sn), (S, N), and its gradient in z, (S, N, d)."""

        def evaluate(u: Tensor) -> tuple[Tensor, ...]:
            value = self._map(self.density, u)
            return value.detach(), gradient_in(u, value)

        value, gradient = self._backward(z, evaluate)
        return value, gradient

    def parts(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return log p(z) and log p(x_n|z) as `terms`, (S, N) each, and the gradient of each in z, (S, N, d)."""

        def evaluate(u: Tensor) -> tuple[Tensor, ...]:
            prior, likelihood = self._map_chunk(self.densities, u)
            return with_gradients(prior, likelihood, u)

        prior, likelihood, of_prior, of_likelihood = self._backward(z, evaluate)
        return prior, likelihood, of_prior, of_likelihood

    def log_guide(self, z: Tensor) -> Tensor:
        """Return log q(z_sn | x_n) in unconstrained coordinates, (S, N), for z of shape (S, N, d)."""
        return self._map(self.guide_density, z)

    # -- the densities of one draw of all data, (N, d) -> (N,) -------------------------------------------------------------

    def density(self, z: Tensor) -> Tensor:
        """Return log p(x_n, z_n) with the Jacobian, (N,), for z of shape (N, d)."""
        return log_sum([self._joint(z, a) for a in self.program.assignments])

    def densities(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return log p(z_n) with the Jacobian and log p(x_n|z_n), (N,) each, for z of shape (N, d)."""
        return summed_out([self._pair(z, a) for a in self.program.assignments])

    def guide_density(self, z: Tensor) -> Tensor:
        """Return log q(z_n|x_n), (N,), for z of shape (N, d)."""
        return log_sum([self._guide_density(z, a) for a in self._guide_assignments()])

    def _joint(self, z: Tensor, assignment: dict[str, Tensor]) -> Tensor:
        replay = self.run("model", assignment, z=z)
        return replay.log_prior + replay.log_likelihood + replay.log_det + self._padding(z, replay)

    def _pair(self, z: Tensor, assignment: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return log p(z) and log p(x_n|z) of one assignment, (N,) each."""
        replay = self.run("model", assignment, z=z)
        prior = (
            z.new_zeros(len(z)) + replay.log_prior + replay.log_det + self._padding(z, replay)
        )  # (N,), also without any site
        likelihood = torch.as_tensor(replay.log_likelihood, dtype=z.dtype, device=z.device).expand_as(prior)
        return prior, likelihood

    def _guide_density(self, z: Tensor, assignment: dict[str, Tensor]) -> Tensor:
        gated = bool(self.program.gated)
        if self.program.active is None and not gated and all(site.transform is not None for site in self.sites):
            free = {s.name: (s.split(z), s.transform) for s in self.sites if s.transform is not None}
            values = {name: transform(u) for name, (u, transform) in free.items()}
        else:  # a support or a mask depends on other sites: run the model
            model = self.run("model", assignment or self.program.assignments[0], z=z)
            values, free = model.values, model.free
        replay = self.run("guide", assignment, values=values, free=free, z=z if gated else None)
        log_q = replay.log_prior + replay.log_det + self._padding(z, replay)
        return z.new_zeros(len(z)) + log_q  # (N,), also without any site

    def _guide_assignments(self) -> list[dict[str, Tensor]]:
        """Return the discrete values to sum over in q: those of the sites that the guide draws."""
        if any(site.name in self.program.guide_sites for site in self.program.discrete):
            names = {s.name for s in self.program.discrete} - self.program.guide_sites
            if names:
                raise UnsupportedProgram(
                    f"guide: it draws some discrete sites but not {sorted(names)[0]!r}: draw all of them or none"
                )
            return self.program.assignments
        return [{}]

    def _padding(self, z: Tensor, replay: Replay) -> Tensor | float:
        """Return the log density of the coordinates that a mask removed: N(0, 1), and that of the gates."""
        active, gates = self.program.active, replay.padding
        if active is None:
            return gates if self.program.gated else 0.0
        if len(active) != len(z):
            active = active.repeat(len(z) // len(active), 1)
        return (torch.where(active, 0.0, 1.0) * (-0.5 * z.square() - HALF_LOG_2PI)).sum(-1) + gates

    # -- running the programs ----------------------------------------------------------------------------------------------

    def run(
        self,
        which: Which,
        assignment: dict[str, Tensor],
        outer: contextlib.AbstractContextManager[Any] | None = None,
        **options: Any,
    ) -> Replay:
        """Run one of the two programs once, inside the snapshot's scope, and return the handler with the densities.

        `outer` is a plate around the whole program. The model at given latents is run with the sites that are summed out
        enumerated.
        """
        enumerated: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if which == "model" and self.program.summed and ("z" in options or "values" in options):
            options.setdefault("summed", "eliminated")
        if options.get("summed") == "eliminated":
            enumerated = poutine.enum(first_available_dim=-self.program.nesting - 1)
        replay = Replay(self.program, assignment, index=self._index, **options)
        with enumerated, replay, outer or contextlib.nullcontext(), clean(self.guide):
            (self.model if which == "model" else self.guide)(*self.args, **self.kwargs)
        return replay

    def frozen_weights(self) -> contextlib.AbstractContextManager[None]:
        """Keep the weights swapped in around many evaluations."""
        return self.snapshot.scope()

    def _map(self, function: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
        """Apply a function of (N, d) to every draw of (S, N, d), a bounded number of rows at a time."""
        z = self._checked(z)
        with self.snapshot.scope():
            chunk = fitting(self.n_obs, self._rows)
            parts = z.split(chunk)
            first = self._map_chunk(function, parts[0])
            if len(parts) == 1 or first.requires_grad:
                return torch.cat([first, *(self._map_chunk(function, part) for part in parts[1:])])
            out = first.new_empty(len(z), *first.shape[1:])  # small results between large ones would fragment the heap
            out[:chunk] = first
            for i, part in enumerate(parts[1:], 1):
                out[i * chunk : (i + 1) * chunk] = self._map_chunk(function, part)
            return out

    def _checked(self, z: Tensor) -> Tensor:
        """Return z, draws of all data, in the precision of the computations."""
        if z.dim() != 3 or tuple(z.shape[1:]) != (self.n_obs, self.dim):
            raise ValueError(f"z has shape {tuple(z.shape)}; expected (draws, {self.n_obs}, {self.dim})")
        return z.to(self.dtype or self.own_dtype)

    def _map_chunk(self, function: Callable[[Tensor], Any], z: Tensor) -> Any:
        """Apply a function of (N, d) to every draw of (S, N, d); it returns a tensor (N, ...) or a tuple of them."""
        if self.mode == "vmap":
            return torch.func.vmap(function, randomness="different")(z)
        if self.mode == "repeat" and len(z) > 1:
            with self._repeated(len(z)):
                return pytree.tree_map(lambda t: t.unflatten(0, z.shape[:2]), function(z.flatten(0, 1)))
        return pytree.tree_map(lambda *t: torch.stack(t), *[function(u) for u in z])

    def _backward(self, z: Tensor, evaluate: Callable[[Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Evaluate with gradients, keeping the graph of few rows at a time."""
        z = self._checked(z)
        # the backward pass also reads the weights, so it needs the same scope
        with self.snapshot.scope(), torch.enable_grad():
            parts = [evaluate(u.detach().requires_grad_()) for u in z.split(fitting(self.n_obs, self._rows))]
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))

    @contextlib.contextmanager
    def _repeated(self, times: int) -> Iterator[None]:
        """Repeat the arguments along the data plate, draw by draw."""
        args, kwargs, index = self.args, self.kwargs, self._index
        if index:
            self._index = {name: value.repeat(times) for name, value in index.items()}
        else:
            leaves = [arguments.repeat(t, dim, times) for t, dim in zip(self.leaves(), self.data_dims, strict=True)]
            self.args, self.kwargs = self.with_leaves(leaves)
        try:
            yield
        finally:
            self.args, self.kwargs, self._index = args, kwargs, index

    # -- some of the data --------------------------------------------------------------------------------------------------

    def subset(self, rows: Tensor) -> Self:
        """Return the log joint of some of the data, (len(rows),) indices in any order; itself for all data in order.

        The tensors among the arguments are indexed along the dimension of the data; a PackedSequence by sequence.

        Raises:
            UnsupportedProgram: the arguments cannot be separated by datum; call `separable` first, or use `some`.
        """
        if len(rows) == self.n_obs and bool((rows == torch.arange(self.n_obs, device=rows.device)).all()):
            return self
        if not self.separable():
            raise UnsupportedProgram("the arguments cannot be taken apart by datum")
        return self._subset(rows)

    def _subset(self, rows: Tensor) -> Self:
        part = copy.copy(self)
        some = [arguments.take(t, dim, rows) for t, dim in zip(self.leaves(), self.data_dims, strict=True)]
        part.args, part.kwargs = self.with_leaves(some)
        active = None if self.program.active is None else self.program.active[rows]
        observed = {name: value[rows.to(value.device)] for name, value in self.program.observed.items()}
        part.program = dataclasses.replace(self.program, n_obs=len(rows), active=active, observed=observed)
        part.n_obs, part._whole = len(rows), self.root
        part.batched_draws = dict(self.batched_draws)
        part.probe_points = self.probe_points[:, rows]
        return part

    def separable(self) -> bool:
        """Whether the arguments can be separated by datum; False until `LogJoint` has compared parts with the whole."""
        return bool(self.separates) and self.separates[0]

    def leaves(self) -> list[Any]:
        """Return the leaves of the arguments."""
        return arguments.leaves((self.args, self.kwargs))

    def with_leaves(self, leaves: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return arguments of the same structure with other leaves."""
        args, kwargs = arguments.with_leaves((self.args, self.kwargs), leaves)
        return args, kwargs

    @property
    def root(self) -> Self:
        """The object of all data, of which this is a part."""
        return self._whole or self

    def _data_dimensions(self) -> list[int | None]:
        """Return the dimension with N entries of each leaf of the arguments, the first if there are several."""
        shapes, n = [arguments.sizes(t) for t in self.leaves()], self.n_obs
        return [shape.index(n) if n in shape else None for shape in shapes]

    def copy(self) -> Self:
        """Return a copy with arguments and program that may be replaced."""
        other = copy.copy(self)
        other._whole, other.batched_draws = None, dict(self.batched_draws)
        return other

    # -- precision ---------------------------------------------------------------------------------------------------------

    def set_dtype(self, dtype: torch.dtype | None) -> None:
        """Copy weights, arguments and pinned values in `dtype`."""
        self.snapshot.take(dtype)
        self.args, self.kwargs = self.snapshot.args, self.snapshot.kwargs
        self._index = dict(self.program.index)
        self.program = program_in(dtype or self.own_dtype, self.program)

    def promote(self, dtype: torch.dtype) -> None:
        """Compute both programs in `dtype` throughout, if one of them holds or makes numbers of another precision."""
        if isinstance(self.model, Promoted):
            return
        with seeded(0), self.snapshot.scope(), torch.no_grad():
            if any(mixes(partial(self.run, which, {}), dtype) for which in ("model", "guide")):
                self.model, self.guide = Promoted(self.model, dtype), Promoted(self.guide, dtype)

    def converted(self, dtype: torch.dtype) -> Self:
        """Return the same densities, with the same weights and arguments, in another precision."""
        other = self.copy()
        other.snapshot = self.snapshot.converted(dtype)
        convert = lambda leaf: arguments.converted(leaf, lambda t: Snapshot.convert(t, dtype))
        other.args, other.kwargs = arguments.mapped(convert, (self.args, self.kwargs))
        other.program = program_in(dtype, self.program)
        if isinstance(self.model, Promoted) and isinstance(self.guide, Promoted):
            other.model, other.guide = Promoted(self.model.program, dtype), Promoted(self.guide.program, dtype)
        other.probe_points = self.probe_points.to(dtype)
        return other

    def _rows_at_once(self) -> int:
        """Return how many rows (draws x data) to evaluate together: fewer for wide data, to stay in the caches."""
        return ROWS if self.device.type != "cpu" else max(64, min(ROWS, fitting(max(self._width(), self.dim), ENTRIES)))

    def _width(self) -> int:
        """Return how many numbers the arguments hold of one datum."""
        leaves = [t for t in self.leaves() if self.n_obs in arguments.sizes(t)]
        return max((arguments.numbers(t) // self.n_obs for t in leaves), default=1)

    @property
    def dtype(self) -> torch.dtype | None:
        """The floating-point type of all computations; None for the program's own."""
        return self.snapshot.dtype

    @property
    def own_dtype(self) -> torch.dtype:
        """The floating-point type of the programs themselves."""
        floating = (t.dtype for t in self.snapshot.leaves() if t.is_floating_point())
        return next(floating, torch.get_default_dtype())

    def note(self, sentence: str) -> None:
        """Record and log one sentence."""
        self.notes.append(sentence)
        log.info(sentence)


def with_gradients(prior: Tensor, likelihood: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return log p(z) and log p(x|z) at z, and the gradient of each in z."""
    return prior.detach(), likelihood.detach(), gradient_in(z, prior, retain=True), gradient_in(z, likelihood)


def gradient_in(z: Tensor, value: Tensor, *, retain: bool = False) -> Tensor:
    """Return the gradient of a density's sum in z; zeros where it does not depend on z, or only by steps."""
    found = torch.autograd.grad(value.sum(), z, retain_graph=retain, allow_unused=True)[0] if value.requires_grad else None
    return torch.zeros_like(z) if found is None else found
