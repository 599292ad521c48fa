"""Discrete latents that are summed out by variable elimination.

In a plate within the data plate, or one per step of a chain, discrete latents have too many joint values to list: K^M. Their
sum factorises all the same: with c_m the latents of an inner plate, sum_c prod_m f_m(c_m) = prod_m sum_k f_m(k). Pyro's own
parts do it exactly: `poutine.enum` gives each site all its values in a dimension of its own, left of the plates, and
`pyro.ops.contract.contract_to_tensor` orders sums and products (tensor variable elimination, Obermeyer et al. 2019). The sums
are taken here, in logarithms throughout: Pyro's leave them, and lose what lies 100 nats (float32) below each factor's largest.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from pyro.ops import packed
from pyro.ops.contract import contract_to_tensor
from pyro.ops.rings import LogRing
from torch import Tensor

from elbowroom.errors import UnsupportedProgram
from elbowroom.inference.program.masks import entries

FIRST = 256  # the first character that stands for a dimension in a sum of products: any number of them follow


@dataclass(frozen=True)
class Factor:
    """A log density that depends on enumerated sites.

    Attributes:
        value: (enumerated dimensions, batch).
        plates: dimension of each plate around it, by name.
        enumerated: identifier of each enumerated dimension.
        kind: `summed`, of a site that is summed out; `latent`, of a continuous one; or `observed`.
    """

    value: Tensor
    plates: dict[str, int]
    enumerated: dict[int, int]
    kind: str


class Logs(LogRing):
    """Sums of products of packed tensors of logarithms, one dimension after the other, the cheapest first."""

    def sumproduct(self, terms: Sequence[Tensor], dims: Iterable[str]) -> Tensor:
        """Return log sum prod exp of the terms, over the dimensions named."""
        pending, left = list(terms), set(dims)
        while left:
            width = {d: len(set().union(*[names_of(t) for t in pending if d in names_of(t)])) for d in sorted(left)}
            dim = min(width, key=width.__getitem__)
            joined = _product([t for t in pending if dim in names_of(t)])
            names = names_of(joined)
            term = _named(joined.logsumexp(names.index(dim)), names.replace(dim, ""))
            pending = [t for t in pending if dim not in names_of(t)] + [term]
            left.remove(dim)
        return _product(pending)


def names_of(term: Any) -> str:
    """Return one character per dimension of a packed tensor."""
    return str(term._pyro_dims)


def _named(term: Any, names: str) -> Tensor:
    term._pyro_dims = names
    found: Tensor = term
    return found


def _product(terms: Sequence[Tensor]) -> Tensor:
    """Return the sum of packed tensors of logarithms, in the dimensions of all of them."""
    names = "".join(sorted(set().union(*map(names_of, terms))))
    total: Any = 0.0
    for term in terms:
        own = names_of(term)
        ordered = term.permute([own.index(name) for name in names if name in own])
        total = total + ordered.reshape([term.shape[own.index(name)] if name in own else 1 for name in names])
    return _named(total, names)


class Factors:
    """Collects the factors of one run in which sites are enumerated, and sums the sites out.

    Where `clamped` has values of theirs, the sum has these alone: it is the density beside these values.
    """

    def __init__(self, summed: Iterable[str], plate: str, clamped: Mapping[str, Tensor]) -> None:
        self.summed, self.plate, self.clamped = frozenset(summed), plate, clamped
        self.found: list[Factor] = []

    @staticmethod
    def enumerate(msg: Any) -> None:
        """Ask `poutine.enum` for all values of a site."""
        msg["infer"] = {**msg["infer"], "enumerate": "parallel", "expand": False}

    def take(self, msg: Any, log_prob: Any) -> bool:
        """Keep a site's log density if it depends on an enumerated site, and say whether it does.

        Raises:
            UnsupportedProgram: the site lies outside the data plate.
        """
        if not isinstance(log_prob, Tensor):
            return False
        name, shape, infer = msg["name"], log_prob.shape, msg["infer"]
        dims = {d: i for d, i in infer.get("_dim_to_id", {}).items() if len(shape) >= -d and shape[d] > 1}
        if not dims and name not in self.summed:
            return False
        plates = {frame.name: frame.dim for frame in msg["cond_indep_stack"] if frame.vectorized}
        if self.plate not in plates:
            raise UnsupportedProgram(
                f"model: site {name!r} outside plate {self.plate!r} depends on a discrete latent inside it, so the data are "
                "coupled; move it inside the plate"
            )
        kind = "observed" if msg["is_observed"] else "latent"
        if name in self.summed:
            kind, kept = "summed", entries(msg["fn"], msg["mask"], log_prob.device, name)
            if name in self.clamped:
                same = msg["value"] == self.clamped[name]
                same = same.flatten(same.dim() - msg["fn"].event_dim).all(-1) if msg["fn"].event_dim else same
                log_prob = torch.where(same, log_prob, -torch.inf)
            if kept is not None:  # where it is masked out, its values are equally probable: their sum is one
                count = shape[infer["_enumerate_dim"]] if infer["_enumerate_dim"] in dims else 1
                log_prob = torch.where(kept, log_prob, -math.log(count))
        self.found.append(Factor(log_prob, plates, dims, kind))
        return True

    def log_sums(self, n_obs: int) -> tuple[Tensor | float, Tensor | float]:
        """Return the log of the sum over the latents' factors, and what the observed ones add to it: (N,) each."""
        prior: Tensor | float = 0.0  # without a continuous latent among them, the factors sum to one
        if any(factor.kind == "latent" for factor in self.found):
            prior = self._log_sum([factor for factor in self.found if factor.kind != "observed"], n_obs)
        return prior, (self._log_sum(self.found, n_obs) - prior if self.found else 0.0)

    def _log_sum(self, factors: Sequence[Factor], n_obs: int) -> Tensor:
        """Return log sum_c prod of the factors, (N,), by tensor variable elimination."""
        plates = sorted({name for factor in factors for name in factor.plates})
        enumerated = sorted({i for factor in factors for i in factor.enumerated.values()})
        plate = {name: chr(FIRST + i) for i, name in enumerate(plates)}
        symbol = {i: chr(FIRST + len(plates) + j) for j, i in enumerate(enumerated)}
        dtype = reduce(torch.promote_types, (factor.value.dtype for factor in factors))
        tree: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
        for factor in factors:
            names = {dim: plate[name] for name, dim in factor.plates.items()} | {
                d: symbol[i] for d, i in factor.enumerated.items()
            }
            term = packed.pack(factor.value.to(dtype)[...], names)  # a view: packing marks the tensor
            tree.setdefault(frozenset(plate[name] for name in factor.plates), []).append(term)
        ring = Logs(dim_to_size={plate[self.plate]: n_obs})
        return contract_to_tensor(tree, set(symbol.values()), frozenset({plate[self.plate]}), ring=ring).reshape(n_obs)
