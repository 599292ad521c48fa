"""The exact posterior by quadrature on a grid, for up to three latent dimensions.

    log p(x_n) = log sum_g h_n p(x_n, z_ng),   weights W_ng = p(x_n, z_ng) / sum_g p(x_n, z_ng)

1. A coarse grid over the prior, which all data share, and climbing from draws of guide and prior find the landmarks of each
   posterior (`landmarks`). A likelihood that factorises needs one matrix product for the coarse grid.
2. A local box per datum is whitened by the moments found so far (z = m + L t, t on a lattice) and covers the posterior above
   exp(-26) of its peak. It is moved and rescaled until it cuts nothing off, then grown until it holds every landmark.
3. The evidence on the final box is computed on three lattices: one, the same shifted, and a shifted one 1.4 times finer; the
   value of the last is reported. The stated error is three times the largest change, plus the rounding of log p and a bound on
   the mass beyond the box. Data with an error above the tolerance, or with a landmark or draw that the lattice missed, are
   refined again, up to `max_points`. Each refinement is a new chance to agree by luck: an error that is not far below the
   tolerance must hold on two more lattices, shifted by other phases. Where much may lie beyond the box, it grows (`refine`).
4. Where two sizes do not suffice, narrow peaks get lattices of their own (`zoom`), and the box is scaled by what is left. Heavy
   tails get a lattice in coordinates that stretch with distance at once (`tails`).

For a smooth integrand that vanishes at the border the equidistant rule converges exponentially; with kinks (relu), at an
algebraic rate. A datum that fails any of these checks is `uncertified`, with the reason.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar

import torch
from annotated_types import Gt
from torch import Tensor

from elbowroom.inference.posterior import Evidence, Posterior, Reference, Status, in_chains
from elbowroom.inference.references.grid.landmarks import RIM, Landmarks, survey
from elbowroom.inference.references.grid.lattice import Box, quadrature, whitened
from elbowroom.inference.references.grid.refine import WITHIN, Found, Refinement
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.system.memory import ARRAY, fitting
from elbowroom.system.stages import stage

MAX_DIM = 3
LOCAL = {1: 41, 2: 19, 3: 13}
MAX_POINTS = {1: 20_001, 2: 601, 3: 97}
BORDER_MASS = 1e-6
MAX_TURNS = 10
CUT = 10 * math.exp(-RIM)  # of the mass may lie beyond, in teeth that are lower than the rim
INSET = 0.5  # of the box's border, in posterior scales: points beyond it count as left out
MARGIN = 8.0  # distance of such landmarks from the border of the box, in posterior scales


class Grid(Reference):
    """The exact posterior by a whitened local grid per datum, d <= 3.

    Args:
        tolerance: largest numerical error of log p(x), in nats, at which a datum counts as exact.
        max_points: largest number of points per axis; default 20,001 / 601 / 97 for d = 1 / 2 / 3.
    """

    name: ClassVar[str] = "grid"

    def __init__(self, *, tolerance: Annotated[float, Gt(0)] = 1e-4, max_points: Annotated[int, Gt(8)] | None = None) -> None:
        self.tolerance = tolerance
        self.max_points = max_points

    def refusal(self, log_joint: LogJoint) -> str | None:
        """Refuse more than three latent dimensions, and models without continuous latents."""
        if log_joint.dim > MAX_DIM:
            return f"grid needs at most {MAX_DIM} latent dimensions, this model has {log_joint.dim}"
        if log_joint.dim == 0:
            return "grid needs a continuous latent, this model has none"
        return None

    def __call__(self, log_joint: LogJoint, *, keep: int, seed: int, until: float = math.inf) -> Posterior:
        """Return quadrature moments, evidence, and draws (from the weights, jittered within cells, for plots and ArviZ)."""
        with torch.no_grad():
            with stage("survey"):
                marks = survey(log_joint, seed)
            box = self._settle(log_joint, marks)
            found = self._refine(log_joint, box, marks, keep, seed)
            draws = found.draws
            rounded, words = _rounded(log_joint, box, draws)
            status, reason = self._judge(found, rounded, words, marks)
            return Posterior(
                method=self.name,
                draws=in_chains(draws),
                sites={name: in_chains(value) for name, value in log_joint.constrain(draws).items()},
                status=status,
                reason=reason,
                mean=found.mean,
                covariance=found.covariance,
                evidence=Evidence("exact", "grid", found.evidence, found.error + found.beyond + CUT + rounded),
                stats={
                    "refinement_error": found.error,
                    "border_mass": found.border,
                    "unseen": found.unseen,
                    "highest": torch.maximum(marks.log_p.amax(0), marks.pool[1].amax(0)),
                },
                sample_stats={"lp": in_chains(log_joint(draws))},
            )

    @staticmethod
    @stage("settle")
    def _settle(log_joint: LogJoint, marks: Landmarks) -> Box:
        """Whiten until nothing is cut off and the scales are stable, then include every landmark near the peak."""
        n, d, box = log_joint.n_obs, log_joint.dim, marks.box
        peak = marks.log_p.amax(0)
        for turn in range(MAX_TURNS):
            parts, cut = [], False
            for rows in torch.arange(n, device=peak.device).split(fitting(LOCAL[d] ** d, ARRAY)):
                part, used, at = log_joint.some(rows)
                old = box.rows(used)
                local = quadrature(part, old, LOCAL[d])
                new, still_cut = whitened(local)
                ratio = new.root.diagonal(dim1=-2, dim2=-1) / old.root.diagonal(dim1=-2, dim2=-1)
                still_cut |= (ratio.log().abs() > 0.7).any(-1)
                parts.append(new.rows(at))
                peak[rows] = torch.maximum(peak[rows], local.log_p.amax(0)[at])
                cut |= bool(still_cut[at].any())
            box = Box(*(torch.cat([getattr(p, f) for p in parts]) for f in ("centre", "root", "low", "high")))
            if turn > 0 and not cut:
                break
        box = box.including(marks.z, marks.log_p > peak - WITHIN, MARGIN)
        for (z, log_p), depth, margin in ((marks.rim, RIM, 2.0), (marks.pool, WITHIN, MARGIN)):
            left_out = (log_p > torch.maximum(peak, log_p.amax(0)) - depth) & ~box.holds(z, INSET)
            if bool(left_out.any()):
                box = box.including(z, left_out, margin)
        return box.clear_of_the_band(marks.z, marks.log_p > peak - WITHIN)

    @stage("refine")
    def _refine(self, log_joint: LogJoint, box: Box, marks: Landmarks, keep: int, seed: int) -> Found:
        generator = torch.Generator(device=box.centre.device).manual_seed(seed)
        limit = self.max_points or MAX_POINTS[log_joint.dim]
        return Refinement(log_joint, box, marks, keep, generator, self.tolerance, limit).run()

    def _judge(self, found: Found, rounded: Tensor, words: str, marks: Landmarks) -> tuple[list[Status], list[str]]:
        status: list[Status] = []
        reason: list[str] = []
        columns = (found.error, found.border, found.beyond, found.unseen, rounded, found.evidence)
        of_prior, of_guide = marks.smallest
        hidden = (
            f"a narrow peak that holds less than {of_prior:.1%} of the prior and {of_guide:.2%} of the guide could be missed"
        )
        for e, b, o, u, s, v in zip(*(column.tolist() for column in columns), strict=True):
            if not abs(v) < float("inf"):
                sentence = "no point of the grid has a finite density"
            elif u > 0:
                sentence = f"a point near the peak lies {u:.2g} nats above all that the grid saw around it: it missed a mode"
            elif not e <= self.tolerance:
                sentence = f"log p(x) still changes by {e:.2g} nats under refinement (tolerance {self.tolerance:g})"
                if e <= 1e-2:  # a kink in prior or decoder makes convergence slow, not wrong
                    sentence += f"; {{name: grid, tolerance: {1e-3 if e <= 1e-3 else 1e-2:g}}} would accept it"
            elif not b <= BORDER_MASS:
                sentence = f"a share {b:.2g} of the mass lies at the grid's border"
            elif not o <= self.tolerance:
                sentence = f"a share of up to {o:.2g} of the mass may lie beyond the grid"
            elif not s <= BORDER_MASS:
                sentence = f"a share {s:.2g} {words}"
            else:
                status.append("exact")
                reason.append(
                    f"grid: numerical error of log p(x) at most {e + o:.1g} nats, by shifted and finer grids; {hidden}"
                )
                continue
            status.append("uncertified")
            reason.append(f"grid: {sentence}")
        return status, reason


def _rounded(log_joint: LogJoint, box: Box, draws: Tensor) -> tuple[Tensor, str]:
    """Return the share of the mass whose density depends on how a value rounds, (N,), and what to say of it."""
    drawn, said = log_joint.rounded(draws)
    share = drawn.to(draws.dtype).mean(0)
    if log_joint.has_edges:
        size = LOCAL[log_joint.dim]
        for rows in torch.arange(log_joint.n_obs, device=share.device).split(fitting(size**log_joint.dim, ARRAY)):
            part, used, at = log_joint.some(rows)
            seen = quadrature(part, box.rows(used), size)
            lost, _, words = part.rounded_share(seen.z, seen.log_p)
            share[rows] = torch.maximum(share[rows], lost[at].to(share.dtype))
            said = said or words
    return share, said
