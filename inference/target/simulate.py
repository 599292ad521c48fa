"""Data simulated from the model: (z, x) from the joint, as a new log joint, and x from p(x|z) at given z.

For simulated data one exact draw of the posterior is known. It gives two-sided evidence bounds without any reference
(bidirectional Monte Carlo: Grosse, Ancha and Roy 2016, https://arxiv.org/abs/1606.02275), and allows checks of calibration.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from elbowroom.errors import UnsupportedProgram
from elbowroom.inference.compiled.policies import policy
from elbowroom.inference.program.densities.edges import draw
from elbowroom.inference.program.frozen import arguments
from elbowroom.inference.program.masks import coordinates, kept
from elbowroom.inference.program.observed import widened
from elbowroom.inference.program.sites import Site, frame_of
from elbowroom.inference.randomness import seeded
from elbowroom.inference.target.draws import free, padded
from elbowroom.inference.target.log_joint import LogJoint

FLOAT = torch.float32  # smallest type for values with NaN
AGAIN = 86_028_121  # seed of a second run, at other latents


def simulate(log_joint: LogJoint, seed: int) -> tuple[LogJoint, Tensor]:
    """Draw (z, x) from the model and return the log joint of the new x with the z that it came from.

    The observed values must be among the arguments; simulated ones replace them. Everything else (covariates, masks, weights)
    stays the same. Entries that are missing (NaN) or masked in the data are so in the simulated data too. If masked entries of
    the argument all hold one number (NaN, or 0, as a mark), they keep it; otherwise they are simulated.

    Returns:
        A LogJoint of as many simulated data, and z (N, d) in unconstrained coordinates.

    Raises:
        UnsupportedProgram: an observed site's values are not an argument, a plate is sub-sampled, or a mask depends on the
            latents or on the values of the data.
    """
    program = log_joint.program
    with seeded(seed), log_joint.snapshot.scope(), torch.no_grad():
        given = _given(log_joint)
        model = _unobserved(log_joint, given)
        with _Values(log_joint) as drawn:
            model(*log_joint.args, **log_joint.kwargs)
        latent = {s.name: drawn.values[s.name][None] for s in (*program.sites, *program.discrete)}
        nothing = torch.zeros(log_joint.n_obs, 0, dtype=log_joint.dtype or log_joint.own_dtype, device=log_joint.device)
        z = free(log_joint, latent, "model", drawn.free) if program.sites else nothing[None]
        z = (padded(log_joint, z, drawn.kept) if drawn.kept else z)[0]
    observed, replacement = {}, {}
    for name, one in given.items():
        observed[name] = _by_datum(log_joint, one.node, one.with_holes(drawn.values[name]))
        if one.kept is not None and not bool(one.kept.any()):
            continue
        leaf = next((t for t in _tensors(log_joint) if _same(t, one)), None)
        if leaf is None:
            raise UnsupportedProgram(f"simulate: the values of observed site {name!r} are not an argument of the model")
        replacement[id(leaf)] = one.in_place_of(leaf, drawn.values[name])
    other = log_joint.copy()
    swap = lambda t: replacement.get(id(t), t)
    other.args, other.kwargs = arguments.mapped(swap, (log_joint.args, log_joint.kwargs))
    other.program = dataclasses.replace(program, observed={**program.observed, **observed})
    if any(one.kept is not None for one in given.values()):
        with seeded(seed), other.snapshot.scope(), torch.no_grad():
            _same_masks(given, _given(other), "values of the data")
    return other, z


def simulate_for_guide(log_joint: LogJoint, seed: int) -> tuple[LogJoint, Tensor]:
    """Simulate data, see `simulate`, for which the guide's q(z|x) is asked.

    Raises:
        UnsupportedProgram: as `simulate`; or the guide does not read x where `simulate` renews it: it has a row of parameters
            for each datum, or reads x from another argument.
    """
    other, z = simulate(log_joint, seed)
    with policy("never"), torch.no_grad(), seeded(seed):
        if _same_guide(log_joint, other) and (not log_joint.separable() or _reads_a_copy(log_joint, other)):
            raise UnsupportedProgram(
                "the guide does not read the data that are simulated: log q(z|x) stays what it was for other x (a row of "
                "parameters for each datum, or x once more in another argument), so nothing says what q(z|x) is for them"
            )
    return other, z


def _same_guide(one: LogJoint, other: LogJoint) -> bool:
    """Whether log q is the same with other arguments, at some z of every datum."""
    points = one.probe_points[:1]
    return torch.allclose(one.log_guide(points), other.log_guide(points), equal_nan=True)


def _reads_a_copy(log_joint: LogJoint, simulated: LogJoint) -> bool:
    """Whether the guide reads an argument that the model does not read and that is not simulated; tried by moving its rows."""
    leaves, points = log_joint.leaves(), log_joint.probe_points[:1]
    for place, (leaf, new) in enumerate(zip(leaves, simulated.leaves(), strict=True)):
        if log_joint.n_obs not in arguments.sizes(leaf) or new is not leaf:
            continue
        dim = arguments.sizes(leaf).index(log_joint.n_obs)
        moved = log_joint.copy()
        rolled = arguments.take(leaf, dim, torch.arange(log_joint.n_obs, device=log_joint.device).roll(1))
        moved.args, moved.kwargs = log_joint.with_leaves([*leaves[:place], rolled, *leaves[place + 1 :]])
        unread = torch.allclose(log_joint(points), moved(points), equal_nan=True)
        if unread and not _same_guide(log_joint, moved):
            return True
    return False


def predict(log_joint: LogJoint, sites: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Draw x ~ p(x|z) at given latents: with draws of a posterior, replicated data of the posterior predictive.

    Args:
        log_joint: the model and guide.
        sites: constrained values of all latent sites, also the discrete ones, name -> (S, N, *shape): those of a `Posterior`
            with its chains joined.
        seed: random seed.

    Returns:
        Values of the observed sites, name -> (S, N, *event), NaN where the data are missing or masked.

    Raises:
        UnsupportedProgram: a latent site has no value, a plate is sub-sampled, or a mask depends on the latents.
    """
    program = log_joint.program
    latents = (*program.sites, *program.discrete)
    for site in latents:
        if site.name not in sites:
            raise UnsupportedProgram(f"predict: no values of site {site.name!r} are given")
    dtype = log_joint.dtype or log_joint.own_dtype
    found: dict[str, list[Tensor]] = {}
    with seeded(seed), log_joint.snapshot.scope(), torch.no_grad():
        given = _given(log_joint)
        model = _unobserved(log_joint, given)
        for s in range(len(next(iter(sites.values())))):
            values = {}
            for site in latents:
                kind = dtype if site.values is None else site.values.dtype
                values[site.name] = _in_place(site, sites[site.name][s].to(log_joint.device, kind))
            with _Values(log_joint) as drawn:
                poutine.condition(model, data=values)(*log_joint.args, **log_joint.kwargs)
            for name, one in given.items():
                value = _by_datum(log_joint, one.node, one.with_holes(drawn.values[name]))
                found.setdefault(name, []).append(value)
    return {name: torch.stack(values) for name, values in found.items()}


class _Values(Messenger):
    """Keeps the value of every sample site, and what masks keep of gated ones; a trace would keep the whole run in memory.

    Latents are drawn in unconstrained coordinates where they can be, which are kept too, (1, ...).
    """

    def __init__(self, log_joint: LogJoint) -> None:
        super().__init__()
        self.sites = {site.name: site for site in log_joint.program.sites if site.name in log_joint.program.gated}
        self.maps = {site.name: site.transform for site in log_joint.program.sites}
        self.values: dict[str, Tensor] = {}
        self.kept: dict[str, Tensor] = {}
        self.free: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if msg["value"] is not None or (transform := self.maps.get(name)) is None:
            return
        u = draw(msg["fn"], transform)
        if u is not None:
            msg["value"], msg["done"] = transform(u), True
            self.free[name] = u[None]

    def _pyro_post_sample(self, msg: Any) -> None:
        name = msg["name"]
        self.values[name] = msg["value"]
        if name in self.sites:
            site = self.sites[name]
            event = site.free_shape[len(site.free_shape) - site.free_event_dim :]
            keep = coordinates(msg["fn"], msg["mask"], msg["value"].device, name, event)
            if keep is not None:
                by_datum = site.gather(keep, site.free_event_dim)
                self.kept[name] = by_datum.reshape(1, len(by_datum), -1)


class _Widened(Messenger):
    """Draws the observed sites in the shape of their data, over which log_prob broadcasts."""

    def __init__(self, shapes: Mapping[str, torch.Size]) -> None:
        super().__init__()
        self.shapes = shapes

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.shapes:
            msg["fn"] = widened(msg["fn"], self.shapes[msg["name"]], msg["name"])


def _unobserved(log_joint: LogJoint, given: Mapping[str, _Given]) -> Any:
    """Return the model with its observed sites drawn, and with its global latents fixed if they are pinned."""
    program = log_joint.program
    if program.index:
        raise UnsupportedProgram("simulate: a plate is sub-sampled; give the sub-sample as the data")
    shapes = {name: one.node["value"].shape for name, one in given.items()}
    model: Any = _Widened(shapes)(poutine.uncondition(log_joint.model))
    return poutine.condition(model, data=dict(program.pinned)) if program.pinned else model


def _observed(log_joint: LogJoint) -> dict[str, Any]:
    """Return the nodes of the observed sites inside the data plate, by name."""
    given = poutine.trace(log_joint.model).get_trace(*log_joint.args, **log_joint.kwargs)
    inside = lambda node: frame_of(node, log_joint.program.plate) is not None
    said = lambda node: not (node["infer"].get("_deterministic") or node["infer"].get("is_auxiliary"))
    return {
        name: node
        for name, node in given.nodes.items()
        if node["type"] == "sample" and node["is_observed"] and inside(node) and said(node)
    }


@dataclasses.dataclass(frozen=True)
class _Given:
    """An observed site: its node in a trace, and which entries of its value are in the likelihood (None: all)."""

    node: Any
    kept: Tensor | None

    def with_holes(self, drawn: Tensor) -> Tensor:
        """Return values with NaN (hence floating point) where the data are missing or masked."""
        data = self.node["value"]
        drawn = drawn.to(data.dtype)
        if data.is_floating_point():
            drawn = torch.where(data.isnan(), torch.nan, drawn)
        return (
            drawn if self.kept is None else torch.where(self.kept, drawn.to(torch.promote_types(drawn.dtype, FLOAT)), torch.nan)
        )

    def in_place_of(self, leaf: Tensor, drawn: Tensor) -> Tensor:
        """Return simulated values for the argument that held the data."""
        data = self.node["value"]
        new = drawn.to(data.dtype)
        if data.is_floating_point():
            new = torch.where(data.isnan(), torch.nan, new)
        new = new.reshape(leaf.shape)
        if self.kept is None:
            return new
        out = ~self.kept.reshape(leaf.shape)
        there = leaf[out]
        mark = bool(there.isnan().all()) or bool((there == there[0]).all())
        return torch.where(out if mark else out & leaf.isnan(), leaf, new.to(leaf.dtype))


def in_likelihood(log_joint: LogJoint) -> dict[str, Tensor]:
    """Return the data: values of the observed sites, name -> (N, ...), NaN where they are missing or masked.

    Sites that are entirely masked are left out.

    Raises:
        UnsupportedProgram: a mask depends on the latents, or removes only a part of an entry.
    """
    with seeded(0), log_joint.snapshot.scope(), torch.no_grad():
        given = _given(log_joint)
    found = {}
    for name, value in log_joint.program.observed.items():
        one = given.get(name)
        if one is None or one.kept is None:
            found[name] = value
        elif bool(one.kept.any()):
            found[name] = _by_datum(log_joint, one.node, one.with_holes(one.node["value"]))
    return found


def _given(log_joint: LogJoint) -> dict[str, _Given]:
    """Return the observed sites inside the data plate; masks must be the same in two runs with different z."""
    found = {name: _Given(node, kept(node)) for name, node in _observed(log_joint).items()}
    if any(one.kept is not None for one in found.values()):
        with seeded(AGAIN):
            again = {name: _Given(node, kept(node)) for name, node in _observed(log_joint).items()}
        _same_masks(found, again, "latents")
    return found


def _same_masks(one: Mapping[str, _Given], other: Mapping[str, _Given], what: str) -> None:
    for name in one:
        a, b = one[name].kept, other[name].kept
        if (a is None) != (b is None) or (a is not None and b is not None and not torch.equal(a, b)):
            raise UnsupportedProgram(f"which entries of {name!r} a mask takes out of the likelihood depends on the {what}")


def _by_datum(log_joint: LogJoint, node: Any, value: Tensor) -> Tensor:
    """Move the data dimension of an observed site's value to the front."""
    frame = frame_of(node, log_joint.program.plate)
    assert frame is not None
    return value.movedim(frame.dim - node["fn"].event_dim, 0)


def _in_place(site: Site, value: Tensor) -> Tensor:
    """Arrange a value (N, *shape) as the program does."""
    return value.movedim(0, site.plate_dim - site.event_dim)


def _tensors(log_joint: LogJoint) -> list[Tensor]:
    return [t for t in log_joint.leaves() if isinstance(t, Tensor)]


def _same(argument: Tensor, one: _Given) -> bool:
    """Whether an argument holds the values of a site, in the entries that are in the likelihood."""
    value, seen = one.node["value"], one.kept
    if argument.numel() != value.numel():
        return False
    mine, theirs = argument.flatten().to(value.dtype).nan_to_num(), value.flatten().nan_to_num()
    if seen is None:
        return torch.equal(mine, theirs)
    # an argument that is a mask is not data
    return argument.dtype != torch.bool and torch.equal(mine[seen.flatten()], theirs[seen.flatten()])
