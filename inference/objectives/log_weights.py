"""Log weights of K draws for each datum of a batch, from which the multi-sample objectives are built.

    log w_kn = log p(x_n|z_kn) + w [ log p(z_kn) - log q(z_kn|x_n) ],      z_kn ~ q(z|x_n),  k = 1..K,  n in b

They are in nats for ONE datum, without the factor N / B of the data plate, which belongs outside every log-sum-exp. The K draws
are made in one pass: the batch is repeated K times along its first dimension, so any network that takes a batch works.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer.util import is_validation_enabled
from pyro.poutine.trace_struct import Trace
from pyro.util import check_model_guide_match, check_site_shape
from torch import Tensor
from torch.utils import _pytree as pytree

from elbowroom.inference.objectives.elbo import Program, Weight, samples
from elbowroom.inference.program.sites import per_datum
from elbowroom.inference.randomness import undisturbed


@dataclass(frozen=True)
class LogWeights:
    """Log densities of K draws for each of B data, (K, B), in double precision, by site.

    Attributes:
        likelihood: sum of log p over the observed sites.
        prior: log p of each latent site.
        guide: log q of each latent site.
        score: sum of log q over the sites that have no differentiable draws; None if all have.
        values: by site, the latent values of the repeated batch, and the dimension of the data, counted from the right.
        scale: N / B.
        traces: of model and guide.
    """

    likelihood: Tensor
    prior: dict[str, Tensor]
    guide: dict[str, Tensor]
    score: Tensor | None
    values: dict[str, tuple[Tensor, int]]
    scale: float
    traces: tuple[Trace, Trace]

    def weighed(self, weight: Weight = 1.0) -> Tensor:
        """Return log p(x|z) + w [ log p(z) - log q(z|x) ], (K, B)."""
        ratio = sum(self.prior.values(), torch.zeros_like(self.likelihood)) - sum(self.guide.values())
        return self.likelihood + weight * ratio


def log_weights(
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    particles: int = 1,
    path: bool = False,
    detach: bool = False,
) -> LogWeights:
    """Draw z K = `particles` times for each datum and evaluate both programs there.

    Of the arguments, tensors as long as the first one are repeated. With `path`, log q depends on the guide's parameters
    through z alone; with `detach`, z is a constant.

    Raises:
        ValueError: the log weights are not defined for single data.
    """
    rows, many = length((args, kwargs)), particles
    more_args, more_kwargs = (args, kwargs) if many == 1 else repeated((args, kwargs), rows, many)
    guide_trace = poutine.trace(guide).get_trace(*more_args, **more_kwargs)
    if detach:
        guide_trace.detach_()
    again = None
    if path:
        guide_trace = _aliased(guide_trace)
    if path and len(samples(guide_trace)) > 1:
        # a later site's distribution depends on earlier draws AND on the guide's parameters: evaluate it with the latter fixed
        with _frozen(guide_trace):
            again = poutine.trace(poutine.replay(guide, trace=guide_trace)).get_trace(*more_args, **more_kwargs)
    model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*more_args, **more_kwargs)
    if again is not None:
        guide_trace = again
    _evaluate(model_trace, guide_trace)
    plate = Plate.around([guide_trace, model_trace], rows, many)
    drawn = dict(samples(guide_trace))
    likelihood, prior, log_q, values = torch.zeros((), dtype=torch.float64), {}, {}, {}
    score: Tensor | None = None
    for name, site in samples(model_trace):
        here = plate.density(site)
        if site["is_observed"]:
            likelihood = likelihood.to(here.device) + here
        elif name in drawn:
            prior[name] = here
        else:
            raise ValueError(f"the guide does not draw site {name!r} of the model")
    for name, site in drawn.items():
        log_prob, z = site["unscaled_log_prob"], site["value"]
        if path and again is None:
            direct = site["fn"].log_prob(z.detach())
            log_prob = log_prob - (direct - direct.detach())
        log_q[name] = plate.density(site, log_prob)
        values[name] = (z, plate.dim - site["fn"].event_dim)
        if not site["fn"].has_rsample:
            score = log_q[name] if score is None else score + log_q[name]
    size = plate.size
    if many > 1 and size == many * plate.rows:  # the plate took the length of the repeated batch, or N equals it
        with undisturbed((args, kwargs)), torch.no_grad(), poutine.block():
            size = Plate.around([poutine.trace(guide).get_trace(*args, **kwargs)], rows).size
    shape = (many, plate.rows)
    return LogWeights(likelihood.expand(shape), prior, log_q, score, values, size / plate.rows, (model_trace, guide_trace))


@dataclass(frozen=True)
class Plate:
    """The plate of the data.

    Attributes:
        dim: its batch dimension, from the right.
        rows: the data in it, B.
        particles: number of copies of the data in it, K.
        size: number of data that it stands for, N, as the program declares.
    """

    dim: int
    rows: int
    particles: int
    size: int

    @classmethod
    def around(cls, traces: list[Trace], rows: int, particles: int = 1) -> Plate:
        """Find the one plate around every sample site that has the length of the arguments.

        Raises:
            ValueError: there is none, or several.
        """
        sites = [site for trace in traces for _, site in samples(trace)]
        common = [frame for frame in sites[0]["cond_indep_stack"] if frame.vectorized] if sites else []
        for site in sites:
            places = {(frame.dim, frame.size) for frame in site["cond_indep_stack"]}
            common = [frame for frame in common if (frame.dim, frame.size) in places]
            if not common:
                raise ValueError(f"site {site['name']!r} is not in the plate of the data; use elbo")
        fitting = [frame for frame in common if frame.size == rows * particles]
        if particles == 1 and len(common) == 1:
            fitting = common
        if len(fitting) != 1:
            found = ", ".join(f"{frame.name!r} of {frame.size}" for frame in common) or "none"
            long = f"{rows} data x {particles} draws"
            raise ValueError(f"needs one plate around all sites, as long as the arguments ({long}), found {found}; use elbo")
        frame = fitting[0]
        return cls(frame.dim, frame.size // particles, particles, frame.full_size or frame.size)

    def density(self, site: Any, log_prob: Tensor | None = None) -> Tensor:
        """Return a site's log density for single data, (K, B), with its masks and other scales, without the plate's scale."""
        rows = self.particles * self.rows
        log_prob = site["unscaled_log_prob"] if log_prob is None else log_prob
        scaled = scale_and_mask(log_prob, site["scale"] * (rows / self.size), site["mask"])
        return per_datum(scaled, self.dim, rows).reshape(self.particles, self.rows).double()


def length(tree: Any) -> int:
    """Return the length of the first tensor in a tree that has a dimension; 0 if there is none."""
    return next((len(t) for t in pytree.tree_leaves(tree) if isinstance(t, Tensor) and t.dim()), 0)


def repeated(tree: Any, rows: int, times: int) -> Any:
    """Repeat every tensor of a tree that has `rows` rows, along its first dimension."""

    def repeat(t: Any) -> Any:
        fits = isinstance(t, Tensor) and t.dim() and len(t) == rows
        return t.repeat(times, *[1] * (t.dim() - 1)) if fits else t

    return pytree.tree_map(repeat, tree)


def _evaluate(model_trace: Trace, guide_trace: Trace) -> None:
    """Compute the log probabilities; if Pyro's validation is on, make the checks that its ELBOs make."""
    if is_validation_enabled():
        check_model_guide_match(model_trace, guide_trace)
    for trace in (model_trace, guide_trace):
        trace.compute_log_prob()
        if is_validation_enabled():
            for _, site in samples(trace):
                check_site_shape(site, float("inf"))


def _aliased(trace: Trace) -> Trace:
    """Return the trace with each drawn value as a separate node of the autograd graph, so that a hook on it sees all its uses.

    (A transformed distribution caches the base value of a draw; its gradient would bypass the draw.)
    """
    other = trace.copy()
    for name, site in samples(trace):
        other.nodes[name] = {**site, "value": site["value"].clone()}
    return other


@contextmanager
def _frozen(trace: Trace) -> Iterator[None]:
    """Treat as constants all leaves that the draws and their distributions depend on."""
    trace.compute_log_prob()
    found = leaves([site[key] for _, site in samples(trace) for key in ("value", "log_prob")])
    for leaf in found:
        leaf.requires_grad_(False)
    try:
        with pyro.validation_enabled(False), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".* was not registered in the param store")  # it is: by the run before
            yield
    finally:
        for leaf in found:
            leaf.requires_grad_(True)


def leaves(tensors: list[Tensor]) -> list[Tensor]:
    """Return the leaves with a gradient that tensors depend on."""
    stack: list[Any] = [t.grad_fn for t in tensors]
    found, seen = [t for t in tensors if t.requires_grad and t.is_leaf], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        stack.extend(parent for parent, _ in node.next_functions)
    return found
