"""Tests of a new `LogJoint`, at values drawn from guide and prior.

The densities of model and guide must be finite and deterministic, the latents of one datum must not change those of another,
the density of values observed outside the plate must not depend on a latent, and every faster evaluation must equal one draw
at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from torch import Tensor

from elbowroom.errors import UnsupportedProgram, first_line
from elbowroom.inference.program.replay import Which
from elbowroom.inference.program.sites import frame_of
from elbowroom.inference.randomness import seeded
from elbowroom.inference.target.checks.separation import FAILURES, OF_GUIDE, dimensions
from elbowroom.inference.target.plain import PlainLogJoint
from elbowroom.system.rounding import coarse

FEW = 10  # data, whose spread says little
DRAWS = 4  # from the guide, and as many from the prior
ASSIGNED = 64  # joint values of discrete sites that a check goes through
OFTEN, WORK = 256, 2**22  # draws whose rows are mixed, and entries (observed or latent) evaluated for them at most
COUPLED = {
    "model": "model: moving the latents of some data changes log p of others; the data are coupled (batch normalisation in "
    "train mode, or a latent shared between data), so no per-datum posterior exists",
    "guide": "guide: moving the latents of some data changes log q of others; q(z|x) is not a product over the data, so no "
    "datum has an ELBO or a gap of its own",
}
PER_STEP = 16  # continuous sites, as of a sequence step by step, above which `vmap`, at each operation, costs more than rows


def probe(joint: PlainLogJoint, draw: Callable[[Which, int, int], Tensor], dtype: torch.dtype | None) -> Tensor:
    """Test a new `LogJoint`, set its dtype and mode, and return the values used, (S, N, d).

    Raises:
        UnsupportedProgram: the pair fails a test; names the fault.
    """
    try:
        from_guide = draw("guide", DRAWS, 0)
        base = joint(from_guide)
    except FAILURES as error:
        raise UnsupportedProgram(f"model: it cannot be evaluated at a draw of the guide: {first_line(error)}") from error
    if not base.isfinite().all():
        row = int((~base.isfinite()).any(0).nonzero()[0])
        which = _NotFinite(joint, row)
        if not joint.program.discrete:  # some of whose joint values may well be impossible
            with which:
                joint(from_guide)
        raise UnsupportedProgram(f"model: log p(x, z) of datum {row} is not finite at a draw of the guide{which.words}")
    if not torch.equal(base, joint(from_guide)):
        raise UnsupportedProgram(
            "model: its log density changes between two evaluations at the same z; something draws random numbers outside "
            "a sample site (dropout left on?) or depends on a value that was integrated out"
        )
    try:
        z = torch.cat([from_guide, draw("model", DRAWS, 1)])
        values = joint(z)
    except FAILURES as error:
        raise UnsupportedProgram(f"model: it cannot be run forward from its prior: {first_line(error)}") from error
    if dtype is not None:
        z, values = _set_dtype(joint, dtype, z, values)
    _check_local(joint, z, values)
    _check_outside(joint, z)
    _check_summed(joint, z)
    _check_masked(joint, z)
    _set_mode(joint, z, values, _check_guide(joint, z[:OF_GUIDE]))
    _check_often(joint, draw)
    return z


class _NotFinite(Messenger):
    """Says in `words` at which site, in program order, the log density of a datum is not finite; empty where none is found."""

    def __init__(self, joint: PlainLogJoint, row: int) -> None:
        super().__init__()
        self.plate, self.row, self.words = joint.program.plate, row, ""

    def _pyro_post_sample(self, msg: Any) -> None:
        fn, value, frame = msg["fn"], msg["value"], frame_of(msg, self.plate)
        if self.words or frame is None or not hasattr(fn, "event_dim") or msg["infer"].get("_deterministic"):
            return  # found, outside the plate, the sub-sampling of a plate, or no random variable
        try:
            log_prob = scale_and_mask(fn.log_prob(value), 1.0, msg["mask"])
        except FAILURES:  # a site whose density `joint` computes in another way
            return
        value = value.expand(*log_prob.shape, *value.shape[value.dim() - fn.event_dim :])
        if log_prob.dim() >= -frame.dim and log_prob.shape[frame.dim] > 1:
            value, log_prob = value.select(frame.dim - fn.event_dim, self.row), log_prob.select(frame.dim, self.row)
        bad = ~log_prob.isfinite()
        if bool(bad.any()):
            at = tuple(bad.nonzero()[0].tolist())
            number = f" {value[at].item():g}" if fn.event_dim == 0 else ""
            kind = "observed " if msg["is_observed"] else ""
            self.words = f": the log density of site {msg['name']!r} is {log_prob[at].item():g} at the {kind}value{number}"


def _set_dtype(joint: PlainLogJoint, dtype: torch.dtype, z: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    own = joint.own_dtype
    try:
        joint.set_dtype(dtype)
        joint.promote(dtype)
        converted = joint(z)
    except FAILURES as error:
        raise UnsupportedProgram(
            f"model: it cannot be evaluated in {dtype}: {first_line(error)}; give all its tensors as arguments, parameters or "
            "buffers, or make them in that type"
        ) from error
    finite = values.isfinite()
    off = (converted[finite] - values.to(dtype)[finite]).abs()
    if not bool((off <= 1e-2 + 1e-3 * converted[finite].abs()).all()):
        joint.note(
            f"log p(x, z) in {own} is off by up to {off.max().item():.2g} nats, by rounding; all is evaluated in {dtype}"
        )
    return z.to(dtype), converted


def _close(joint: PlainLogJoint, a: Tensor, b: Tensor) -> bool:
    """Equal up to rounding, where b is finite."""
    tight = 1e-9 if joint.dtype == torch.float64 else 1e-5
    finite = b.isfinite()
    return torch.allclose(a[finite], b[finite], rtol=tight, atol=100 * tight)


def _check_local(joint: PlainLogJoint, z: Tensor, values: Tensor) -> None:
    """Mix the rows of two draws: every datum must keep the value of its own draw."""
    if joint.n_obs < 2 or joint.dim == 0:
        return
    generator = torch.Generator().manual_seed(0)
    rows = (torch.rand(joint.n_obs, generator=generator) < 0.5).to(z.device)
    rows[0], rows[1] = True, False
    for a, b in ((0, 1), (DRAWS, DRAWS + 1), (0, DRAWS)):
        mixed = torch.where(rows[:, None], z[a], z[b])
        expected = torch.where(rows, values[a], values[b])
        if not _close(joint, joint(mixed[None])[0], expected):
            raise UnsupportedProgram(COUPLED["model"])


def _check_often(joint: PlainLogJoint, draw: Callable[[Which, int, int], Tensor]) -> None:
    """Mix the rows of many draws: latents may be coupled in rare draws alone, as by a threshold that any datum may pass."""
    if joint.n_obs < 2 or joint.dim == 0:
        return
    entries = max(joint.n_obs * joint.dim, sum(value.numel() for value in joint.program.observed.values()))
    count = max(DRAWS, min(OFTEN if joint.mode != "loop" else 4 * DRAWS, WORK // max(entries, 1)))
    generator = torch.Generator().manual_seed(1)
    order = torch.rand(count, joint.n_obs, generator=generator).argsort(0).to(joint.device)
    of_guide = draw("guide", count, 2).to(joint.dtype or joint.own_dtype)
    of_prior = draw("model", count // 4, 3).to(of_guide.dtype)
    of_both = torch.cat([of_guide[count // 4 :], of_prior])
    for which, density, z in (("guide", joint.log_guide, of_guide), ("model", joint, of_both)):
        mixed = z.gather(0, order[..., None].expand_as(z))
        if not _close(joint, density(mixed), density(z).gather(0, order)):
            raise UnsupportedProgram(COUPLED[which])


def _check_outside(joint: PlainLogJoint, z: Tensor) -> None:
    """Check that the density of values observed outside the plate does not depend on the latents."""
    if joint.dim == 0:
        return
    with joint.snapshot.scope():
        first = joint.run("model", joint.program.assignments[0], z=z[0]).outside
        if not isinstance(first, Tensor):
            return  # no site is observed there
        others = [torch.as_tensor(joint.run("model", joint.program.assignments[0], z=u).outside) for u in z[1:]]
    outside = torch.stack([first, *others])
    if not _close(joint, outside, outside[:1].expand_as(outside)):
        raise UnsupportedProgram(
            f"model: an observed site outside plate {joint.plate!r} depends on the local latents, so the data are coupled "
            "through it; move it inside the plate"
        )


def _check_summed(joint: PlainLogJoint, z: Tensor) -> None:
    """Compare a sum held to drawn values of the sites that are summed out with a plain run at these values."""
    if not joint.program.summed:
        return
    with seeded(0), joint.snapshot.scope(), torch.no_grad():
        for u in z:
            plain = joint.run("model", joint.program.assignments[0], z=u, summed="counted")
            held = joint.run("model", joint.program.assignments[0], z=u, clamped=plain.of_summed)
            one, other = (r.log_prior + r.log_likelihood + r.log_det for r in (held, plain))
            if not _close(joint, torch.as_tensor(one), torch.as_tensor(other)):
                names = ", ".join(repr(name) for name in sorted(joint.program.summed))
                raise UnsupportedProgram(
                    f"model: it cannot be run at all values of {names} at once, by which they are summed out: it branches on "
                    "them, or counts dimensions from the left; count from the right and index by pyro.ops.indexing.Vindex"
                )


def _check_masked(joint: PlainLogJoint, z: Tensor) -> None:
    """Move what masks take out of the density: nothing else may depend on it, or there is no density there."""
    program = joint.program
    if program.active is None and not program.gated:
        return
    assignments = program.assignments
    chosen = assignments[:: -(-len(assignments) // ASSIGNED)]
    with seeded(0), joint.snapshot.scope(), torch.no_grad():
        for assignment in chosen:
            keep = torch.ones_like(z[0], dtype=torch.bool) if program.active is None else program.active
            model = joint.run("model", assignment, z=z[0])
            for site in program.sites:
                mine = model.columns(site.name) if site.name in program.gated else None
                if mine is not None:
                    keep = keep.index_copy(1, torch.arange(joint.dim, device=z.device)[site.columns], mine)
            if bool(keep.all()):
                continue
            values = []
            for u in (z[0], torch.where(keep, z[0], z[0] + 1.0)):
                model = joint.run("model", assignment, z=u)
                guide = joint.run("guide", assignment, values=model.values)
                values.append((model.log_prior + model.log_likelihood + model.log_det, guide.log_prior))
            for which, before, after in zip(("model", "guide"), *values, strict=True):
                same = torch.equal(before.isfinite(), after.isfinite())
                if not same or not _close(joint, after, before):
                    names = ", ".join(repr(s.name) for s in program.sites if not bool(keep[:, s.columns].all()))
                    raise UnsupportedProgram(
                        f"{which}: its log density depends on {names} where a mask takes that site out of the density, so it "
                        "is no density there; multiply the site's value by its mask wherever it is used"
                    )


def _check_guide(joint: PlainLogJoint, z: Tensor) -> Tensor:
    """Check that the guide's density at its own draws exists, is deterministic, and does not couple latents; return it."""
    try:
        log_q = joint.log_guide(z)
    except FAILURES as error:
        values = _improbable(joint, z[0])
        if values:
            raise UnsupportedProgram(f"guide: it gives no probability of {values}: {first_line(error)}") from error
        raise UnsupportedProgram(
            f"guide: its log density cannot be evaluated at values given to it ({first_line(error)}); a flow must have an "
            "inverse, as spline, affine coupling and autoregressive flows have, and planar, radial and Sylvester flows have not"
        ) from error
    if not _close(joint, joint.log_guide(z), log_q):
        raise UnsupportedProgram(
            "guide: its log density changes between two evaluations at the same z; something draws random numbers outside a "
            "sample site (dropout left on?)"
        )
    if joint.n_obs > 1 and joint.dim > 0:
        rows = torch.arange(joint.n_obs, device=z.device) % 2 == 0
        mixed = joint.log_guide(torch.where(rows[:, None], z[0], z[1])[None])[0]
        if not _close(joint, mixed, torch.where(rows, log_q[0], log_q[1])):
            raise UnsupportedProgram(COUPLED["guide"])
    return log_q


def _improbable(joint: PlainLogJoint, z: Tensor) -> str:
    """Name the first values of the guide's discrete sites at which its density cannot be evaluated."""
    for assignment in joint._guide_assignments():
        try:
            with joint.snapshot.scope():
                joint._guide_density(z, assignment)
        except FAILURES:
            return ", ".join(f"{name}={value.tolist()}" for name, value in assignment.items())
    return ""


def _set_mode(joint: PlainLogJoint, z: Tensor, values: Tensor, log_q: Tensor) -> None:
    """Choose the fastest evaluation that gives correct values."""
    guess = list(joint.data_dims)
    # with one datum the program may branch on its z, which has no single value when draws are repeated
    repeats = [] if joint.n_obs == 1 or joint.program.sized else dimensions(joint, none=False)
    modes = [("vmap", guess), *(("repeat", dims) for dims in repeats)]
    if len(joint.sites) > PER_STEP:
        modes = modes[1:] + modes[:1]
    for mode, dims in modes:
        joint.mode, joint.data_dims[:] = mode, dims
        try:
            again = joint(z)
            same = _close(joint, again, values) and bool((again.isfinite() == values.isfinite()).all())
            guide = joint.log_guide(z)
            right = same and guide.shape == values.shape and _close(joint, guide[:OF_GUIDE], log_q)
            if right and (joint.dim == 0 or joint.grad(z[:DRAWS])[1].isfinite().all()):
                return
            reason = "its values differ from one draw at a time"
        except FAILURES as error:
            reason = first_line(error)
        joint.note(f"{mode} over draws does not apply: {reason}")
    joint.mode, joint.data_dims[:] = "loop", guess


def note_rounding(joint: PlainLogJoint) -> None:
    """Note observed sites whose values single precision does not keep apart: p(x) is then that of other data."""
    for name, value in joint.program.observed.items():
        if value.dtype == torch.float32 and len(value) >= FEW:
            rows = value.detach().cpu().numpy()
            found = coarse([rows.reshape(len(rows), -1) if rows.ndim < 3 else rows], "float32")
            if found is not None:
                joint.note(
                    f"site {name!r}: {found}, where numbers of float32 are {found.step:.3g} apart: log p(x) is that of rounded "
                    f"values; pass float64 tensors, or subtract {found.size:.3g} or so from them beforehand"
                )
