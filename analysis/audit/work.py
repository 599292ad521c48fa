"""The work of an audit: guide and references on one block of data after another, within budget and memory."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from elbowroom.analysis.audit.budget import Clock, Progress
from elbowroom.analysis.audit.leftover import Seeds, leftover, without
from elbowroom.analysis.audit.parts import Part, Store, described
from elbowroom.analysis.measures.distances import Comparison, compare
from elbowroom.analysis.measures.evidence import sandwich
from elbowroom.analysis.measures.gaps import refitted, unknown
from elbowroom.analysis.measures.missed_modes import missed_mass
from elbowroom.analysis.measures.refuted import refute
from elbowroom.inference.posterior import Posterior, combined, completed, concatenate, rows_of
from elbowroom.inference.references.importance.guide import amortized
from elbowroom.inference.search.scout import scout
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.system import durations
from elbowroom.system.stages import stage

SEED_STEP = 7919  # between the guide and each reference
DISCRETE_STEP = 15_485_863  # between draws of the continuous sites and of the discrete ones
SANDWICH_STEP = 49_979_687  # offset for the reverse chains of the upper bounds
SCOUTS = ("hmc", "importance", "ais")  # methods that refit a full normal anyway
BLOCK_STEP = 104_729  # between blocks: shared noise would make the standard error of means too small
ENDED = re.compile(r"the budget (of .+ )?ended")


class Work:
    """Runs guide and references on blocks of data.

    Args:
        pace: the plan and its clock.
        say: called with a step before each piece of work.
        keep: draws per datum that each method returns.
        kept: draws per datum that are retained after the comparison with the guide.
        moments: whether covariances are retained as well.
        draws: draws per datum for the guide's estimates.
        seed: random seed, from which every block and method derives its own.
        store: where parts are saved.
    """

    def __init__(
        self,
        pace: Clock,
        say: Callable[[Progress], None],
        *,
        keep: int,
        kept: int,
        moments: bool,
        draws: int,
        seed: int,
        store: Store | None,
    ) -> None:
        self.pace, self.say, self.keep, self.kept, self.moments = pace, say, keep, kept, moments
        self.draws, self.seed, self.store = draws, seed, store

    def block(self, part: LogJoint, number: int, label: str) -> list[Part | None]:
        """Return the guide's part of a block of data, then each reference's; None where the budget left it out."""
        plan, start = self.pace.plan, self.seed + BLOCK_STEP * number
        facts = (number, part.n_obs, self.seed, self.draws, self.keep, self.kept, self.moments)
        block_began = self.pace.clock()
        keys = [self._key("guide", *facts)]
        keys += [self._key(method.name, k, described(method), *facts) for k, method in enumerate(plan.references)]
        extra = [self._key(method.name, -k, described(method), *facts) for k, method in enumerate(plan.spare, start=1)]
        found = [None if self.store is None else self.store.get(key) for key in keys]
        rest = [None if self.store is None else self.store.get(key) for key in extra]
        if all(piece is not None for piece in found) and (not self._open(found) or all(piece is not None for piece in rest)):
            for name in ("", *plan.names):
                self.pace.finished(name, 0.0, whole=False)
            self.say(Progress.of(f"found{label}", self.pace))
            return self._closed(part, keys, found, start) + rest
        self.say(Progress.of(f"guide{label}", self.pace))
        began = time.monotonic()
        guide = amortized(part, draws=self.draws, keep=self.keep, seed=start)
        guide = completed(part, guide, start + DISCRETE_STEP, which="guide")
        found[0] = self._keep(keys[0], guide, None)
        self.pace.finished("", time.monotonic() - began, whole=True)
        for k, method in enumerate(plan.references, start=1):
            until = math.inf if found[k] is not None else self.pace.until(method.name)
            if found[k] is not None or until is None:
                self.pace.finished(method.name, 0.0, whole=False)
                continue
            self.say(Progress.of(f"{method.name}{label}", self.pace))
            began = time.monotonic()
            # its own seed: draws that share the guide's random numbers would be too close to it
            with stage(method.name):
                drawn = method(part, keep=self.keep, seed=start + SEED_STEP * k, until=until)
                drawn = completed(part, drawn, start + SEED_STEP * k + DISCRETE_STEP)
            drawn = refute(drawn, [guide])
            drawn.stats["missed_mass"] = missed_mass(part, guide, drawn)
            whole = not any(map(ENDED.search, drawn.reason))
            # a result that the budget cut short is not saved: a resumed audit computes it in full
            with stage("distances"):
                distances = compare(part, guide, drawn, seed=self.seed)
            found[k] = self._keep(keys[k] if whole else "", drawn, distances)
            self.pace.finished(method.name, time.monotonic() - began, whole=whole)
        if self._open(found):
            rest = self._leftover(part, guide, found, extra, start, label, block_began)
        return self._closed(part, keys, found, start) + rest

    def look(self, part: LogJoint, number: int, draws: int, label: str) -> Part:
        """Return the guide's part of a block of data for which no reference is run, by few draws."""
        key = self._key("look", number, part.n_obs, self.seed, draws, self.keep, self.kept, self.moments)
        found = None if self.store is None else self.store.get(key)
        if found is not None:
            return found
        self.say(Progress.of(f"a first look{label}", self.pace))
        start = self.seed + BLOCK_STEP * number
        guide = amortized(part, draws=draws, keep=self.keep, seed=start)
        guide = completed(part, guide, start + DISCRETE_STEP, which="guide")
        stats = guide.stats | {name: value.cpu() for name, value in unknown(part.n_obs).items()}
        return self._keep(key, dataclasses.replace(guide, stats=stats), None)

    @staticmethod
    def _open(found: Sequence[Part | None]) -> bool:
        """Return whether the last reference leaves data of a block over that it was run on."""
        last = found[-1]
        return last is not None and last.posterior.method != "guide" and not bool(last.posterior.settled.all())

    def _leftover(
        self,
        part: LogJoint,
        guide: Posterior,
        found: Sequence[Part | None],
        keys: Sequence[str],
        start: int,
        label: str,
        began: float,
    ) -> list[Part | None]:
        """Run the spare methods on the data that the reference leaves over."""
        plan, until, first = self.pace.plan, self.pace.spare(began), found[-1]
        if until is None or first is None or not plan.spare:
            return [None] * len(plan.spare)
        n = int((~first.posterior.settled).sum())
        self.say(Progress.of(f"{plan.spare[0].name} and others for {n} data left over{label}", self.pace))
        seeds = Seeds(self.seed, start + SEED_STEP * (1 + len(found)), SEED_STEP, DISCRETE_STEP, start + SANDWICH_STEP)
        done = leftover(part, guide, first.posterior, plan.spare, seeds, self.keep, until)
        whole = not any(ENDED.search(reason) for posterior, _ in done for reason in posterior.reason)
        return [
            self._keep(key if whole else "", posterior, distances)
            for key, (posterior, distances) in zip(keys, done, strict=True)
        ]

    def _closed(self, log_joint: LogJoint, keys: Sequence[str], found: list[Part | None], start: int) -> list[Part | None]:
        """Add, once, results that need several methods: the ELBO of q* to the guide, upper bounds to annealing."""
        plan, began = self.pace.plan, time.monotonic()
        scouts = set(SCOUTS) & set(plan.names)
        scouted = any(piece is not None for name, piece in zip(plan.names, found[1:], strict=True) if name in scouts)
        late = began > self.pace.deadline or bool(scouts and not scouted)  # no time left for the refit
        guide = found[0]
        if guide is not None and "elbo_refit" not in guide.posterior.stats and plan.names:
            full = scout(log_joint).refit if scouted and not late else None
            columns = unknown(log_joint.n_obs) if late else refitted(log_joint, full, self.pace.deadline)
            stats = guide.posterior.stats | {name: value.cpu() for name, value in columns.items()}
            piece = dataclasses.replace(guide, posterior=dataclasses.replace(guide.posterior, stats=stats))
            found[0] = self._again("" if late else keys[0], piece)
        places = [k for k in range(1, len(found)) if found[k] is not None]
        posteriors = [piece.posterior for piece in found[1:] if piece is not None]
        methods = [plan.references[k - 1] for k in places]
        done = sandwich(log_joint, methods, posteriors, seed=start + SANDWICH_STEP, until=self.pace.deadline)
        whole = len(places) == len(plan.references) and not any(ENDED.search(r) for p in posteriors for r in p.reason)
        for k, old, new in zip(places, posteriors, done, strict=True):
            before = found[k]
            if new is not old and before is not None:
                found[k] = self._again(keys[k] if whole else "", dataclasses.replace(before, posterior=new))
        if plan.names:
            self.pace.also(plan.names[-1], time.monotonic() - began)
        return found

    def _again(self, key: str, part: Part) -> Part:
        if self.store is not None and key:
            self.store.put(key, part)
        return part

    def joined(
        self, found: Sequence[Sequence[Part | None]], order: Tensor
    ) -> tuple[Posterior, list[Posterior], list[Comparison]]:
        """Return the guide, the references and their comparisons, each over all data in their own order.

        `order` holds the row of each datum of the blocks, one after the other.
        """
        place = order.cpu().argsort()
        if bool((place == torch.arange(len(place))).all()):
            return self._joined(found)
        guide, posteriors, comparisons = self._joined(found)
        moved = [Comparison(*(getattr(c, f.name)[place] for f in dataclasses.fields(c))) for c in comparisons]
        return rows_of(guide, place), [rows_of(posterior, place) for posterior in posteriors], moved

    def _joined(self, found: Sequence[Sequence[Part | None]]) -> tuple[Posterior, list[Posterior], list[Comparison]]:
        guides = [parts[0].posterior for parts in found if parts[0] is not None]
        posteriors, comparisons = [], []
        plan = self.pace.plan
        for k, name in enumerate([*plan.names, *(method.name for method in plan.spare)], start=1):
            mine = [parts[k] for parts in found]
            spare = k > len(plan.names)
            if spare and all(part is None for part in mine):
                continue  # nothing was left over
            like = next((part.posterior for part in mine if part is not None), None)
            reason = f"{name}: the budget of {durations.words(plan.budget)} ended before this datum was reached"
            whole = []
            for part, guide, parts in zip(mine, guides, found, strict=True):
                if part is None:
                    blank = _blank(name, guide, like, reason)
                    blank = without(blank, parts[len(plan.names)]) if spare else blank
                    part = Part(blank, _nothing(len(guide.status)))
                whole.append(part)
            posteriors.append(concatenate([part.posterior for part in whole]))
            comparisons.append(_join([part.comparison for part in whole if part.comparison is not None]))
        return concatenate(guides), posteriors, comparisons

    def interrupted(self, parts: Sequence[Part | None]) -> bool:
        """Return whether the budget cut the first reference of a block short, or left it out."""
        return parts[1] is None or any(map(ENDED.search, parts[1].posterior.reason))

    def _key(self, *facts: object) -> str:
        return "" if self.store is None else self.store.key(*map(str, facts))

    def _keep(self, key: str, posterior: Posterior, comparison: Comparison | None) -> Part:
        if comparison is not None:
            comparison = Comparison(*(getattr(comparison, f.name).cpu() for f in dataclasses.fields(comparison)))
        part = Part(thinned(posterior, self.kept, moments=self.moments), comparison)
        if self.store is not None and key:
            self.store.put(key, part)
        return part


def unreached(posteriors: Sequence[Posterior], limit: float) -> list[str]:
    """Return a sentence on the data that each reference did not reach within the budget; an empty list where it reached all."""
    counts = {p.method: sum(ENDED.search(reason) is not None for reason in p.reason) for p in posteriors}
    cut = [f"{method} at {count} of {len(posteriors[0].reason)} data" for method, count in counts.items() if count]
    return [f"The budget of {durations.words(limit)} ended before all was done: {', '.join(cut)}."] if cut else []


def thinned(posterior: Posterior, kept: int, *, moments: bool = True) -> Posterior:
    """Return a posterior with at most `kept` draws per datum over all chains, evenly spaced in each chain, in main memory.

    At least one draw per chain stays. Mean and covariance stay where `moments` is true.
    """
    chains, length = posterior.draws.shape[:2]
    left = min(length, max(1, kept // max(chains, 1)))
    index = torch.linspace(0, length - 1, left, device=posterior.draws.device).round().long()

    def thin(values: list[Tensor]) -> Tensor:
        # always a copy: a view would keep all draws in memory
        return (values[0].clone() if left == length else values[0][:, index]).cpu()

    posterior = posterior if moments else dataclasses.replace(posterior, mean=None, covariance=None)
    return combined([posterior], thin, lambda values: values[0].cpu())


def _blank(name: str, guide: Posterior, like: Posterior | None, reason: str) -> Posterior:
    """Return a posterior that is NaN throughout, for data that were not reached.

    `guide` is the guide's posterior of these data; `like` is the method's posterior of other data, for its layout.
    """
    n = len(guide.status)
    model = Posterior(name, guide.draws, guide.sites, [], []) if like is None else like

    def nan(values: list[Tensor], place: int) -> Tensor:
        shape = values[0].shape
        return torch.full((*shape[:place], n, *shape[place + 1 :]), torch.nan, dtype=guide.draws.dtype)

    blank = combined([model], partial(nan, place=2), partial(nan, place=0))
    return dataclasses.replace(blank, status=["uncertified"] * n, reason=[reason] * n)


def _nothing(n: int) -> Comparison:
    return Comparison(*(torch.full((n,), torch.nan, dtype=torch.float64) for _ in dataclasses.fields(Comparison)))


def _join(parts: Sequence[Comparison]) -> Comparison:
    return Comparison(*(torch.cat([getattr(part, f.name) for part in parts]) for f in dataclasses.fields(Comparison)))
