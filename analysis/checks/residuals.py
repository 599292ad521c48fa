"""Residuals of x given z: the rank of each x_nj among draws from p(x_nj | z_n).

With z_n one draw of p(z|x_n), x_n is a draw of p(x|z_n), like the model's draws y_n1 .. y_nL. Given z, the whole data sets x,
y_1 .. y_L are exchangeable for any likelihood. The same statistic of the ranks of each y is therefore an exact null for that of
the ranks of x among all L + 1. rank / (L + 1) is the probability integral transform (PIT). Its normal score is a residual that
should be N(0, 1) and, where the likelihood makes entries independent given z, uncorrelated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from elbowroom.analysis.checks.statistics import EffectKind, Judged, correlations, judge, some_columns
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.inference.target.simulate import predict
from elbowroom.system.memory import ARRAY, fitting, slices

TAIL = 0.025  # on each side
WORDS = {
    "pit": "PIT of all entries: largest |ECDF - u|",
    "pit_column": "PIT of one column: largest |ECDF - u| of any",
    "residual_sd": "standard deviation of normal scores: above 1, the data are wider than the model",
    "residual_tails": f"share of entries in the outer {TAIL:.1%} of the model on either side",
    "residual_correlation": "mean |correlation| of the normal scores of two columns",
    "residual_correlations": "correlations of normal scores: distance from the draws'",
}
KINDS: dict[str, EffectKind] = {"residual_sd": "relative", "residual_tails": "relative"}  # the other effects are differences
ONE_SIDED = frozenset({"pit", "pit_column"})


@dataclass(frozen=True)
class Residuals:
    """Ranks of the data among draws of the model at their own latents, of one site with C columns.

    Attributes:
        judged: statistics of the ranks, by name.
        columns: indices of the columns used, (C,).
        effect: max |ECDF - u| of each, (C,).
        p_value: of each column, (C,).
        difference: ECDF - u of all entries at u = 1/(L+1) .. 1, (L + 1,).
        band: 95 % quantile of the largest |ECDF - u| of data sets drawn from the model.
    """

    judged: dict[str, Judged]
    columns: Tensor
    effect: Tensor
    p_value: Tensor
    difference: Tensor
    band: float


def replicated(
    log_joint: LogJoint, sites: Mapping[str, Tensor], rows: Tensor, seed: int, columns: Mapping[str, Tensor] | None = None
) -> dict[str, list[Tensor]]:
    """Draw x at draws of the latents `sites`, name -> (S, N, *shape), in chunks that fit in memory.

    Returns:
        name -> parts (s, len(rows), D) of the data `rows`, and of the `columns` of each site, where these are given.
    """
    width = sum(value.numel() for value in log_joint.program.observed.values())
    found: dict[str, list[Tensor]] = {}
    draws = len(next(iter(sites.values())))
    for number, part in enumerate(slices(draws, fitting(width, ARRAY))):
        some = {name: value[part] for name, value in sites.items()}
        for name, value in predict(log_joint, some, seed + 7919 * number).items():
            if name in log_joint.program.observed:
                flat = value.flatten(2) if value.dim() > 2 else value[..., None]
                kept = flat if columns is None else flat[..., columns[name]]
                found.setdefault(name, []).append(kept[:, rows].float())  # float32: half the memory
    return found


def residuals(
    log_joint: LogJoint, sites: Mapping[str, Tensor], rows: Tensor, draws: int, seed: int
) -> dict[str, Residuals | None]:
    """Rank the data `rows` among `draws` draws of the model at their own latents, for each observed site.

    `sites` is one draw of the posterior, name -> (N, *shape). A site with no observed entry in these data gives None.
    """
    generator = torch.Generator(device=log_joint.device).manual_seed(seed)
    at = {name: value[None].expand(draws, *value.shape) for name, value in sites.items()}
    found: dict[str, Residuals | None] = {}
    data = {name: x.flatten(1) if x.dim() > 1 else x[:, None] for name, x in log_joint.program.observed.items()}
    columns = {name: some_columns(x.shape[1], x.device) for name, x in data.items()}
    for name, parts in replicated(log_joint, at, rows, seed, columns).items():
        every = torch.cat([data[name][rows][None, :, columns[name]].float(), *parts])
        there = every.isfinite().all(0)
        found[name] = _judged(_ranks(every, generator), there, columns[name]) if bool(there.any()) else None
    return found


def _ranks(every: Tensor, generator: torch.Generator) -> Tensor:
    """Rank the L + 1 values of each entry, ties at random: (L + 1, n, C), 0 .. L."""
    size, most = len(every), fitting(len(every), ARRAY)
    cells = every.flatten(1).T
    ranks = torch.empty(cells.shape, dtype=torch.int16, device=every.device)
    for out, v in zip(ranks.split(most), cells.split(most), strict=True):
        value, index = v.sort(-1)
        if bool((value.diff(dim=-1) == 0).any()):
            shuffled = torch.rand(v.shape, device=v.device, generator=generator).argsort(-1)
            index = shuffled.gather(-1, v.gather(-1, shuffled).sort(dim=-1, stable=True).indices)
        out.scatter_(-1, index, torch.arange(size, dtype=torch.int16, device=v.device).expand(v.shape))
    return ranks.T.unflatten(1, every.shape[1:])


def _judged(ranks: Tensor, there: Tensor, columns: Tensor) -> Residuals:
    size, _, width = ranks.shape
    u = torch.arange(1, size + 1, dtype=torch.float64, device=ranks.device) / size
    score = torch.special.ndtri(u - 0.5 / size)
    tail = max(1, round(TAIL * size))
    offset = size * torch.arange(width, device=ranks.device)
    values: dict[str, list[Tensor]] = {name: [] for name in WORDS if width > 1 or "correlation" not in name}
    apart, pooled = [], []
    for rank in ranks:
        k = rank.long()
        count = torch.bincount((k + offset)[there], minlength=size * width).reshape(width, size).double()
        each = (count.cumsum(1) / count.sum(1, keepdim=True) - u).nan_to_num()
        apart.append(each.abs().amax(1))
        whole = count.sum(0)
        pooled.append(whole.cumsum(0) / whole.sum() - u)
        values["pit"].append(pooled[-1].abs().max())
        values["pit_column"].append(apart[-1].max())
        values["residual_sd"].append((whole * score.square()).sum().div(whole.sum()).sqrt())
        values["residual_tails"].append((whole[:tail].sum() + whole[-tail:].sum()) / whole.sum())
        if width > 1:
            pairs = correlations(torch.where(there, score[k], torch.nan))
            values["residual_correlation"].append(pairs.abs().mean())
            values["residual_correlations"].append(pairs)
    effect = torch.stack(apart)
    largest = torch.stack(values["pit"])[1:]
    return Residuals(
        judged=judge({name: torch.stack(t) for name, t in values.items()}, kinds=KINDS, one_sided=ONE_SIDED),
        columns=columns,
        effect=effect[0],
        p_value=(1 + (effect[1:] >= effect[0] - 1e-12).sum(0)) / size,
        difference=pooled[0],
        band=largest.quantile(0.95).item(),
    )
