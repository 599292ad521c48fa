"""The description of a Pyro (model, guide) pair: its data plate and its latent sites."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Transform, constraints
from torch.distributions.constraints import MixtureSameFamilyConstraint
from torch.distributions.transforms import AffineTransform, ComposeTransform, IndependentTransform


@dataclass(frozen=True)
class Site:
    """A latent sample site of one datum.

    Attributes:
        name: the site's name.
        plate_dim: batch dimension of the data plate, negative.
        event_dim: number of event dimensions of a constrained value.
        batch_ndim: number of batch dimensions.
        shape: shape of one datum's constrained value (inner plates, then event).
        free_shape: shape of one datum's unconstrained value; () for a discrete site.
        free_event_dim: number of event dimensions of an unconstrained value.
        columns: columns of the unconstrained vector z (N, d) that hold this site; empty for a discrete site.
        values: the values of a discrete site, (K, *event); None for a continuous one.
        support: the prior's support; None if it depends on other sites.
        transform: unconstrained -> constrained; None if the support depends on other sites.
    """

    name: str
    plate_dim: int
    event_dim: int
    batch_ndim: int
    shape: tuple[int, ...]
    free_shape: tuple[int, ...]
    free_event_dim: int
    columns: slice
    values: Tensor | None = None
    support: Any = None
    transform: Transform | None = None

    def split(self, z: Tensor) -> Tensor:
        """Take this site's columns from z (..., N, d) and arrange them as the program's batch and event dimensions."""
        u = z[..., self.columns].reshape(*z.shape[:-1], *self.free_shape)
        lead = z.dim() - 2
        return u.movedim(lead, self.plate_dim - self.free_event_dim)

    def gather(self, value: Tensor, event_dim: int) -> Tensor:
        """Move the data dimension of a (batch, event) value to the front: (N, ...)."""
        return value.movedim(self.plate_dim - event_dim, 0)


@dataclass(frozen=True)
class Gate:
    """The density that a latent gets where a discrete site masks it, the same in model and guide: log p(x) is unchanged.

    Without it the joint would be flat there, and no density. Numbers, not tensors: graphs hold them as constants.

    Attributes:
        loc: mean of each unconstrained coordinate, normally distributed; () for a discrete site.
        scale: standard deviation of each.
        log_values: log of the number of values of an entry of a discrete site, each equally probable.
    """

    loc: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()
    log_values: float = 0.0


@dataclass(frozen=True)
class Program:
    """The description of a (model, guide) pair, from one run.

    Attributes:
        plate: name of the data plate.
        n_obs: number of data N, from the batch shape.
        sites: continuous latent sites of one datum, in program order.
        discrete: discrete latent sites of one datum, in program order.
        summed: names of the discrete latents that variable elimination sums out; see `eliminated`.
        dim: d, the number of unconstrained continuous coordinates of one datum.
        guide_sites: names of the local sites that the guide draws.
        pinned: values of global latents, fixed at the guide's median.
        index: sub-sampling indices by plate name, replayed in every run.
        sized: whether the data plate says its `subsample_size`, so that the program may not take other numbers of rows.
        dropped: the unobserved halves of `obs_mask=` sites, which integrate to one.
        active: (N, d), False where a latent is masked out of that datum; None if none is.
        nesting: number of batch dimensions that the program's plates use.
        gated: sites whose mask depends on the discrete sites; see `Gate`.
        moving: observed sites whose support may depend on latents.
        observed: values of the observed sites inside the data plate, name -> (N, ...).
        carriers: auxiliary sites of the guide that carry coordinates of the local sites, by name; see `carriers`.
        auxiliary: names of the guide's sites that are no latents of the model.
        notes: sentences about sites that were pinned, dropped or rescaled.
    """

    plate: str
    n_obs: int
    sites: tuple[Site, ...]
    discrete: tuple[Site, ...]
    dim: int
    guide_sites: frozenset[str]
    pinned: Mapping[str, Tensor]
    index: Mapping[str, Tensor]
    dropped: frozenset[str]
    active: Tensor | None
    nesting: int
    observed: Mapping[str, Tensor]
    gated: Mapping[str, Gate] = field(default_factory=dict)
    moving: frozenset[str] = frozenset()
    sized: bool = False
    carriers: Mapping[str, Any] = field(default_factory=dict)
    auxiliary: frozenset[str] = frozenset()
    summed: frozenset[str] = frozenset()
    notes: list[str] = field(default_factory=list)

    @property
    def assignments(self) -> list[dict[str, Tensor]]:
        """Every joint value of the discrete sites; one empty assignment if there are none."""
        names = [site.name for site in self.discrete]
        tables = [site.values for site in self.discrete if site.values is not None]
        return [dict(zip(names, combination, strict=True)) for combination in itertools.product(*tables)]


def support_of(fn: TorchDistribution) -> Any:
    """Return the support of a distribution as a constraint that `biject_to` accepts; None if the distribution declares none.

    Three kinds of distribution need special treatment. A mixture gets the support of its components. A von Mises distribution
    declares the real line, but its angle has period 2 pi; it gets one period. A transformed distribution declares the codomain
    of its last transform, which may be too wide: an affine map after a sigmoid takes the unit interval to an interval. Its
    support is the image of that of its base.
    """
    base, wrapped = fn, 0
    while isinstance(base, dist.Independent | dist.MaskedDistribution):
        wrapped += base.reinterpreted_batch_ndims if isinstance(base, dist.Independent) else 0
        base = base.base_dist
    support: Any
    if isinstance(base, dist.VonMises):
        support = constraints.interval(-math.pi, math.pi)
    elif type(base) in (torch.distributions.TransformedDistribution, dist.TransformedDistribution) and base.transforms:
        support = support_of(base.base_dist)
        for transform in base.transforms:
            support = _image(support, transform)
        missing = len(base.event_shape) - support.event_dim
        support = constraints.independent(support, missing) if missing > 0 else support
    else:
        try:
            support = base.support
        except NotImplementedError:
            return None
        while isinstance(support, MixtureSameFamilyConstraint):
            support = support.base_constraint
    return constraints.independent(support, wrapped) if wrapped else support


def _image(support: Any, transform: Transform) -> Any:
    """Return the image of a support (None: not known) under a transform; its codomain if nothing narrower is known."""
    if isinstance(transform, IndependentTransform):
        inside = _image(support, transform.base_transform)
        missing = transform.codomain.event_dim - inside.event_dim
        return constraints.independent(inside, missing) if missing > 0 else inside
    if isinstance(transform, ComposeTransform) and transform.parts:
        for part in transform.parts:
            support = _image(support, part)
        missing = transform.codomain.event_dim - support.event_dim
        return constraints.independent(support, missing) if missing > 0 else support
    if support is not None and is_identity(transform):
        return support
    codomain = transform.codomain
    lower, upper = _ends(support)
    if (lower is None and upper is None) or not transform.bijective or transform.domain.event_dim or codomain.event_dim:
        return codomain
    falling = torch.as_tensor(transform.sign) < 0
    if bool(falling.any()) != bool(falling.all()):  # rising for some entries, falling for others
        return codomain
    ends = [None if end is None else _at(transform, end) for end in (lower, upper)]
    first, last = reversed(ends) if bool(falling.any()) else ends
    least, most = _ends(codomain)
    first, last = (least if first is None else first), (most if last is None else last)
    if first is None or last is None:
        return constraints.real if first is last else (constraints.less_than(last) if first is None else _above(first))
    return constraints.interval(first, last)


def _above(end: Any) -> Any:
    return constraints.positive if not isinstance(end, Tensor) and end == 0 else constraints.greater_than(end)


def _ends(support: Any) -> tuple[Any, Any]:
    """Return the ends of an interval or a half-line, numbers or tensors; None for an end at infinity, and for other sets."""
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    if support is None or support.is_discrete:
        return None, None
    return getattr(support, "lower_bound", None), getattr(support, "upper_bound", None)


def _at(transform: Transform, end: Any) -> Any:
    """Return the value of a transform at the end of an interval: a number where transform and end hold numbers alone."""
    value = transform(torch.as_tensor(end, dtype=None if isinstance(end, Tensor) else torch.float64))
    plain = not isinstance(end, Tensor) and not any(isinstance(part, Tensor) for part in vars(transform).values())
    return value.item() if plain else value


def is_identity(transform: Transform) -> bool:
    """Whether a transform is the affine map 0 + 1 x."""
    if not isinstance(transform, AffineTransform):
        return False
    loc, scale = transform.loc, transform.scale
    return not isinstance(loc, Tensor) and not isinstance(scale, Tensor) and loc == 0 and scale == 1


def is_real(support: Any) -> bool:
    """Whether a support is the real line or space, so that values are their own unconstrained coordinates."""
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support is constraints.real or support is constraints.real_vector


def is_sphere(support: Any) -> bool:
    """Whether a support is a sphere |z| = 1, or several."""
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support is dist.constraints.sphere


def has_edge(support: Any) -> bool:
    """Whether a support has an edge, next to which its values round."""
    return not (is_real(support) or is_sphere(support))


def is_static(constraint: Any) -> bool:
    """Whether a support holds no tensor, so that it cannot depend on another site."""
    parts = vars(constraint).values()
    return not any(isinstance(part, Tensor) or (hasattr(part, "check") and not is_static(part)) for part in parts)


def frame_of(msg: Mapping[str, Any], plate: str) -> Any | None:
    """Return the conditional-independence frame of `plate` at a site, or None if the site lies outside it."""
    return next((frame for frame in msg["cond_indep_stack"] if frame.name == plate), None)


def per_datum(log_prob: Tensor, dim: int, n_obs: int) -> Tensor:
    """Sum a site's log density over all batch dimensions except the data plate's: (N,)."""
    if log_prob.dim() < -dim:
        log_prob = log_prob.expand(*[1] * (-dim - log_prob.dim()), *log_prob.shape)
    log_prob = log_prob.movedim(dim, 0)
    if log_prob.shape[0] != n_obs:
        log_prob = log_prob.expand(n_obs, *log_prob.shape[1:])
    return log_prob.flatten(1).sum(1) if log_prob.dim() > 1 else log_prob
