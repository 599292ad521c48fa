"""Observed values and the distributions that they are observed under: are they in the support, and of what shape are draws?

A density outside its support is a number without a meaning: the formula of a Bernoulli distribution gives one for .5. Pyro
refuses such values in training. Here every observed entry that no mask removes, and that is not NaN, is checked once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from elbowroom.errors import DataError, UnsupportedProgram
from elbowroom.inference.program.masks import INDEPENDENT, WRAPPERS, around, bare
from elbowroom.inference.program.sites import frame_of, is_static

TRANSFORMED = (torch.distributions.TransformedDistribution, dist.TransformedDistribution)
SUM = 1e-6  # of a probability vector, as torch has it, beside the rounding of the sum
ROUNDING = 64  # in units of the last place, of a value that went back through transforms

# The name of a constraint's class: what it holds, and what to do with a value outside.
WORDS = {
    "Boolean": "0 and 1",
    "Real": "real numbers",
    "IntegerInterval": "whole numbers in a range",
    "IntegerGreaterThan": "whole numbers from a lower limit",
    "IntegerLessThan": "whole numbers up to an upper limit",
    "GreaterThan": "numbers above a limit, often 0",
    "GreaterThanEq": "numbers from a limit, often 0",
    "LessThan": "numbers below a limit",
    "Interval": "numbers in an interval",
    "HalfOpenInterval": "numbers in an interval",
    "Simplex": "vectors of numbers from 0 that sum to 1",
    "OneHot": "vectors with a single 1 among zeros",
    "Multinomial": "vectors of counts, at most total_count together",
    "Sphere": "vectors of length 1",
    "PositiveDefinite": "symmetric positive definite matrices",
    "CorrCholesky": "Cholesky factors of correlation matrices",
    "LowerCholesky": "lower triangular matrices with a positive diagonal",
}
AGAIN = 200  # runs at other latents: a value that 3 % of the prior allow is refused once in 400 times


@dataclass(frozen=True)
class Outside:
    """The entries of one observed site that lie outside the support, as booleans aligned with the value from the left.

    Attributes:
        bad: True where an entry lies outside.
        width: number of event dimensions of one entry.
        support: the support of one entry.
        moving: whether the support may depend on latents.
    """

    bad: Tensor
    width: int
    support: Any
    moving: bool


def check_observed(trace: Trace, plate: str, again: Callable[[], Trace]) -> list[str]:
    """Check the observed values of a run of the model against the supports of their distributions.

    A support that may depend on a latent can exclude a value at one latent and not at another. It is judged by `again`, which
    runs the model at other latents: what is outside in every run is refused. For other values see `impossible`.

    Returns:
        A note for each site that is outside, and whose distribution says `validate_args=False`.

    Raises:
        DataError: another site has a value outside its support; names site, datum and value.
    """
    notes = []
    for name, node in trace.nodes.items():
        if not _is_data(node):
            continue
        found = outside(node)
        if found is None or not bool(found.bad.any()):
            continue
        bad = found.bad
        for _ in range(AGAIN if found.moving else 0):
            if not bool(bad.any()):
                break
            other = again().nodes.get(name)
            next_ = outside(other) if other is not None and _is_data(other) else None
            same = next_ is not None and next_.bad.shape == bad.shape
            bad = bad & next_.bad if next_ is not None and same else torch.zeros_like(bad)
        if not bool(bad.any()):
            continue
        if not vouched(node["fn"]):
            raise DataError(_refusal(node, bad, found, plate))
        many = f"{int(bad.sum())} of {bad.numel()} values"
        notes.append(
            f"site {name!r}: {many} are outside the support of {_kind(node['fn'])}, the first is "
            f"{_where(node, bad, found, plate)}; the program says validate_args=False, so they are taken, but the density "
            "at them is no probability, and log p(x) is that of the formula"
        )
    return notes


def moving_supports(trace: Trace) -> frozenset[str]:
    """Return the observed sites whose support holds tensors, so that it may depend on a latent."""
    nodes = {name: node["fn"] for name, node in trace.nodes.items() if _is_data(node)}
    return frozenset(name for name, fn in nodes.items() if not vouched(fn) and _moves(bare(fn)))


def _moves(base: Any) -> bool:
    support = _support(base)
    if type(base) not in TRANSFORMED or not base.transforms:
        return support is not None and not is_static(support)
    own = any(isinstance(part, Tensor) for transform in base.transforms for part in vars(transform).values())
    return own or _moves(bare(base.base_dist))


def impossible(node: Mapping[str, Any]) -> Tensor | None:
    """Return where an observed site lies outside its support, in the shape of its batch; None if that is not known.

    The density is zero there. Not every formula says so: that of a Pareto distribution is positive below its scale.
    """
    found = outside(node)
    return None if found is None else _reduced(found.bad, node["fn"].event_dim - found.width)


def _is_data(node: Mapping[str, Any]) -> bool:
    return (
        node["type"] == "sample"
        and node["is_observed"]
        and not site_is_subsample(node)
        and not node["infer"].get("_deterministic")
        and isinstance(node["value"], Tensor)
        and node["value"].numel() > 0
    )


def vouched(fn: Any) -> bool:
    """Whether the program says validate_args=False on a distribution."""
    while True:
        if vars(fn).get("_validate_args") is False:
            return True
        if not isinstance(fn, WRAPPERS):
            return False
        fn = fn.base_dist


def outside(node: Mapping[str, Any]) -> Outside | None:
    """Return which entries of an observed site lie outside its support; None where no support is declared."""
    fn, value = node["fn"], node["value"]
    base = bare(fn)
    support = _support(base)
    if support is None:
        return None
    try:
        mask = around(fn, node["mask"], value.device, node["name"])
        inside = _inside(base, value)
    except (NotImplementedError, UnsupportedProgram):
        return None
    if inside is None:
        return None
    width = value.dim() - inside.dim() if inside.dim() <= value.dim() else support.event_dim
    gone = value.isnan() if value.is_floating_point() else torch.zeros_like(value, dtype=torch.bool)
    bad = ~inside & ~_reduced(gone, width)
    if mask is not None:
        bad = bad & ~_reduced(~mask, width)
    return Outside(bad, width, support, _moves(base))


def _reduced(found: Tensor, width: int) -> Tensor:
    return found.flatten(found.dim() - width).any(-1) if width else found


def _support(base: Any) -> Any:
    """Return the declared support of one entry; None where there is none."""
    if type(base) in TRANSFORMED and base.transforms:
        support = base.transforms[-1].codomain
    else:
        try:
            support = base.support
        except (NotImplementedError, AttributeError):  # AttributeError: a wrapper of a distribution of another library
            return None
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return None if constraints.is_dependent(support) else support


def _inside(base: Any, value: Tensor) -> Tensor | None:
    """Return which entries of a value are in the support of a distribution, and of what it is transformed from."""
    if type(base) not in TRANSFORMED or not base.transforms:
        return holds(_support(base), value)
    found: Tensor | None = None
    for transform in reversed(base.transforms):
        found = _both(
            found, _nearly(_bare(transform.codomain), value) if found is not None else holds(transform.codomain, value)
        )
        try:
            value = transform.inv(value)
        except NotImplementedError:
            return found
    below = bare(base.base_dist)
    support = _support(below)
    return found if support is None or type(below) in TRANSFORMED else _both(found, _nearly(support, value))


def _bare(support: Any) -> Any:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


def _both(one: Tensor | None, other: Tensor) -> Tensor:
    if one is None:
        return other
    low = min(one.dim(), other.dim())
    return _reduced_all(one, one.dim() - low) & _reduced_all(other, other.dim() - low)


def _reduced_all(found: Tensor, width: int) -> Tensor:
    return found.flatten(found.dim() - width).all(-1) if width else found


def _nearly(support: Any, value: Tensor) -> Tensor:
    """Check a value that went back through a transform, and so is rounded."""
    step = ROUNDING * torch.finfo(value.dtype).eps * (1 + value.abs()) if value.is_floating_point() else 0
    return holds(support, value) | holds(support, value - step) | holds(support, value + step)


def holds(support: Any, value: Tensor) -> Tensor:
    """Return which entries of a value a constraint holds, without the event dimensions of one entry."""
    support = _bare(support)
    kind = _name(support)
    if kind == "Simplex":
        eps = torch.finfo(value.dtype).eps if value.is_floating_point() else 0.0
        return (value >= 0).all(-1) & ((value.sum(-1) - 1).abs() <= SUM + 4 * eps * value.shape[-1])
    found: Tensor = support.check(value)
    if kind == "Multinomial":
        found = found & (value == value.round()).all(-1)
    return found


def _name(support: Any) -> str:
    return type(support).__name__.lstrip("_")


def _kind(fn: Any) -> str:
    return type(bare(fn)).__name__


def _first(node: Mapping[str, Any], bad: Tensor, width: int) -> tuple[list[int], Tensor]:
    """Return the place of the first entry that is outside, and its value."""
    place = bad.nonzero()[0].tolist()
    value = node["value"]
    value = value.expand(*bad.shape, *value.shape[value.dim() - width :])
    return place, value[tuple(place)]


def _where(node: Mapping[str, Any], bad: Tensor, found: Outside, plate: str) -> str:
    place, value = _first(node, bad, found.width)
    shown = f"{value.item():g}" if value.numel() == 1 else f"[{', '.join(f'{v:.4g}' for v in value.flatten()[:5].tolist())}"
    shown += "" if value.numel() == 1 else "]" if value.numel() <= 5 else ", ...]"
    frame = frame_of(node, plate)
    at = None if frame is None else bad.dim() + frame.dim - (node["fn"].event_dim - found.width)
    if at is None or at < 0:
        return f"{shown} at {place}" if place else shown
    rest = [p for i, p in enumerate(place) if i != at]
    entry = f", entry {rest[0] if len(rest) == 1 else rest}" if rest else ""
    return f"{shown} at datum {place[at]}{entry}"


def _refusal(node: Mapping[str, Any], bad: Tensor, found: Outside, plate: str) -> str:
    words = _words(found.support)
    return (
        f"site {node['name']!r}: the observed value {_where(node, bad, found, plate)} is outside the support of "
        f"{_kind(node['fn'])} ({words}), so it has no probability and log p(x) does not exist; {_cure(node, bad, found)}, "
        "or say validate_args=False on the distribution, if the formula is meant"
    )


def _words(support: Any) -> str:
    kind = _name(support)
    low, high = (getattr(support, name, None) for name in ("lower_bound", "upper_bound"))
    low = None if isinstance(low, Tensor) and low.dim() else low
    if kind == "IntegerGreaterThan" and low == 0:
        return "whole numbers from 0"
    numbers = isinstance(low, int | float) and isinstance(high, int | float)
    if kind in ("IntegerInterval", "Interval", "HalfOpenInterval") and numbers:
        return f"{WORDS[kind].split(' in ')[0]} from {low:g} to {high:g}"
    if kind in ("GreaterThan", "GreaterThanEq") and low == 0:
        return "numbers above 0" if kind == "GreaterThan" else "numbers from 0"
    return WORDS.get(kind, str(support))


def _cure(node: Mapping[str, Any], bad: Tensor, found: Outside) -> str:
    kind, value = _name(found.support), node["value"]
    values = value.expand(*bad.shape, *value.shape[value.dim() - found.width :])[bad].double()
    whole, signed = bool((values == values.round()).all()), bool((values < 0).any())
    if kind == "Boolean":
        if not whole and not signed and bool((values <= 1).all()):
            return "make the values binary, e.g. (x > 0.5).float(), or take ContinuousBernoulli for values between 0 and 1"
        return "take Poisson or NegativeBinomial for counts, Categorical for codes, Normal for other numbers"
    if kind.startswith("Integer"):
        if signed:
            return "take Normal or StudentT for numbers of both signs, or leave such data out"
        if not whole:
            return "round the values if they are counts, else take Gamma, LogNormal or Normal"
        return "raise its upper limit (total_count, or the number of categories, which are numbered from 0)"
    if kind in ("GreaterThan", "GreaterThanEq"):
        return "take Normal or StudentT for numbers of both signs, mask such entries or leave such data out"
    if kind in ("Interval", "HalfOpenInterval", "LessThan"):
        return "bring the values into its limits, or take Normal for numbers without limits"
    if kind == "Simplex":
        return "divide each vector by its sum"
    if kind == "OneHot":
        return "give codes by torch.nn.functional.one_hot, or take Categorical"
    if kind == "Multinomial":
        return "give whole counts and a total_count that is not below their sum"
    return "take a distribution whose support holds the values"


def widened(fn: Any, shape: torch.Size, name: str) -> Any:
    """Return a distribution whose draws have the shape of the observed value, independent where log_prob broadcasts.

    Raises:
        UnsupportedProgram: the value is wider than the event of a distribution whose entries depend on one another.
    """
    own = torch.Size([*fn.batch_shape, *fn.event_shape])
    try:
        wanted = torch.broadcast_shapes(own, shape)
    except RuntimeError:
        wanted = own  # not a broadcast: the log density says what is wrong
    if wanted == own:
        return fn
    batch = wanted[: len(wanted) - fn.event_dim]
    if wanted[len(wanted) - fn.event_dim :] == fn.event_shape:
        return fn.expand(batch)
    if isinstance(fn, INDEPENDENT):
        return widened(fn.base_dist, wanted, name).to_event(fn.reinterpreted_batch_ndims)
    if isinstance(fn, dist.MaskedDistribution):
        return widened(fn.base_dist, wanted, name).mask(fn._mask)
    raise UnsupportedProgram(
        f"site {name!r}: the observed value has shape {tuple(shape)}, a draw of {_kind(fn)} {tuple(own)}; give the "
        "distribution the shape of its value, by parameters of that shape or by .expand"
    )
