"""Functions of all draws and data, made from programs for one datum; graphs are traced from them and evaluated here."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from elbowroom.errors import first_line
from elbowroom.inference.compiled.branches import Branches, levels
from elbowroom.inference.compiled.graph import Function, Graph, Untraceable
from elbowroom.inference.compiled.vmap_rules import VmapRules
from elbowroom.inference.mcmc.leapfrog import leap
from elbowroom.inference.randomness import undisturbed
from elbowroom.inference.target.plain import PlainLogJoint, gradient_in, with_gradients
from elbowroom.system.memory import fitting, slices

Kind = Literal["joint", "terms", "guide", "grad", "parts", "leap"]
GRADIENTS = frozenset({"grad", "parts", "leap"})
PRIMES = (5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79)
FINER = 4  # graphs have no overhead of handlers, so parts can be smaller and fit the inner caches


def inputs(joint: PlainLogJoint) -> list[tuple[Tensor, int | None]]:
    """Return the tensors that a graph takes besides z, for these data, each with the dimension of the data."""
    found = [(t, dim) for t, dim in zip(joint.leaves(), joint.data_dims, strict=True) if isinstance(t, Tensor)]
    if joint.program.active is not None:
        found.append((joint.program.active, 0))
    return found + [(t, None) for t in joint.program.pinned.values()]


def by_graph(joint: PlainLogJoint, graph: Function, z: Tensor, *beside: Tensor) -> tuple[Tensor, ...]:
    """Evaluate a graph of this module at z (S, N, d), in parts that fit the caches.

    `beside` are inputs besides z and the data: (S or 1, N, ...) or numbers. Outputs are (S, N, ...).
    """
    n, draws = joint.n_obs, len(z)
    given_data = inputs(joint)
    rows = max(64, joint._rows // FINER) if joint.device.type == "cpu" else joint._rows
    chunk = min(draws, rows)  # all draws of a datum together: what depends on the datum alone, as an encoder does, is done once
    several = -(-n // fitting(chunk, rows))  # number of blocks of equal size
    block = -(-n // several)
    out: list[Tensor] = []
    with joint.snapshot.scope():
        z = z.to(joint.dtype or joint.own_dtype)
        for some in slices(n, block):
            leaves = [t if dim is None else t.narrow(dim, some.start, some.stop - some.start) for t, dim in given_data]
            for here in slices(draws, chunk):
                given = [t if t.dim() == 0 else t[here if len(t) > 1 else slice(1), some] for t in beside]
                found = graph(z[here, some], *given, *leaves)
                if block >= n and chunk >= draws:
                    return found
                out = out or [t.new_empty(draws, n, *t.shape[2:]) for t in found]
                for whole, part in zip(out, found, strict=True):
                    whole[here, some] = part
    return tuple(out)


class OfAllData:
    """Stands for a PackedSequence of all data in a graph, which is traced for one datum and takes tensors: not to be read."""

    def __getattr__(self, name: str) -> Any:
        """Refuse to be read."""
        raise Untraceable("it reads a PackedSequence, whose sequences have different lengths")

    def __getitem__(self, key: Any) -> Any:
        """Refuse to be read."""
        return self.data

    __iter__ = __len__ = __getitem__


class OneDatum:
    """The programs for one datum, with its arguments as inputs."""

    def __init__(self, root: PlainLogJoint) -> None:
        self.root = root
        self.places = [i for i, t in enumerate(root.leaves()) if isinstance(t, Tensor)]
        self.dims = [dim for _, dim in inputs(root)]
        self.one = copy.copy(self.root)
        self.one.n_obs = 1

    def graph(self, kind: Kind, outcomes: tuple[bool, ...]) -> Graph:
        """Trace one kind, with sizes of draws and data that differ from all other dimensions."""
        function, root = self._functions()[kind], self.root
        given = inputs(root)
        taken = {size for t, _ in given for size in t.shape} | {root.dim}
        draws, data = [p for p in PRIMES if p not in taken][:2]
        rows = torch.arange(data, device=root.device) % root.n_obs
        z = root.probe_points[0].index_select(0, rows).expand(draws, -1, -1).contiguous()
        some = [t if dim is None else t.index_select(dim, rows) for t, dim in given]
        beside = leapfrog_arguments(kind, z)

        def followed(*tensors: Tensor) -> tuple[Tensor, ...]:
            with VmapRules(), Branches(outcomes=list(outcomes)):
                return function(*tensors)

        with torch.set_grad_enabled(kind in GRADIENTS):
            return Graph(followed, [z, *beside, *some], varying=(draws, data))

    def record(self, kind: Kind) -> tuple[bool, ...]:
        """Return the outcomes of the branches of a kind, on all data."""
        function = self._functions()["guide" if kind == "guide" else "terms"]
        given = inputs(self.root)
        branches = Branches(allowed=lambda tensor: self.level not in levels(tensor))
        try:
            with torch.no_grad(), undisturbed(self.root.probe_points), branches:
                function(self.root.probe_points[:1], *[t for t, _ in given])
        except Untraceable:
            raise
        except Exception as error:  # whatever a program raises under vmap
            raise Untraceable(f"it does not run one datum at a time ({first_line(error)})") from error
        return tuple(branches.outcomes)

    def _functions(self) -> dict[Kind, Function]:
        joint = self._over(lambda z: (self.one.density(z),))
        terms = self._over(self.one.densities)
        guide = self._over(lambda z: (self.one.guide_density(z),))

        def grad(z: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
            z = z.detach().requires_grad_()
            (value,) = joint(z, *leaves)
            return value.detach(), gradient_in(z, value)

        def parts(z: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
            z = z.detach().requires_grad_()
            prior, likelihood = terms(z, *leaves)
            return with_gradients(prior, likelihood, z)

        def leapfrog(
            z: Tensor, momentum: Tensor, size: Tensor, root: Tensor, kick: Tensor, *leaves: Tensor
        ) -> tuple[Tensor, ...]:
            def target(u: Tensor) -> tuple[Tensor, Tensor]:
                value, gradient = grad(u, *leaves)
                return value, gradient

            return leap(target, z, momentum, size, root[0], kick)

        return {"joint": joint, "terms": terms, "guide": guide, "grad": grad, "parts": parts, "leap": leapfrog}

    def _over(self, density: Callable[[Tensor], tuple[Tensor, ...]]) -> Function:
        """Return a function of all draws and data, made from a function of one row z (1, d)."""

        def row(z: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
            self.level = max(levels(z)) - 1 if torch._C._functorch.is_batchedtensor(z) else 0
            self._put(leaves)
            return tuple(value[0] for value in density(z[None]))

        inside = torch.func.vmap(row, in_dims=(0, *self.dims), randomness="different")
        return torch.func.vmap(inside, in_dims=(0, *[None] * len(self.dims)), randomness="different")

    def _put(self, leaves: tuple[Tensor, ...]) -> None:
        """Give the programs the arguments of one datum."""
        rows = [t if dim is None else t.unsqueeze(dim) for t, dim in zip(leaves, self.dims, strict=True)]
        whole = [OfAllData() if isinstance(t, PackedSequence) else t for t in self.root.leaves()]
        for place, value in zip(self.places, rows, strict=False):
            whole[place] = value
        self.one.args, self.one.kwargs = self.root.with_leaves(whole)
        rest = rows[len(self.places) :]
        program = self.root.program
        active = rest.pop(0) if program.active is not None else None
        pinned = dict(zip(program.pinned, rest, strict=True))
        self.one.program = dataclasses.replace(program, n_obs=1, active=active, pinned=pinned)


def leapfrog_arguments(kind: Kind, z: Tensor) -> list[Tensor]:
    """Return arguments of a leapfrog for tracing and comparing; an error in any of them would change the result."""
    if kind != "leap":
        return []
    n, d = z.shape[1:]
    momentum = torch.linspace(-1.0, 1.1, z.numel(), dtype=z.dtype, device=z.device).reshape(z.shape)
    root = torch.eye(d, dtype=z.dtype, device=z.device) + torch.full((d, d), 0.3, dtype=z.dtype, device=z.device).tril(-1)
    size, kick = torch.full_like(z[..., :1], 0.05), torch.full((), 0.5, dtype=z.dtype, device=z.device)
    return [momentum, size.contiguous(), root.expand(1, n, d, d).contiguous(), kick]
