"""The audit: how far is q(z|x) from p(z|x), for this model and for each datum?

    log p(x) = ELBO + KL(q(z|x) || p(z|x)),   gap = log p(x) - ELBO

`audit(model, guide, *args)` works for any Pyro pair; `audit_log_joint` does the same for a log joint that is already built.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import xarray as xr
from annotated_types import Ge

from elbowroom.analysis import idata
from elbowroom.analysis.audit.budget import PLANNED, Clock, Progress
from elbowroom.analysis.audit.diagnosis import diagnose as find_out
from elbowroom.analysis.audit.parts import Store
from elbowroom.analysis.audit.plan import Plan, choose, spare
from elbowroom.analysis.audit.requested import Methods, requested
from elbowroom.analysis.audit.sample import Sampled, in_turn, random_order, sampled
from elbowroom.analysis.audit.work import Work, unreached
from elbowroom.analysis.datatree import to_datatree
from elbowroom.analysis.measures.evidence import evidence_of
from elbowroom.analysis.measures.expectations import expectations
from elbowroom.analysis.measures.population import population, random_rows
from elbowroom.analysis.measures.population import sampled as random_part
from elbowroom.analysis.measures.refuted import refute
from elbowroom.analysis.measures.table import best_reference, trusted
from elbowroom.analysis.measures.tabulate import tabulate
from elbowroom.analysis.verdict import judgement
from elbowroom.analysis.verdict.judgement import Judgement, from_dataset
from elbowroom.analysis.verdict.rules import judge, per_datum
from elbowroom.analysis.verdict.summary import sentences, summary
from elbowroom.errors import RunFolderError, UserError
from elbowroom.inference.compiled.policies import Compile, policy
from elbowroom.inference.posterior import CHAINS, rows_of
from elbowroom.inference.target import discrete
from elbowroom.inference.target.checks.probe import note_rounding
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.system import durations
from elbowroom.system.files import atomic
from elbowroom.system.memory import ARRAY, LARGE_ARRAY, fitting
from elbowroom.system.stages import stage

log = logging.getLogger("elbowroom")

ROOMY = 8  # factor for arrays on a GPU, which small blocks would not fill
KEPT, OF_SAMPLE = 2**29, 2**27  # bytes of draws kept for all data and methods; where a budget leaves most of them out
LEAST = 8  # smallest number of draws kept per datum
DIAGNOSIS = "diagnosis.nc"
PREDICTIVE = ("posterior_predictive", "prior_predictive", "observed_data")
OTHERS = (2_000, 200)  # draws, and draws kept, for other data, audited only for their gaps


@dataclass(frozen=True)
class Audit:
    """The results of an audit.

    Attributes:
        table: one row per datum (`obs_id`), and per datum and reference; every variable has units and a long name.
        posteriors: method -> draws, moments and data, as the installed ArviZ takes them (`az.summary(posteriors["grid"])`): an
            InferenceData before ArviZ 1.0, from then on a DataTree. May be given as either.
        diagnosis: the further evidence for the verdicts, see `audit.diagnosis`; None where it was not requested.
    """

    table: xr.Dataset
    posteriors: Mapping[str, Any]
    diagnosis: xr.DataTree | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "posteriors", idata.Posteriors(self.posteriors))

    @property
    def trees(self) -> dict[str, xr.DataTree]:
        """The posteriors as DataTrees, whatever ArviZ is installed."""
        return idata.Posteriors(self.posteriors).trees()

    @property
    def predictive(self) -> Any:
        """Data, and what the model draws in their place, as the installed ArviZ takes them: `az.plot_ppc(audit.predictive)`.

        Raises:
            UserError: the diagnosis was not requested, or has no such draws.
        """
        found = {} if self.diagnosis is None else self.diagnosis.children
        groups = {name: group for name, group in found.items() if name in PREDICTIVE}
        if "posterior_predictive" not in groups:
            raise UserError("predictive: the audit has no draws of data; they need diagnose=True and certified posteriors")
        return idata.native(xr.DataTree.from_dict({name: group.to_dataset() for name, group in groups.items()}))

    @property
    def verdict(self) -> str:
        """The verdicts with their evidence and remedies, then a summary in sentences, one per line."""
        return str(self.table.attrs["verdict"])

    @property
    def verdicts(self) -> list[Judgement]:
        """The verdicts, the most consequential first."""
        if self.diagnosis is None:
            return judge(self.table)
        return from_dataset(self.diagnosis["verdicts"].to_dataset())

    def expectations(self, f: Callable[[xr.Dataset], xr.DataArray], reference: str | None = None) -> xr.Dataset:
        """Compare E_q f(z) under the guide with E_p f(z) under a reference, for any function f of the sites, with errors.

        Args:
            f: given the sites, name -> (chain, draw, obs_id, ...), returns (chain, draw, obs_id, ...).
            reference: the reference whose posterior is p; by default the one that is exact or certified for the most data.

        Returns:
            The table of `measures.expectations.expectations`, for the data for which the reference is exact or certified.

        Raises:
            UserError: no reference is exact or certified for any datum, or there is none of that name.

        Example:
            >>> audit.expectations(lambda sites: sites["z"][..., 0] > 0)["difference"]  # doctest: +SKIP
        """
        name = reference or best_reference(self.table)
        names = self.table["reference"].values.astype(str).tolist()
        if name is None or name not in names or not trusted(self.table, name).any():
            who = "no reference is" if name is None else f"{name!r} is not"
            there = ", ".join(names) or "none"
            raise UserError(f"expectations: {who} exact or certified for any datum; the audit's references: {there}")
        rows = trusted(self.table, name)
        trees = self.trees
        return expectations(f, trees["guide"].isel(obs_id=rows), trees[name].isel(obs_id=rows))

    @property
    def population(self) -> xr.Dataset:
        """Means over all data with 95 % intervals, also where a budget let only a random sample be audited.

        See `measures.population.population`; quantities are the gap, its parts, log p(x), and the share of gaps above 1 nat.
        """
        return population(self.table)

    def lines(self) -> list[tuple[str, str]]:
        """Return the rows (quantity, value) of the short table."""
        return summary(self.table)

    def save(self, folder: str | Path) -> None:
        """Write posteriors/<method>.nc, diagnosis.nc, audit.csv and, last, audit.nc into a folder.

        Each file is written completely or not at all. An existing audit.nc is removed first: all files beside an audit.nc
        belong to it, and posteriors of other methods that an earlier audit left there are removed.

        Raises:
            RunFolderError: the folder is a file.
        """
        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise RunFolderError(f"{folder}: this is a file; name a folder")
        (folder / "audit.nc").unlink(missing_ok=True)
        for stale in (folder / "posteriors").glob("*.nc"):
            if stale.stem not in self.trees:
                stale.unlink()
        for method, tree in self.trees.items():
            idata.write(tree, folder / "posteriors" / f"{method}.nc")
        (folder / DIAGNOSIS).unlink(missing_ok=True)
        if self.diagnosis is not None:
            idata.write(self.diagnosis, folder / DIAGNOSIS)
        with atomic(folder / "audit.csv") as temporary:
            self.to_csv(temporary)
        idata.write(self.table, folder / "audit.nc")

    def to_csv(self, path: str | Path) -> None:
        """Write one line per datum; each variable per reference becomes a column such as `mean_error[grid]`."""
        flat = self.table.drop_dims("reference").to_dataframe()
        per_datum = list(flat.columns)
        for reference in self.table["reference"].values:
            part = self.table.sel(reference=reference, drop=True).drop_vars(per_datum).to_dataframe()
            flat = flat.join(part.add_suffix(f"[{reference}]"))
        flat.to_csv(path)

    @classmethod
    def load(cls, folder: str | Path) -> Audit:
        """Read an audit that `save` wrote.

        Raises:
            RunFolderError: the folder holds no audit, or one of its files is damaged.
        """
        folder = Path(folder)
        if not (folder / "audit.nc").is_file():
            raise RunFolderError(f"{folder}: no audit.nc here; run `elbowroom audit {folder}` first")
        table = idata.read_table(folder / "audit.nc")
        trees = {path.stem: idata.read(path) for path in sorted((folder / "posteriors").glob("*.nc"))}
        diagnosis = judgement.read(folder / DIAGNOSIS) if (folder / DIAGNOSIS).is_file() else None
        return cls(table, trees, diagnosis)

    def __repr__(self) -> str:
        rows = "\n".join(f"  {name:<34}{value}" for name, value in self.lines())
        return f"Audit of {self.table.sizes['obs_id']} data\n{rows}\n{self.verdict}"


def audit(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    plate: str | None = None,
    hold: Sequence[str] = (),
    references: Methods = "auto",
    seed: int = 0,
    budget: float | str | None = durations.DEFAULT,
    diagnose: bool = True,
    compile: Compile = "auto",
    progress: Callable[[Progress], None] | None = None,
    **kwargs: Any,
) -> Audit:
    """Audit the guide of any Pyro (model, guide) pair against references.

    Args:
        model: Pyro program p(x, z), with a data plate.
        guide: Pyro program q(z|x), with the same plate.
        *args: arguments of both programs.
        plate: name of the data plate, where there are several that could be it.
        hold: names of other plates, whose latents are held at the guide's median as global ones are: with `hold=["items"]` each
            subject is audited given the items, and with `hold=["subjects"]` each item given the subjects.
        references: `auto` (closed form, else enumeration where all latents are discrete, else a grid for d <= 3, else hmc,
            importance and ais), or names (`closed_form`, `enumeration`, `grid`, `hmc`, `importance`, `ais`; several in a list,
            or with commas between them), or Reference objects, or `none`.
        seed: random seed.
        budget: seconds that the audit may take, or a text such as `10m`; `none` or None for no limit. Where it is short, a
            random sample of the data is audited, and `Audit.population` says what holds for all.
        diagnose: also compute the further evidence for the verdicts: calibration, information, checks of the model, gaps of
            simulated data.
        compile: whether log p(x, z) and its gradient are compiled: `auto` (where that is faster), `always` or `never`; results
            differ by rounding.
        progress: as in `audit_log_joint`.
        **kwargs: keyword arguments of both programs.

    Returns:
        The audit; print it, or see `.table`, `.posteriors`, `.verdict`.

    Raises:
        UnsupportedProgram: per-datum inference does not apply to the pair; it names the site or plate and the reason.
        UserError: a requested reference cannot be used for this model.
    """
    durations.seconds(budget)
    with policy(compile):
        log_joint = LogJoint(model, guide, *args, plate=plate, hold=hold, **kwargs)
        note_rounding(log_joint)
        beside: dict[str, LogJoint] | None = {} if diagnose else None
        return audit_log_joint(log_joint, references=references, seed=seed, budget=budget, beside=beside, progress=progress)


def audit_log_joint(
    log_joint: LogJoint,
    *,
    references: Methods = "auto",
    draws: Annotated[int, Ge(100)] = 10_000,
    keep: Annotated[int, Ge(100)] = 1_000,
    seed: int = 0,
    obs_id: Sequence[int] | None = None,
    attrs: Mapping[str, str] | None = None,
    progress: Callable[[Progress], None] | None = None,
    budget: float | str | None = None,
    store: Store | None = None,
    beside: Mapping[str, LogJoint] | None = None,
    entries: int | None = None,
) -> Audit:
    """Audit a guide through the log joint, block by block of data; draws of each block are thinned before the next one.

    Args:
        log_joint: the model and guide.
        references: as in `audit`.
        draws: guide draws per datum for ELBO, k-hat and importance sampling.
        keep: draws per datum and method kept in the files; fewer where all of them would take more than 512 MB.
        seed: random seed.
        obs_id: labels of the data; default 0 .. N-1.
        attrs: further attributes of the files, such as the spec's hash.
        progress: called before each piece of work with a `Progress`.
        budget: seconds for the whole audit, or a text such as `10m`; data that are not reached are `uncertified`, with the
            reason. The guide's own pass always runs, and references get at least half of the budget in addition to it. Where
            the estimate of all work exceeds half of the budget, data are audited in random order: see `audit.sample`.
        store: where finished parts are saved and looked up.
        beside: log joints of other data of the same pair (such as `train`), whose gaps are computed too, with the further
            evidence for the verdicts; may be empty. None: no diagnosis.
        entries: entries of one datum, where the data are discrete: the diagnosis then includes bits per dimension.

    Raises:
        UserError: a requested reference cannot be used for this model, or the budget is not a valid time.
    """
    started, limit = time.monotonic(), durations.seconds(budget)
    log_joint.separable()  # the notes say if the guide couples the data
    keep = min(keep, draws) // CHAINS * CHAINS
    with stage("plan"):
        size, others = block_size(log_joint, draws), 0 if beside is None else 1 + len(beside)
        plan = choose(references, log_joint, draws=draws, keep=keep, budget=limit, size=size, others=others)
        plan = replace(plan, size=block_size(log_joint, plan.draws)) if plan.sampling else plan
    if store is not None:
        plan = _continued(plan, references, log_joint, store)
    draws, keep = plan.draws, min(keep, plan.first // CHAINS * CHAINS) if plan.sampling else keep
    blocks = log_joint.blocks(plan.size)
    pace = Clock(plan, [] if plan.sampling else [len(rows) for rows in blocks], started + plan.limit)
    log.info("%s", plan)
    say = progress or (lambda step: None)
    say(Progress.of(PLANNED, pace))
    kept, moments = _kept(log_joint, keep, len(plan.references), OF_SAMPLE if plan.sampling else KEPT)
    work = Work(pace, say, keep=keep, kept=kept, moments=moments, draws=draws, seed=seed, store=store)
    if plan.sampling:
        some = sampled(work, log_joint, pace, block_size(log_joint, plan.first), plan.size, seed)
    else:
        turn = random_order(len(blocks), seed) if math.isfinite(limit) else range(len(blocks))
        found = [work.block(part, number, label) for part, number, label in in_turn(log_joint, blocks, turn)]
        some = Sampled(found, torch.cat([blocks[k] for k in turn]), {})
        del found
    guide, posteriors, comparisons = work.joined(some.found, some.rows)
    columns = some.columns
    posteriors = [refute(posterior, [guide, *posteriors]) for posterior in posteriors]
    del some  # frees as much memory as the joined results take
    labels = np.arange(log_joint.n_obs) if obs_id is None else np.asarray(obs_id)
    facts = {"seed": str(seed), "plate": log_joint.plate, "latent_dim": str(log_joint.dim), "draws": str(draws)}
    reasons = [f"{name}: {reason}" for name, reason in zip(plan.names, plan.reasons, strict=True)]
    facts["plan"] = "; ".join([*reasons, *([plan.then] if plan.spare else [])])
    held = [name for name in log_joint.program.pinned if name not in log_joint.program.auxiliary]
    if held:
        facts["held"] = "\n".join(held)
    if not log_joint.amortized:
        facts["amortization"] = "none"
    notes = list(log_joint.notes)
    if len(posteriors) > len(plan.names):
        left = int((~posteriors[0].settled).sum())
        names = ", ".join(posterior.method for posterior in posteriors[len(plan.names) :])
        notes.append(f"{plan.names[-1]} left {left} of {log_joint.n_obs} data over, for which {names} took its place")
    if kept < keep:
        notes.append(f"{kept} of {keep} draws per datum and method are kept in the files, to stay within memory")
    if not moments:
        notes.append("the files hold no covariances, to stay within memory")
    if notes:
        facts["notes"] = "\n".join(notes)
    facts |= dict(attrs or {}) | ({} if entries is None else {"entries": str(entries)})
    with stage("table"):
        table = tabulate(guide, posteriors, comparisons, evidence_of(guide, posteriors), labels, facts).assign(columns)
    diagnosis = None
    if beside is not None:

        def gaps(other: LogJoint, its_seed: int) -> xr.Dataset:
            few, kept = OTHERS
            left = None if limit == math.inf else max(1.0, (pace.deadline - time.monotonic()) / max(ahead.pop(), 1))
            options: dict[str, Any] = {"draws": min(draws, few), "keep": kept, "seed": its_seed, "budget": left}
            return random_part(audit_log_joint(other, references=plan.references, **options).table)

        ahead = list(range(1, len(beside) + 2))  # audits to come, simulated data and each of `beside`, which share the time
        some_data, of_them = log_joint, posteriors
        if plan.sampling:  # of all data there may be very many
            some_data, rows, _ = log_joint.some(torch.as_tensor(np.flatnonzero(random_rows(table)), device=log_joint.device))
            of_them = [rows_of(posterior, rows.cpu()) for posterior in posteriors]
        diagnosis = find_out(
            some_data, random_part(table), of_them, beside, gaps,
            seed=seed, entries=entries, until=pace.deadline, say=lambda sentence: say(Progress.of(sentence, pace)),
        )  # fmt: skip
    verdicts = judge(table) if diagnosis is None else from_dataset(diagnosis["verdicts"].to_dataset())
    table["verdict"] = ("obs_id", per_datum(table), {"long_name": "what can be said of this datum by its own numbers"})
    cut = [] if plan.sampling else unreached(posteriors, limit)
    table.attrs["verdict"] = "\n".join([*map(str, verdicts), *sentences(table), *cut])
    observed = {name: value.cpu().numpy() for name, value in log_joint.program.observed.items()}
    joint = {name: value.cpu().numpy() for name, value in discrete.values(log_joint).items()}
    with stage("trees"):
        trees = {
            posterior.method: to_datatree(posterior, obs_id=labels.tolist(), observed=observed, assignments=joint, attrs=facts)
            for posterior in (guide, *posteriors)
        }
    return Audit(table, trees, diagnosis)


def _continued(plan: Plan, references: Methods, log_joint: LogJoint, store: Store) -> Plan:
    """Return the plan of the audit that is resumed: a new timing could lead to a different plan."""
    kept = store.remember(
        {name: getattr(plan, name) for name in ("reasons", "size", "first", "draws")} | {"references": plan.names}
    )
    if requested(references) == "auto" and kept["references"] != plan.names:
        plan = choose(kept["references"], log_joint, budget=plan.budget, size=plan.size)
        plan = replace(plan, spare=spare(requested(references), plan.references))
    return replace(plan, **{name: kept[name] for name in ("reasons", "size", "first", "draws")})


def block_size(log_joint: LogJoint, draws: int) -> int:
    """Return the number of data whose guide draws are held at once."""
    room = ROOMY if log_joint.device.type == "cuda" else 1
    return min(fitting(draws, room * ARRAY), fitting(draws * max(1, log_joint.dim), room * LARGE_ARRAY))


def _kept(log_joint: LogJoint, keep: int, references: int, room: int = KEPT) -> tuple[int, bool]:
    """Return how many draws per datum fit in memory for all methods, and whether covariances fit."""
    methods, n, d = 1 + references, log_joint.n_obs, log_joint.dim
    sites = sum(math.prod(site.shape) for site in log_joint.sites) + len(log_joint.program.discrete)
    each = 8 * n * methods * (d + sites + 3)
    return keep if each * keep <= room else max(LEAST, room // each // LEAST * LEAST), 8 * n * methods * d * d <= room
