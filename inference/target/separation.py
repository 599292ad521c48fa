"""Whether data can be taken apart: model and guide must give each datum of a part what they give it among all data."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from elbowroom.errors import first_line
from elbowroom.inference.randomness import seeded
from elbowroom.inference.target.checks import FAILURES, OF_GUIDE
from elbowroom.inference.target.plain import PlainLogJoint

SOME = 64  # rows of a random part of the data
ONE_FOR_EACH = (
    "guide: it reads no data, and has parameters of its own for each datum: amortization is none by construction, and the part "
    "of the gap of that name is what the optimisation of these parameters has left"
)
COUPLED = (
    "guide: q(z|x) of a datum depends on the data beside it or on its place among them (statistics of the batch, attention "
    "over rows, parameters by position); it is evaluated on all these data together, and every number of it holds for them as "
    "a whole"
)
ONE_FOR_ALL = "guide: it reads no data, and gives every datum the same q(z)"


def separates(joint: PlainLogJoint, draw: Callable[..., Tensor]) -> bool:
    """Whether the data can be taken apart: model and guide give each datum of a part what they give it among all data.

    The parts are most of the data in reverse, the last datum alone, and some data at random, several of them twice. Notes
    say if the guide is the reason why not, and if it reads no data.
    """
    if joint.program.index:  # the rows of this run alone
        return False
    last, generator = joint.n_obs - 1, torch.Generator().manual_seed(0)
    some = torch.randint(joint.n_obs, (min(joint.n_obs, SOME),), generator=generator)
    parts = [torch.arange(max(1, last)).flip(0), torch.tensor([last]), torch.cat([some, some[:2]])]
    parts = [rows.to(joint.device) for rows in parts]
    with torch.no_grad(), seeded(0):
        said = _without_data(joint)
        joint.amortized = said is None
        if said is not None:
            joint.note(said)
        if joint.program.sized:
            return False
        try:
            joint.model_separates = [_model_separates(joint, parts)]
            if not joint.model_separates[0]:
                return False
        except (RuntimeError, ValueError, IndexError):
            return False
        try:
            if _guide_separates(joint, parts, draw):
                return True
            joint.note(COUPLED)
        except FAILURES as error:
            joint.note(f"guide: it does not run on a part of the data ({first_line(error)}); all data are evaluated together")
    return False


def _without_data(joint: PlainLogJoint) -> str | None:
    """Say what a guide is that reads no data: log q at the same z stays when each datum's arguments become its neighbour's."""
    rolled = torch.arange(joint.n_obs, device=joint.device).roll(1)
    try:
        others = joint._subset(rolled)
        pairs = zip(joint.leaves(), others.leaves(), strict=True)
        if not any(isinstance(one, Tensor) and not torch.equal(one, other) for one, other in pairs):
            return None  # all rows are alike: nothing can be said
        z = joint.probe_points[:OF_GUIDE]
        log_q = _log_guides(joint, z)
        if not _near(_log_guides(others, z), log_q):
            return None
        return ONE_FOR_ALL if _near(_log_guides(joint, z[:, rolled]), log_q[..., rolled]) else ONE_FOR_EACH
    except FAILURES:
        return None


def _model_separates(joint: PlainLogJoint, parts: list[Tensor]) -> bool:
    whole = joint._map(joint.density, joint.probe_points)
    for rows in parts:
        part = joint._subset(rows)
        mine, full = part._map(part.density, part.probe_points), whole[:, rows]
        finite = full.isfinite()
        if not _near(mine[finite], full[finite]):
            return False
    return True


def _guide_separates(joint: PlainLogJoint, parts: list[Tensor], draw: Callable[..., Tensor]) -> bool:
    """Compare log q at the same z, and at draws of the parts."""
    z = joint.probe_points[:OF_GUIDE]
    whole = _log_guides(joint, z)
    for rows in parts:
        part = joint._subset(rows)
        if not _near(_log_guides(part, z[:, rows]), whole[..., rows]):
            return False
        if joint.dim and len(rows.unique()) == len(rows):
            own, full = draw(part, "guide", 1, 0), z[:1].clone()
            full[:, rows] = own
            if not _near(_log_guides(part, own), _log_guides(joint, full)[..., rows]):
                return False
    return True


def _log_guides(joint: PlainLogJoint, z: Tensor) -> Tensor:
    """Return log q(z, c | x) for some values c of the discrete sites that the guide draws, one draw at a time: (S, C, N)."""
    values = joint._guide_assignments()
    some = values[:: max(1, len(values) // 3)]
    with joint.snapshot.scope():
        return torch.stack([torch.stack([joint._guide_density(u, c) for c in some]) for u in z])


def _near(a: Tensor, b: Tensor) -> bool:
    close = 1e-6 if b.dtype == torch.float64 else 1e-4
    return a.shape == b.shape and torch.allclose(a, b, rtol=close, atol=close, equal_nan=True)
