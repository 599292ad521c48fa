"""Parts of the data, which are taken apart only if model and guide give each datum of a part what they give it among all.

Which dimension of an argument is that of the data is guessed by its size, tried, and guessed again.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from elbowroom.errors import first_line
from elbowroom.inference.program.frozen import arguments
from elbowroom.inference.randomness import seeded
from elbowroom.inference.target.plain import PlainLogJoint

OF_GUIDE = 2  # draws of the guide at which its own density is tested
SOME = 64  # rows of a random part of the data
CHOICES = 24  # choices of data dimensions that are tried at most
ONE_FOR_EACH = (
    "guide: it reads no data, and has parameters of its own for each datum: amortization is none by construction, and the part "
    "of the gap of that name is what the optimisation of these parameters has left"
)
ONE_FOR_ALL = "guide: it reads no data, and gives every datum the same q(z)"
BESIDE = (
    "guide: q(z|x) of a datum depends on the data beside it or on its place among them (statistics of the batch, "
    "attention over rows, parameters by position); it is evaluated on all these data together, and every number of "
    "it holds for them as a whole"
)
WHOLE = (
    "an argument with {n} entries along a dimension, as many as there are data, is kept whole: its entries are not those of "
    "the data, or model and guide read all of it for every datum"
)
FAILURES = (RuntimeError, ValueError, IndexError, TypeError, KeyError, AssertionError)


def separates(joint: PlainLogJoint, draw: Callable[..., Tensor]) -> bool:
    """Whether the data can be taken apart: model and guide give each datum of a part what they give it among all data.

    The parts are most of the data in reverse, the last datum alone, and some data at random, several of them twice. Where they
    fail with the first guess of which dimension of each argument is that of the data, others are tried (`_dimensions`), and
    the first one that holds is kept. Notes say if the guide is the reason why not, and if it reads no data.
    """
    if joint.program.index:  # the rows of this run alone
        return False
    guess = list(joint.data_dims)
    with torch.no_grad(), seeded(0):
        found = not joint.program.sized and _taken_apart(joint, draw)
        if None in [dim for dim, first in zip(joint.data_dims, guess, strict=True) if first is not None]:
            joint.note(WHOLE.format(n=joint.n_obs))
        elif (said := _without_data(joint)) is not None:
            joint.amortized = False
            joint.note(said)
    return found


def _taken_apart(joint: PlainLogJoint, draw: Callable[..., Tensor]) -> bool:
    """Set the data's dimensions, as `separates` says, and return whether they take all apart."""
    guess, notes, kept = list(joint.data_dims), [], None
    try:
        whole = _whole(joint)
    except FAILURES:
        joint.model_separates = [False]
        return False
    for dims in dimensions(joint):
        joint.data_dims[:] = dims
        of_model, reason = _separates(joint, draw, whole)
        if of_model and not reason:
            joint.model_separates = [True]
            return True
        if of_model:
            kept = kept or dims
            notes.append(reason)
    joint.data_dims[:], joint.model_separates = kept or guess, [kept is not None]
    for reason in notes[:1]:
        joint.note(reason)
    return False


def dimensions(joint: PlainLogJoint, *, none: bool = True) -> list[list[int | None]]:
    """Return choices of the data's dimension in each argument: the first guess, then those that change one argument, then two.

    A square of N rows and N columns has its data along either; N entries may be those of something else (None).
    """
    guess = joint.data_dims
    others: dict[int, list[int | None]] = {}
    for place, (leaf, dim) in enumerate(zip(joint.leaves(), guess, strict=True)):
        if dim is not None:
            fit: list[int | None] = [i for i, size in enumerate(arguments.sizes(leaf)) if size == joint.n_obs and i != dim]
            others[place] = [*fit, None] if none else fit
    found = []
    for count in (0, 1, 2):
        for places in itertools.combinations(others, count):
            for chosen in itertools.product(*(others[place] for place in places)):
                changed = dict(zip(places, chosen, strict=True))
                found.append([changed.get(place, dim) for place, dim in enumerate(guess)])
    return found[:CHOICES]


def _whole(joint: PlainLogJoint) -> tuple[Tensor, Tensor]:
    """Return log p(x, z) and log q(z|x) of all data, each in the joint's own mode."""
    z = joint.probe_points
    return joint._map(joint.density, z), joint._map(joint.guide_density, z[:OF_GUIDE])


def _separates(joint: PlainLogJoint, draw: Callable[..., Tensor], whole: tuple[Tensor, Tensor]) -> tuple[bool, str]:
    """Whether the model can be taken apart along `data_dims`, and the words if the guide cannot."""
    last, generator = joint.n_obs - 1, torch.Generator().manual_seed(0)
    some = torch.randint(joint.n_obs, (min(joint.n_obs, SOME),), generator=generator)
    parts = [torch.arange(max(1, last)).flip(0), torch.tensor([last]), torch.cat([some, some[:2]])]
    parts = [rows.to(joint.device) for rows in parts]
    try:
        repeated = joint.mode != "repeat" or all(map(_near, _whole(joint), whole))  # the draws' rows follow these dimensions
        if not repeated or not _model_separates(joint, parts, whole[0]):
            return False, ""
    except FAILURES:
        return False, ""
    try:
        return True, "" if _guide_separates(joint, parts, draw) else BESIDE
    except FAILURES as error:
        return True, f"guide: it does not run on a part of the data ({first_line(error)}); all data are evaluated together"


def _without_data(joint: PlainLogJoint) -> str | None:
    """Say what a guide is that reads no data: log q at the same z stays when each datum's arguments become its neighbour's."""
    rolled = torch.arange(joint.n_obs, device=joint.device).roll(1)
    try:
        others = joint._subset(rolled)
        pairs = zip(joint.leaves(), others.leaves(), strict=True)
        tensors = [(arguments.tensors(one)[:1], arguments.tensors(other)[:1]) for one, other in pairs]
        if all(torch.equal(a, b) for one, other in tensors for a, b in zip(one, other, strict=True)):
            return None  # all rows are alike: nothing can be said
        z = joint.probe_points[:OF_GUIDE]
        log_q = _log_guides(joint, z)
        if not _near(_log_guides(others, z), log_q):
            return None
        return ONE_FOR_ALL if _near(_log_guides(joint, z[:, rolled]), log_q[..., rolled]) else ONE_FOR_EACH
    except FAILURES:
        return None


def _model_separates(joint: PlainLogJoint, parts: list[Tensor], whole: Tensor) -> bool:
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
