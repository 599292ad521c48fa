"""The plan of an audit: its references, the reasons for them, and their estimated time, before the work starts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from elbowroom.analysis.audit.cost import Cost, Pilot
from elbowroom.analysis.audit.diagnosis import SIMULATED
from elbowroom.analysis.audit.requested import KNOWN, Methods, requested, usable
from elbowroom.inference.posterior import Reference
from elbowroom.inference.references.closed_form import ClosedForm
from elbowroom.inference.references.enumeration import Enumeration
from elbowroom.inference.references.grid.grid import MAX_DIM, Grid
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.system import durations

AFFORDABLE = 3600.0  # without a budget, seconds a grid may take though sampling would be faster
AMPLE = 2.0  # factor by which a budget must exceed the estimate, for all data to be done in one pass
FIRST = (400, 100)  # guide draws per datum, all data, where only a sample is audited; the fewer where they take too long
OF_GUIDE = 0.2  # share of the budget for them
FEWER, SLIGHT = (
    4_000,
    0.03,
)  # guide draws of the sample, where those asked for take more than that share of the references' time
SAMPLE, WORST = 0.72, 0.82  # of the budget: when the random sample ends, and the search for the worst data
FASTER = 3.0  # factor by which importance sampling must be faster than chains to come first, under a tight budget

SPARE = ("hmc", "importance", "ais")  # for data that the first reference leaves over

REASONS = {
    "closed_form": "the model is linear-Gaussian: its posterior is known in closed form",
    "enumeration": "every latent is discrete: the posterior is a finite sum",
    "grid": "at most 3 latents: a whitened grid for every datum",
    "hmc": "chains that certify themselves, with log p(x) by bridge sampling",
    "importance": "importance sampling from the refitted normal, for log p(x)",
    "ais": "annealing, for bounds on log p(x) and as an alarm for missed modes",
}


@dataclass(frozen=True)
class Plan:
    """The plan of an audit.

    Attributes:
        references: the methods, best first.
        reasons: for each method, in a clause.
        guide: cost of the guide's own pass.
        costs: of each method, per block and per datum.
        n_obs: number of data N.
        size: data per block.
        budget: seconds for the whole audit; infinity for no budget.
        draws: draws per datum of the guide where references run.
        first: draws per datum of the guide for all data, before a random sample of them is audited; 0 where all are.
        others: audits of a few other data, for the diagnosis: simulated ones, and those of other splits.
        spare: methods that run only on data which the references do not certify; their time is not known beforehand.
    """

    references: list[Reference]
    reasons: list[str]
    guide: Cost
    costs: list[Cost]
    n_obs: int
    size: int
    budget: float = math.inf
    spare: Sequence[Reference] = ()
    draws: int = 10_000
    first: int = 0
    others: int = 0

    @property
    def sampling(self) -> bool:
        """Whether data are audited in random order until the budget ends, after a first look at all of them."""
        return self.first > 0

    @property
    def names(self) -> list[str]:
        """Names of the methods."""
        return [method.name for method in self.references]

    @property
    def seconds(self) -> list[float]:
        """Estimated seconds of each method, over all data."""
        return [self._of(cost) for cost in self.costs]

    @property
    def total(self) -> float:
        """Estimated seconds of the whole audit without a budget."""
        return self._of(self.guide) + sum(self.seconds) + self.further

    @property
    def further(self) -> float:
        """Estimated seconds of the audits of other data."""
        return self.others * sum(cost.of(min(SIMULATED, self.n_obs)) for cost in self.costs)

    @property
    def limit(self) -> float:
        """Seconds within which the audit ends: the budget, or the guide's own pass plus half the budget if that is more."""
        return max(self.budget, self.looking + 0.5 * self.budget)

    @property
    def looking(self) -> float:
        """Estimated seconds of the guide's pass over all data: the first look, where only a sample is audited."""
        return self._of(self.guide) * (self.first or self.draws) / self.draws

    @property
    def sample(self) -> int:
        """Estimated number of data that the budget suffices for."""
        all_data = self.total - self.further
        if not self.sampling or all_data <= SAMPLE * self.budget:
            return self.n_obs
        return min(self.n_obs, max(0, int(self.n_obs * (SAMPLE * self.budget - self.looking) / max(all_data, 1e-12))))

    def _of(self, cost: Cost) -> float:
        whole, rest = divmod(self.n_obs, self.size)
        return whole * cost.of(self.size) + (cost.of(rest) if rest else 0.0)

    def __str__(self) -> str:
        lines = [f"plan for {self.n_obs} data, about {durations.words(min(self.total, self.budget))}:"]
        rows = [("guide", self.looking, "its ELBO and importance weights" + ", a first look" * self.sampling)]
        rows += list(zip(self.names, self.seconds, self.reasons, strict=True))
        if self.others:
            rows.append(("others", self.further, "the same for a few simulated data, and for some of other splits"))
        width = max(len(name) for name, _, _ in rows)
        lines += [f"  {name:<{width}}  about {durations.words(time)}: {why}" for name, time, why in rows]
        if self.spare:
            lines.append(f"  {self.then}")
        if not self.references:
            lines.append("  no reference applies to this model")
        if self.sample < self.n_obs:
            sample = f"a random sample of about {self.sample:,} is audited, and the means of all"
            what = f"{sample} {self.n_obs:,} are estimated from it"
            lines.append(
                f"  the budget of {durations.words(self.budget)} is less than the {durations.words(self.total)} that all of it "
                f"would take: {what if self.sample else 'the guide alone is looked at'}; --budget none audits all"
            )
        return "\n".join(lines)

    @property
    def then(self) -> str:
        """The spare methods, in words; empty where there are none."""
        names = ", ".join(method.name for method in self.spare)
        return f"for data that {' and '.join(self.names)} does not settle, and for no others: {names}" if self.spare else ""

    def tree(self) -> dict[str, object]:
        """Return the plan for `--json`: names, reasons and seconds."""
        rows = zip(self.names, self.reasons, self.seconds, strict=True)
        return {
            "data": self.n_obs,
            "seconds": round(self.total, 1),
            "budget": None if math.isinf(self.budget) else self.budget,
            "sample": self.sample,
            "others_seconds": round(self.further, 1),
            "guide_seconds": round(self.looking, 1),
            "references": [{"name": n, "reason": r, "seconds": round(s, 1)} for n, r, s in rows],
            "for_the_rest": [method.name for method in self.spare],
        }


def choose(
    references: Methods,
    log_joint: LogJoint,
    *,
    draws: int = 10_000,
    keep: int = 1_000,
    budget: float = math.inf,
    size: int | None = None,
    n_obs: int | None = None,
    others: int = 0,
) -> Plan:
    """Choose the references, with reasons and estimated times.

    `auto` takes the closed form where there is one, enumeration where every latent is discrete, a grid for up to three latents
    where it is affordable, and else hmc, which gives log p(x) by bridge sampling. For the data that one of the last two does
    not settle, hmc, importance sampling and ais follow.

    Args:
        references: `auto`, `none`, names or Reference objects; see `requested`.
        log_joint: the model and guide; a part of the data is enough.
        draws: draws per datum of the guide.
        keep: draws kept per datum and method.
        budget: seconds for the whole audit.
        size: data per block; all by default.
        n_obs: number of data to plan for; those of `log_joint` by default.
        others: audits of a few other data that will follow.

    Raises:
        UserError: for an unknown name, or a method that cannot be used for this model.
    """
    n = log_joint.n_obs if n_obs is None else n_obs
    size = n if size is None else min(size, n)
    pilot = Pilot(log_joint, draws=draws, keep=keep)
    wanted = requested(references)
    if wanted == "auto":
        methods, reasons = _auto(log_joint, pilot, n, budget)
    else:
        methods = [usable(item, log_joint) for item in wanted]
        reasons = [REASONS.get(method.name, "asked for") for method in methods]
    names = [method.name for method in methods]
    costs = [pilot.reference(method, names[:k]) for k, method in enumerate(methods)]
    plan = Plan(methods, reasons, pilot.guide(), costs, n, size, budget, spare(wanted, methods), draws, others=others)
    if not methods or plan.total * AMPLE <= budget or n < 2 or not log_joint.separable():
        return plan
    each = sum(cost.of(size) for cost in costs)
    if plan.guide.of(size) > SLIGHT * each and draws > FEWER:
        share = FEWER / draws
        plan = replace(plan, draws=FEWER, guide=Cost(plan.guide.fixed * share, plan.guide.each * share))
    look = plan.guide.each * n / plan.draws  # seconds of one draw for all data
    return replace(plan, first=min(draws, FIRST[0] if FIRST[0] * look <= OF_GUIDE * budget else FIRST[1]))


def spare(references: Literal["auto"] | Sequence[str | Reference], methods: Sequence[Reference]) -> list[Reference]:
    """Return what takes over under `auto` where a grid or chains leave a datum open."""
    first = methods[0].name if references == "auto" and len(methods) == 1 else ""
    return [KNOWN[name]() for name in SPARE if first in ("grid", *SPARE) and name != first]


def _auto(log_joint: LogJoint, pilot: Pilot, n: int, budget: float) -> tuple[list[Reference], list[str]]:
    closed, finite = ClosedForm(), Enumeration()
    if closed.refusal(log_joint) is None:
        return [closed], [REASONS["closed_form"]]
    if log_joint.dim == 0:
        return ([finite], [REASONS["enumeration"]]) if finite.refusal(log_joint) is None else ([], [])
    why = ""
    if log_joint.dim <= MAX_DIM:
        grid, hmc = Grid(), KNOWN["hmc"]()
        takes, instead = (pilot.reference(method, []).of(n) for method in (grid, hmc))
        if takes <= max(min(budget, AFFORDABLE), instead):
            return [grid], [REASONS["grid"]]
        why = f"a grid would take {durations.words(takes)}; "
    hmc, importance = (KNOWN[name]() for name in ("hmc", "importance"))
    slow, fast = (pilot.reference(method, []).of(n) for method in (hmc, importance))
    if slow > budget and fast * FASTER <= slow:
        why += f"chains would take {durations.words(slow)}, more than the budget; "
        return [importance], [why + REASONS["importance"]]
    return [hmc], [why + REASONS["hmc"]]
