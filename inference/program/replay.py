"""The Pyro handler that substitutes latent values into a program and collects its log densities per datum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Transform

from elbowroom.inference.program.bilinear import Bilinear
from elbowroom.inference.program.edges import bijection, density, draw
from elbowroom.inference.program.factorised import log_prob as sharing_log_prob
from elbowroom.inference.program.factorised import shared_log_prob
from elbowroom.inference.program.sites import Program, Site, frame_of, per_datum, support_of

Free = tuple[Tensor, Transform]  # unconstrained coordinates in the program's layout, and the map from them


class Replay(Messenger):
    """Substitute values at a program's sites, in program order, and collect log densities per datum.

    Args:
        program: the description of the pair.
        assignment: values of the discrete sites; a site without one is drawn.
        z: unconstrained coordinates (N, d), mapped to each site's support when the program reaches it.
        values: constrained values by site, instead of z.
        free: the unconstrained coordinates of these values, with the map from them, by site; densities are then those of the
            coordinates.
        index: sub-sampling indices, if not the program's own.
        shared: z is (G, 1, d), the same points for every datum; densities are then sums (`Bilinear`) not multiplied out.
        draws_dim: batch dimension of an outer plate of draws; densities are then summed per draw, not per datum.

    Attributes:
        values: the value of each latent site that the program reached.
        distributions: its distribution in the program.
        free: its unconstrained coordinates with the map from them: as given, from z, or as drawn where they can be drawn.
        per_draw: log density of the latent sites per draw of the outer plate, (S,).
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
    ) -> None:
        super().__init__()
        self.program = program
        self.sites = {site.name: site for site in program.sites}
        self.discrete = {site.name: site for site in program.discrete}
        self.assignment = assignment
        self.z = z
        self.given = values
        self.free: dict[str, Free] = dict(free or {})
        self.index = program.index if index is None else index
        self.shared = shared
        self.draws_dim = draws_dim
        self.per_draw: Any = 0.0
        self.values: dict[str, Tensor] = {}
        self.distributions: dict[str, Any] = {}
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
        elif name in self.discrete:
            if name in self.assignment:
                self._set(msg, self._assigned(self.discrete[name], msg))
        elif name in self.sites and self.given is not None:
            self._set(msg, self.given[name])
        elif name in self.sites and self.z is not None:
            self._place(msg, self.sites[name].split(self.z), bijection(support_of(msg["fn"])))
        elif name in self.sites and msg["value"] is None and (transform := self.sites[name].transform) is not None:
            u = draw(msg["fn"], transform)
            if u is not None:
                self._place(msg, u, transform)

    def _place(self, msg: Any, u: Tensor, transform: Transform) -> None:
        self.free[msg["name"]] = u, transform
        self._set(msg, transform(u))

    @staticmethod
    def _set(msg: Any, value: Tensor) -> None:
        msg["value"] = value
        msg["done"] = True

    def _assigned(self, site: Site, msg: Any) -> Tensor:
        fn = msg["fn"]
        value = self.assignment[site.name]
        batch = [1] * len(fn.batch_shape) if self.shared else fn.batch_shape  # size 1: the same for every datum
        return value.expand(*batch, *value.shape[value.dim() - fn.event_dim :])

    def _jacobian(self, site: Site, transform: Any, u: Tensor, value: Tensor, mask: Any) -> Tensor:
        det = transform.log_abs_det_jacobian(u, value)
        batch_ndim = u.dim() - site.free_event_dim
        det = det.flatten(batch_ndim).sum(-1) if det.dim() > batch_ndim else det
        det = scale_and_mask(det, 1.0, mask)
        return self._reduce(det, site.plate_dim)

    def _reduce(self, log_prob: Any, dim: int) -> Any:
        if self.shared:
            return log_prob
        return per_datum(log_prob, dim, self._n_obs())

    def _n_obs(self) -> int:
        if self.z is not None:
            return int(self.z.shape[0])
        if self.given:
            name, value = next(iter(self.given.items()))
            site = self.sites[name]
            return int(value.shape[value.dim() + site.plate_dim - site.event_dim])
        return self.program.n_obs

    def _pyro_post_sample(self, msg: Any) -> None:
        name, fn = msg["name"], msg["fn"]
        if name in self.index or name in self.program.pinned or name in self.program.dropped:
            return
        if msg["infer"].get("_deterministic"):
            return
        if name in self.sites or name in self.discrete:
            self.values[name] = msg["value"]
            self.distributions[name] = fn
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
                det = self._jacobian(self.sites[name], transform, u, msg["value"], msg["mask"])
                self.log_det = self.log_det + det
        if raw is None:
            raw = (shared_log_prob if self.shared else sharing_log_prob)(fn, msg["value"])
        frame = frame_of(msg, self.program.plate)
        if isinstance(raw, Bilinear) and (msg["mask"] is not None or frame is None):
            raw = raw.dense(len(msg["value"]))
        log_prob: Any = raw if isinstance(raw, Bilinear) else scale_and_mask(raw, 1.0, msg["mask"])
        if frame is None:
            self.outside = self.outside + log_prob.sum()
        elif name in self.values:
            self.log_prior = self.log_prior + self._reduce(log_prob, frame.dim)
        else:
            self.log_likelihood = self.log_likelihood + self._reduce(log_prob, frame.dim)


Which = Literal["model", "guide"]
