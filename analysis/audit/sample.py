"""An audit that the budget does not let see all data: a first look at all, then a random sample, then the worst.

1. The guide's draws, few of them, for all data: the ELBO, and proxies of the gap.
2. All methods on blocks of data in random order, until three quarters of the budget are over. Data whose block the budget cut
   short are left out of the sample: those that ended in time are not a random part of it.
3. All methods on the data with the largest proxy among the others. They are no part of the sample.

`measures.population` estimates from these what holds for all data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from elbowroom.analysis.audit.budget import Clock
from elbowroom.analysis.audit.parts import Part
from elbowroom.analysis.audit.plan import SAMPLE, WORST
from elbowroom.analysis.audit.work import Work
from elbowroom.inference.posterior import Posterior, concatenate, rows_of
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.system import memory

BLOCK = 0.15  # of the budget: one block
WORTH = 5.0  # a block takes at least so many times what it costs by itself, however few its data
FEWEST = 4  # data in a block
RANDOM, EXTREME = 1_000_003, 2_000_003  # between the numbers of blocks of the three parts, which seed them
COLUMNS = {
    "in_sample": ("1", "1 for data of the random sample that stands for all; 0 for the others, audited or not"),
    "proxy_iwae": ("nats", "importance-weighted bound less ELBO, by a few draws of the guide: a lower bound of the gap"),
    "proxy_variance": ("1", "log(1 + var(log w) / 2), of the guide's weights: the gap where log w is normal, as log(1 + gap)"),
    "proxy_k": ("1", "k-hat of the guide's weights, by the same draws, between -1 and 3"),
}


@dataclass(frozen=True)
class Sampled:
    """Parts of each block, the rows of all blocks in a line, and further columns of the table with units and long names."""

    found: list[list[Part | None]]
    rows: Tensor
    columns: dict[str, tuple[str, np.ndarray, dict[str, str]]]


def sampled(work: Work, log_joint: LogJoint, pace: Clock, look: int, size: int, seed: int) -> Sampled:
    """Audit data in random order until the budget ends.

    Args:
        work: guide and references of a block.
        log_joint: all data.
        pace: the clock, whose deadline is the end of the audit.
        look: data per block of the first look.
        size: data per block at most, later.
        seed: of the order.
    """
    n, plan, end = log_joint.n_obs, pace.plan, pace.deadline
    span = end - pace.started
    pace.deadline = pace.started + WORST * span  # the rest is for what follows the audit of data
    firsts = []
    for number, rows in enumerate(log_joint.blocks(look)):
        part = log_joint.subset(rows) if len(rows) < n else log_joint
        firsts.append(work.look(part, number, plan.first, f" at data {int(rows[0])}..{int(rows[-1])} of {n}").posterior)
        memory.trim()
    guide = concatenate(firsts)
    proxies = _proxies(guide, plan.first)
    order = torch.tensor(random_order(n, seed), device=log_joint.device)
    found: list[list[Part | None]] = []
    taken: list[Tensor] = []
    whole: list[bool] = []

    def block(rows: Tensor, number: int, what: str) -> bool:
        rows = rows.sort().values
        pace.begin(len(rows))
        parts = work.block(log_joint.subset(rows), number, f" for {len(rows)} {what}")
        memory.trim()
        if parts[1] is None:
            return False
        found.append(parts)
        taken.append(rows)
        whole.append(not work.interrupted(parts))
        return True

    at, sample_ends = 0, pace.started + SAMPLE * span
    while at < n:
        left = sample_ends - pace.clock()
        count = min(n - at, size, pace.fitting(min(left, max(BLOCK * span, WORTH * pace.seconds(0)))))
        if left <= 0 or count < min(FEWEST, n - at):
            break
        if not block(order[at : at + count], RANDOM + at, f"data drawn at random (after {at:,} of {n:,})"):
            break
        at += count
    random = len(found)
    reached = torch.cat(taken) if taken else order[:0]
    others = torch.ones(n, dtype=torch.bool, device=order.device).index_fill(0, reached, False).nonzero()[:, 0]
    count = min(len(others), size, pace.fitting(pace.deadline - pace.clock()))
    if found and count >= 1:
        worst = others[torch.as_tensor(-proxies[0][others.cpu().numpy()]).argsort()[:count].to(order.device)]
        kept, work.store = work.store, None  # which data these are depends on the time that there was
        block(worst, EXTREME, "data with the largest proxy of the gap")
        work.store = kept
    pace.deadline = end
    inside = np.zeros(n)
    some = [rows for rows, ended in zip(taken[:random], whole, strict=False) if ended] or taken[:random]
    for rows in some:
        inside[rows.cpu().numpy()] = 1.0
    reached = torch.cat(taken) if taken else order[:0]
    rest = torch.ones(n, dtype=torch.bool, device=order.device).index_fill(0, reached, False).nonzero()[:, 0]
    if len(rest):
        blank: list[Part | None] = [None] * (len(plan.names) + len(plan.spare))
        found.append([Part(rows_of(guide, rest.cpu())), *blank])
        taken.append(rest)
    said = zip(COLUMNS.items(), (inside, *proxies), strict=True)
    columns = {name: ("obs_id", values, {"units": units, "long_name": words}) for (name, (units, words)), values in said}
    return Sampled(found, torch.cat(taken), columns)


def random_order(n: int, seed: int) -> list[int]:
    """Return 0 .. n-1 in random order: whatever time there is, what is done is a random part."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()


def in_turn(log_joint: LogJoint, blocks: Sequence[Tensor], turn: Sequence[int]) -> Iterator[tuple[LogJoint, int, str]]:
    """Yield one block of data at a time with its number, so that cached results of a block are freed with it."""
    for number in turn:
        rows = blocks[number]
        label = f" for data {int(rows[0])}..{int(rows[-1])} of {log_joint.n_obs}" if len(blocks) > 1 else ""
        yield log_joint.subset(rows), number, label
        memory.trim()


def _proxies(guide: Posterior, draws: int) -> tuple[np.ndarray, ...]:
    """Return IWAE - ELBO, log(1 + half the variance of log w), and k-hat, (N,) each."""
    elbo, error = (guide.stats[name].cpu().double() for name in ("elbo", "elbo_se"))
    bound = torch.full_like(elbo, math.nan) if guide.evidence is None else guide.evidence.value.cpu().double() - elbo
    k = guide.stats["pareto_k"].cpu().double().clamp(-1.0, 3.0).nan_to_num(3.0)
    return bound.numpy(), (error.square() * draws / 2).log1p().numpy(), k.numpy()
