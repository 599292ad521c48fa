"""log p(x_n, z_g) of every datum n at the same points z_g, with one decoding and one matrix product.

A program that broadcasts over a leading dimension is run at z (G, 1, d). If every term of its log density factorises
(`factorised`), the sum over prior, sites, normalizers and Jacobians is one matrix product (`bilinear`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from elbowroom.errors import first_line
from elbowroom.inference.program.densities.bilinear import Bilinear, Kept
from elbowroom.inference.target.plain import PlainLogJoint
from elbowroom.system.memory import fitting, slices

DECODED = 4  # times the rows of a plain evaluation; decoded points need not fit the caches
MOST = 2**15  # points decoded at once
ASSIGNED = 2**22  # points x data x assignments multiplied out at once, if there are several assignments
DENSE = 2**18  # points x data evaluated at once if the likelihood does not factorise
HELD = 2**26  # largest number of entries in both sides of the product, for evaluation by blocks


def settle(joint: PlainLogJoint) -> tuple[bool, bool]:
    """Return whether the program broadcasts over points, with a note if not, and whether its density factorises."""
    masked = joint.program.active is not None or bool(joint.program.gated)
    if masked or any(site.plate_dim != -1 or site.batch_ndim != 1 for site in joint.sites):
        return False, False
    points = 3 if joint.n_obs != 3 else 4  # not N, which would hide a mistaken broadcast
    some = joint.probe_points.flatten(0, 1)
    some = some[torch.linspace(0, len(some) - 1, points, device=some.device).long()]
    try:
        with joint.snapshot.scope(), torch.no_grad():
            factorises = all(total.rest is None for total in _totals(joint, some.to(joint.dtype or joint.own_dtype)))
        fast = evaluate(joint, some, Kept(), factorises=factorises)
    except (RuntimeError, ValueError, IndexError) as error:
        joint.note(f"shared grid: the program does not broadcast over draws ({first_line(error)}); evaluated per datum")
        return False, False
    slow = joint(some[:, None].expand(-1, joint.n_obs, -1))
    finite = slow.isfinite()
    agree = fast.shape == slow.shape and torch.allclose(fast[finite], slow[finite], rtol=1e-5, atol=1e-5)
    if not agree:
        joint.note("shared grid: broadcasting the program over draws changed its values; evaluated per datum")
    return agree, factorises


def evaluate(joint: PlainLogJoint, z: Tensor, kept: Kept, *, factorises: bool) -> Tensor:
    """Return log p(x_n, z_g), (G, N), without gradient; `kept` stores the data's side of the product between calls."""
    with joint.snapshot.scope(), torch.no_grad():
        z = z.to(joint.dtype or joint.own_dtype)
        out: Tensor | None = None
        for some in slices(len(z), _rows(joint, factorises)):
            totals = _totals(joint, z[some])
            if out is None:
                out = z.new_empty(len(z), joint.n_obs, dtype=totals[0].dtype)
            _write(totals, out[some], kept)
        assert out is not None
        return out


def _rows(joint: PlainLogJoint, factorises: bool) -> int:
    return min(DECODED * joint._rows, MOST) if factorises else min(fitting(joint.n_obs, DENSE), joint._rows)


def _totals(joint: PlainLogJoint, z: Tensor) -> list[Bilinear]:
    """Return the joint log density at z (G, d) for every assignment of the discrete sites, not multiplied out."""
    replays = [joint.run("model", a, z=z[:, None], shared=True) for a in joint.program.assignments]
    return [replay.log_prior + replay.log_likelihood + replay.log_det for replay in replays]


def _write(totals: Sequence[Bilinear], out: Tensor, kept: Kept) -> None:
    """Multiply out and sum over assignments, into `out` (G, N)."""
    columns = [total.columns(len(out), out.shape[1], kept) for total in totals]
    rows = len(out) if len(totals) == 1 else fitting(len(totals) * out.shape[1], ASSIGNED)
    for block in slices(len(out), rows):
        parts = [out[block]] if len(totals) == 1 else [torch.empty_like(out[block]) for _ in totals]
        for part, total, (left, right) in zip(parts, totals, columns, strict=True):
            torch.mm(left[block], right.T, out=part)
            if total.rest is not None:
                part += total.rest[block]
        if len(totals) > 1:
            torch.logsumexp(torch.stack(parts), 0, out=out[block])


def columns(joint: PlainLogJoint, z: Tensor) -> tuple[list[Tensor], Tensor] | None:
    """Return the points' columns of every assignment, (G, K), and the data's, (N, K); None if they are too large."""
    kept = Kept()
    found: list[list[tuple[Tensor, Tensor]]] = []
    with joint.snapshot.scope(), torch.no_grad():
        for u in z.to(joint.dtype or joint.own_dtype).split(_rows(joint, True)):
            totals = _totals(joint, u)
            found.append([total.columns(len(u), joint.n_obs, kept) for total in totals])
            width = found[0][0][0].shape[1]
            if any(total.rest is not None for total in totals) or (len(totals) * len(z) + joint.n_obs) * width > HELD:
                return None
    right = found[0][0][1]
    if any(other is not right for chunk in found for _, other in chunk):  # the data's side depends on the points
        return None
    return [torch.cat([left for left, _ in of_assignment]) for of_assignment in zip(*found, strict=True)], right


def product(lefts: Sequence[Tensor], right: Tensor) -> Tensor:
    """Return the log of the sum over assignments of exp(left right'), (G, N)."""
    parts = [left @ right.T for left in lefts]
    return parts[0] if len(parts) == 1 else torch.logsumexp(torch.stack(parts), 0)
