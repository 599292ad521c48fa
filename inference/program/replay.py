"""The Pyro handler that substitutes latent values into a program and collects its log densities per datum."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import pyro.distributions as dist
import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Transform
from torch.distributions.transforms import IndependentTransform

from elbowroom.inference.program.carriers import JointCarrier, carriers_by_site
from elbowroom.inference.program.densities.bilinear import Bilinear
from elbowroom.inference.program.densities.edges import bijection, density, draw
from elbowroom.inference.program.densities.factorised import log_prob as sharing_log_prob
from elbowroom.inference.program.densities.factorised import shared_log_prob
from elbowroom.inference.program.eliminated import Factors
from elbowroom.inference.program.masks import bare, coordinates, entries, masks_inside
from elbowroom.inference.program.observed import impossible
from elbowroom.inference.program.sites import Program, Site, frame_of, per_datum, support_of

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)

Which = Literal["model", "guide"]
Free = tuple[Tensor, Transform]  # unconstrained coordinates in the program's layout, and the map from them


class Replay(Messenger):
    """Substitute values at a program's sites, in program order, and collect log densities per datum.

    Args:
        program: the description of the pair.
        assignment: values of the discrete sites; a site without one is drawn.
        z: unconstrained coordinates (N, d), mapped to each site's support when the program reaches it.
        values: constrained values by site; they come before z, which then serves the gates alone.
        free: the unconstrained coordinates of these values, with the map from them, by site; densities are then those of the
            coordinates.
        index: sub-sampling indices, if not the program's own.
        shared: z is (G, 1, d), the same points for every datum; densities are then sums (`Bilinear`) not multiplied out.
        draws_dim: batch dimension of an outer plate of draws; densities are then summed per draw, not per datum.
        summed: what becomes of the sites of `Program.summed`: `ignored`, they are drawn and do not count; `counted`, they are
            drawn, and the densities are those beside these draws; `eliminated`, summed out inside `poutine.enum`.
        clamped: values of these sites, to which a sum over all values is held.

    Attributes:
        values: the value of each latent site that the program reached.
        distributions: its distribution in the program.
        masks: the mask around it, None if there is none.
        padding: log density of the coordinates that discrete sites mask, (N,), if z is given; 0.0 if there are none.
        free: its unconstrained coordinates with the map from them: as given, from z, or as drawn where they can be drawn.
        per_draw: log density of the latent sites per draw of the outer plate, (S,).
        of_summed: the values of the sites of `Program.summed`.
        log_prior: log density of the latent sites, (N,).
        log_likelihood: log density of the observed sites, (N,).
        log_det: log Jacobian of the map from z to the values, (N,), of the sites whose density is not computed from z.
        outside: log density of the observed sites outside the data plate.
    """

    def __init__(
        self,
        program: Program,
        assignment: dict[str, Tensor],
        *,
        z: Tensor | None = None,
        values: dict[str, Tensor] | None = None,
        free: Mapping[str, Free] | None = None,
        index: dict[str, Tensor] | None = None,
        shared: bool = False,
        draws_dim: int | None = None,
        summed: Literal["ignored", "counted", "eliminated"] = "ignored",
        clamped: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.program = program
        self.sites = {site.name: site for site in program.sites}
        self.discrete = {site.name: site for site in program.discrete}
        self.carried = carriers_by_site(program.carriers)
        self.assignment = assignment
        self.z = z
        self.given = values
        self.free: dict[str, Free] = dict(free or {})
        self.index = program.index if index is None else index
        self.shared = shared
        self.draws_dim = draws_dim
        self.factors = Factors(program.summed, program.plate, clamped or {}) if summed == "eliminated" else None
        self.uncounted = frozenset() if summed == "counted" else program.summed
        self.of_summed: dict[str, Tensor] = {}
        self.per_draw: Any = 0.0
        self.values: dict[str, Tensor] = {}
        self.carrying: dict[str, Tensor] = {}
        self.distributions: dict[str, Any] = {}
        self.masks: dict[str, Any] = {}
        self.padding: Any = 0.0
        nothing = Bilinear() if shared else 0.0
        self.log_prior: Any = nothing
        self.log_likelihood: Any = nothing
        self.log_det: Any = nothing
        self.outside: Any = 0.0

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name in self.index:
            self._set(msg, self.index[name])
        elif msg["is_observed"]:
            return
        elif name in self.program.pinned:
            self._set(msg, self.program.pinned[name])
        elif name in self.program.carriers:
            self._place_carrier(self.program.carriers[name], msg)
        elif name in self.program.summed:
            if self.factors is not None:
                self.factors.enumerate(msg)
        elif name in self.discrete:
            if name in self.assignment:
                self._set(msg, self._assigned(self.discrete[name], msg))
        elif name in self.sites and self.given is not None:
            self._set(msg, self.given[name])
        elif name in self.carried and self.carried[name].name in self.carrying:
            site = self.sites[name]
            self._place(msg, site.split(self.carrying[self.carried[name].name]), bijection(site.support))
        elif name in self.sites and self.z is not None:
            self._place(msg, self.sites[name].split(self.z), bijection(support_of(msg["fn"])))
        elif name in self.sites and msg["value"] is None and (transform := self.sites[name].transform) is not None:
            u = draw(msg["fn"], transform)
            if u is not None:
                self._place(msg, u, transform)

    def _coordinates(self) -> Tensor:
        """Return the coordinates (N, d) of the given values, for the sites that carry them."""
        parts = []
        for site in self.program.sites:
            given = self.free.get(site.name)
            u = given[0] if given is not None else bijection(site.support).inv(self.given[site.name])  # type: ignore[index]
            rows = site.gather(u, site.free_event_dim)
            parts.append(rows.reshape(len(rows), -1))
        return torch.cat(parts, -1)

    def _place_carrier(self, carrier: Any, msg: Any) -> None:
        """Give an auxiliary site of the guide the value at which its Deltas have theirs; draw a vector of all data."""
        if self.given is not None:
            self.carrying[carrier.name] = self._coordinates()
        elif isinstance(carrier, JointCarrier):
            if self.draws_dim is not None:
                raise RuntimeError("one vector of all data is drawn once at a time")
            self.carrying[carrier.name] = carrier.draw(self.program.dim, msg["fn"].mean)
        if carrier.name in self.carrying:
            self._set(msg, carrier.value(self.carrying[carrier.name]))

    def _place(self, msg: Any, u: Tensor, transform: Transform) -> None:
        self.free[msg["name"]] = u, transform
        self._set(msg, transform(u))

    def _set(self, msg: Any, value: Tensor) -> None:
        msg["value"] = value
        msg["done"] = self.factors is None  # `poutine.enum` passes over what is done, and a value is enough

    def _assigned(self, site: Site, msg: Any) -> Tensor:
        fn = msg["fn"]
        value = self.assignment[site.name]
        batch = [1] * len(fn.batch_shape) if self.shared else fn.batch_shape  # size 1: the same for every datum
        return value.expand(*batch, *value.shape[value.dim() - fn.event_dim :])

    def _jacobian(self, site: Site, transform: Any, u: Tensor, value: Tensor, msg: Any) -> Tensor:
        inside = masks_inside(msg["fn"], site.name)
        while inside and isinstance(transform, IndependentTransform):  # a mask inside may keep some entries of an event
            transform = transform.base_transform
        det = transform.log_abs_det_jacobian(u, value)
        if inside:
            keep: Any = entries(msg["fn"], None, u.device, site.name)
            det = torch.where(keep.reshape([*keep.shape, *(1,) * (det.dim() - keep.dim())]), det, 0.0)
        batch_ndim = u.dim() - site.free_event_dim
        det = det.flatten(batch_ndim).sum(-1) if det.dim() > batch_ndim else det
        det = scale_and_mask(det, 1.0, msg["mask"])
        return self._reduce(det, site.plate_dim)

    def _reduce(self, log_prob: Any, dim: int) -> Any:
        if self.shared:
            return log_prob
        return per_datum(log_prob, dim, self._n_obs())

    def _n_obs(self) -> int:
        if self.z is not None:
            return int(self.z.shape[0])
        if self.given:
            name, value = next((name, value) for name, value in self.given.items() if name in self.sites)
            site = self.sites[name]
            return int(value.shape[value.dim() + site.plate_dim - site.event_dim])
        return self.program.n_obs

    def _pyro_post_sample(self, msg: Any) -> None:
        name, fn = msg["name"], msg["fn"]
        if name in self.index or name in self.program.pinned or name in self.program.dropped:
            return
        if msg["infer"].get("_deterministic"):
            return
        if name in self.program.carriers:
            self._carry(name, msg)
            return
        if name in self.sites or name in self.discrete:
            self.values[name] = msg["value"]
            self.distributions[name] = fn
            self.masks[name] = msg["mask"]
            if name in self.program.gated and self.z is not None:
                self.padding = self.padding + self._gate(name, self.z)
            if name in self.carried and is_carried(fn):
                return  # its density is that of its carrier
        elif name in self.program.summed:
            self.of_summed[name] = msg["value"]
            if self.factors is None and name in self.uncounted:
                return
        elif not msg["is_observed"]:
            return
        if self.draws_dim is not None:
            if name in self.values:
                drawn = scale_and_mask(fn.log_prob(msg["value"]), 1.0, msg["mask"]).movedim(self.draws_dim, 0)
                self.per_draw = self.per_draw + drawn.reshape(len(drawn), -1).sum(1)
            return
        raw: Any = None
        if name in self.sites and name in self.free:
            u, transform = self.free[name]
            raw = density(fn, transform, u)
            if raw is None:
                det = self._jacobian(self.sites[name], transform, u, msg["value"], msg)
                self.log_det = self.log_det + det
        if raw is None:
            raw = (shared_log_prob if self.shared else sharing_log_prob)(fn, msg["value"])
        if name in self.program.moving and isinstance(raw, Tensor):
            gone = impossible(msg)
            raw = raw if gone is None else torch.where(gone, -torch.inf, raw)
        frame = frame_of(msg, self.program.plate)
        if isinstance(raw, Bilinear) and (msg["mask"] is not None or frame is None):
            raw = raw.dense(len(msg["value"]))
        log_prob: Any = raw if isinstance(raw, Bilinear) else scale_and_mask(raw, 1.0, msg["mask"])
        if self.factors is not None and self.factors.take(msg, log_prob):
            return
        if frame is None:
            self.outside = self.outside + log_prob.sum()
        elif not msg["is_observed"]:
            self.log_prior = self.log_prior + self._reduce(log_prob, frame.dim)
        else:
            self.log_likelihood = self.log_likelihood + self._reduce(log_prob, frame.dim)

    def __exit__(self, *exception: Any) -> Any:
        if self.factors is not None and exception[0] is None:
            prior, likelihood = self.factors.log_sums(self._n_obs())
            self.log_prior, self.log_likelihood = self.log_prior + prior, self.log_likelihood + likelihood
        return super().__exit__(*exception)

    def _carry(self, name: str, msg: Any) -> None:
        """Add the density of an auxiliary site to that of the sites that it carries."""
        carrier = self.program.carriers[name]
        if isinstance(carrier, JointCarrier):
            self.log_prior = self.log_prior + carrier.log_prob(self.carrying[name])
            return
        log_prob = scale_and_mask(msg["fn"].log_prob(msg["value"]), 1.0, msg["mask"])
        if self.draws_dim is not None:
            drawn = log_prob.movedim(self.draws_dim, 0)
            self.per_draw = self.per_draw + drawn.reshape(len(drawn), -1).sum(1)
            return
        self.log_prior = self.log_prior + self._reduce(log_prob, carrier.site.plate_dim)

    def kept(self, name: str) -> Tensor | None:
        """Return which coordinates, or entries of a discrete site, masks keep: (*batch, *event); None if there is no mask."""
        fn, mask, device = self.distributions[name], self.masks[name], self.values[name].device
        if name in self.discrete:
            return entries(fn, mask, device, name)
        site = self.sites[name]
        return coordinates(fn, mask, device, name, site.free_shape[len(site.free_shape) - site.free_event_dim :])

    def columns(self, name: str) -> Tensor | None:
        """Return `kept` by datum: (N, columns of the site in z), or (N, entries) for a discrete site."""
        keep = self.kept(name)
        if keep is None:
            return None
        site = self.discrete.get(name) or self.sites[name]
        width = keep.dim() - len(self.distributions[name].batch_shape)
        keep = site.gather(keep, width)
        return keep.reshape(len(keep), -1)

    def _gate(self, name: str, z: Tensor) -> Tensor | float:
        """Return the log density of what masks remove of a site, (N,)."""
        keep, gate = self.columns(name), self.program.gated[name]
        if keep is None:
            return 0.0
        if name in self.discrete:
            return -gate.log_values * (~keep).to(z.dtype).sum(-1)
        loc, scale = (torch.tensor(numbers, dtype=z.dtype, device=z.device) for numbers in (gate.loc, gate.scale))
        log_p = -0.5 * ((z[..., self.sites[name].columns] - loc) / scale).square() - scale.log() - HALF_LOG_2PI
        return torch.where(keep, 0.0, log_p).sum(-1)


def is_carried(fn: Any) -> bool:
    """Whether a site is a Delta, which has no density of its own."""
    return isinstance(bare(fn), dist.Delta)
