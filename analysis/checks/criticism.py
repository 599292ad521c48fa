"""Criticism of the model: would the model generate data like the observed ones?

Every check compares T(x, z) of the data with T of replicates under an exact null. There are two nulls:

* `joint`: T(x', z') of (x', z') ~ p(x, z). The observed pairs are x_n with one certified draw z_n of p(z|x_n): if the model is
  right, (x_n, z_n) has the distribution of (x', z') for any T (Johnson 2004, https://doi.org/10.1214/009053604000000616; Yuan
  and Johnson 2012, https://doi.org/10.1111/j.1541-0420.2011.01668.x). A posterior predictive p-value uses x twice and has no
  such null
* `residual`: ranks of x_n among draws from p(x|z_n); see `checks.residuals`

Entries that are missing (NaN) or masked out of the likelihood are left out of every statistic, of data and replicates alike.

With R replicates no p-value is below 1/(R+1), which over two nulls is the level of the rule. Where the smallest is near that
level it is computed from three times as many replicates. A test that rejects by the longer null alone keeps its level.

The null treats the trained model as known. On held-out data a small p-value means misfit or an overfitted decoder; on the
training data, misfit can stay hidden. With enough data every model is rejected: read the effect size as well.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
from collections.abc import Iterator, Mapping

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from elbowroom.analysis.checks.datasets import NATS, dataset, pit, sentence, statistics
from elbowroom.analysis.checks.residuals import KINDS, WORDS, Residuals, replicated, residuals
from elbowroom.analysis.checks.statistics import EffectKind, Judged, Statistic, judge, suited
from elbowroom.analysis.measures.table import LEVEL
from elbowroom.errors import UnsupportedProgram, first_line
from elbowroom.inference.compiled.policies import policy
from elbowroom.inference.posterior import Posterior, completed
from elbowroom.inference.target import discrete
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.inference.target.simulate import in_likelihood, predict, simulate
from elbowroom.system.memory import fitting
from elbowroom.system.stages import stage

LARGE = 2**20  # largest number of entries of the data used
TRACES = 2**22  # entries simulated between garbage collections
RANKED = 1000  # data whose residuals are ranked
LEAST = 10  # data
NEAR, MORE = 4, 3  # a smallest p-value below NEAR x the rule's level is computed again from MORE times as many replicates
SHOWN = 100  # data, and draws of each, in the groups for ArviZ
BYTES = 2**26  # of those groups
REFUSED = (UnsupportedProgram, *discrete.FAILURES)


def criticise(
    log_joint: LogJoint, reference: Posterior, *, replicates: int = 400, draws: int = 399, seed: int = 0
) -> xr.DataTree:
    """Check the model against the data: statistics for their type, residuals, and predictive groups for ArviZ.

    Args:
        log_joint: the model and guide.
        reference: a posterior of the same data. Only exact or certified data provide a z; statistics of x alone use all data.
        replicates: simulated data sets R of the joint null; its p-values are multiples of 1/(R+1). Three times as many where
            the smallest is near the level of the rule.
        draws: data sets L drawn at given latents, of the residual null; its p-values are multiples of 1/(L+1). Likewise.
        seed: random seed.

    Returns:
        A DataTree with the groups

        * `statistics` (statistic): value, null_mean, null_sd, p_value, p_adjusted, effect; group (`joint` or `residual`),
          words, effect_kind (see `thresholds.EFFECTS`), and null (statistic, replicate), NaN beyond the shorter null.
          p_adjusted is familywise over all statistics: the probability under the model that any deviates as much (maxT within
          each null, then multiplied by the number of nulls)
        * `pit` (column, u): effect and p_value of each column, difference (ECDF - u of all entries), band; with several
          observed sites `pit_<site>`
        * `posterior_predictive`, `prior_predictive`, `observed_data`, `log_likelihood`: at most 100 data (`obs_id`) and 100
          draws, 64 MB

        Attributes: `joint`, `residual`, `predictive`: empty, or `not available: ` and the reason; `replicates`, `draws`, `data`
            (number of data used: a random subset of at most a million entries), `certified` (their certified share),
            `sentence`.
    """
    log_joint, reference, labels = _some(log_joint, reference, seed)
    n, trusted = log_joint.n_obs, reference.trusted.to(log_joint.device)
    attrs: dict[str, str] = {"replicates": str(replicates), "draws": str(draws), "seed": str(seed)}
    attrs |= {
        "data": str(n),
        "joint": "",
        "residual": "",
        "predictive": "",
        "certified": f"{float(trusted.double().mean()):.4f}",
    }
    try:
        if n < LEAST:
            raise UnsupportedProgram(f"fewer than {LEAST} data")
        log_joint = _unmasked(log_joint)
    except UnsupportedProgram as refused:
        attrs["joint"] = attrs["residual"] = attrs["predictive"] = f"not available: {first_line(refused)}"
        return xr.DataTree(xr.Dataset(attrs={**attrs, "sentence": attrs["joint"]}))
    generator = torch.Generator().manual_seed(seed)
    rows = trusted.cpu().nonzero()[:, 0]
    rows = rows[torch.randperm(len(rows), generator=generator)].to(log_joint.device)
    shown = rows[: _shown(log_joint)].sort().values
    groups: dict[str, xr.Dataset] = {}
    judged: dict[str, tuple[str, Judged, str, EffectKind]] = {}
    z: Tensor | None = None
    sites: dict[str, Tensor] = {}
    if len(rows):
        reference = completed(log_joint, reference, seed + 1)
        z, sites = _one_draw(reference, rows, generator)
    try:
        joint, prior = _joint(log_joint, z, rows, shown, replicates, seed + 2)
        judged |= joint
        groups |= {"prior_predictive": dataset(prior, shown, draws=True)}
    except REFUSED as refused:
        attrs["joint"] = f"not available: {first_line(refused)}"
    try:
        if not len(rows):
            raise UnsupportedProgram("no datum has a certified posterior")
        for name, found in _residuals(log_joint, sites, rows, draws, seed + 3).items():
            several = len(log_joint.program.observed) > 1
            if found is not None:
                prefix = f"{name}: " if several else ""
                judged |= {
                    prefix + k: ("residual", one, prefix + WORDS[k], KINDS.get(k, "difference"))
                    for k, one in found.judged.items()
                }
                groups[f"pit_{name}".replace("/", ".") if several else "pit"] = pit(found)
    except REFUSED as refused:
        attrs["residual"] = f"not available: {first_line(refused)}"
    try:
        groups |= _predictive(log_joint, reference, shown, seed + 4) if len(rows) else {}
    except REFUSED as refused:
        attrs["predictive"] = f"not available: {first_line(refused)}"
    for name, of in (("replicates", "joint"), ("draws", "residual")):
        attrs[name] = str(max((len(one.null) for group, one, *_ in judged.values() if group == of), default=int(attrs[name])))
    groups["statistics"] = statistics(judged)
    for name, group in groups.items():
        if "obs_id" in group.coords:
            groups[name] = group.assign_coords(obs_id=labels[group["obs_id"].values])
    tree = xr.DataTree.from_dict(groups)
    tree.attrs.update(attrs, sentence=sentence(groups["statistics"], attrs))
    return tree


def _some(log_joint: LogJoint, reference: Posterior, seed: int) -> tuple[LogJoint, Posterior, np.ndarray]:
    """Return log joint and posterior of a random subset of the data that can be replicated in seconds, and its indices."""
    n = log_joint.n_obs
    width = sum(value[0].numel() for value in log_joint.program.observed.values())
    most = max(LEAST, fitting(width, LARGE))
    if n <= most or not log_joint.separable():
        return log_joint, reference, np.arange(n)
    rows = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:most].sort().values
    part = _among(log_joint, rows.to(log_joint.device))[0]
    few = Posterior(
        method=reference.method,
        draws=reference.draws[:, :, rows.to(reference.draws.device)],
        sites={name: value[:, :, rows.to(value.device)] for name, value in reference.sites.items()},
        status=[reference.status[i] for i in rows.tolist()],
        reason=[reference.reason[i] for i in rows.tolist()],
    )
    return part, few, rows.numpy()


def _unmasked(log_joint: LogJoint) -> LogJoint:
    """Return the log joint with NaN for every entry that a mask takes out of the likelihood."""
    given = in_likelihood(log_joint)
    if not given:
        raise UnsupportedProgram("a mask takes all entries out of the likelihood")
    if all(given.get(name) is value for name, value in log_joint.program.observed.items()):
        return log_joint
    seen = copy.copy(log_joint)
    seen.program = dataclasses.replace(log_joint.program, observed=given)
    return seen


def _shown(log_joint: LogJoint) -> int:
    width = sum(value[0].numel() for value in log_joint.program.observed.values())
    return min(SHOWN, fitting(2 * 8 * SHOWN * width, BYTES))


def _one_draw(reference: Posterior, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """Take one draw per datum: z (N, d) and the sites. Data that are not certified get the draw of a certified datum."""
    chains, length, n = reference.draws.shape[:3]
    every = torch.arange(n, device=rows.device)
    good = torch.zeros(n, dtype=torch.bool, device=rows.device).index_fill(0, rows, True)
    datum = torch.where(good, every, rows[0])
    chain, draw = (torch.randint(k, (n,), generator=generator).to(rows.device) for k in (chains, length))
    take = lambda t: t.to(rows.device)[chain, draw, datum]
    return take(reference.draws), {name: _filled(take(value)) for name, value in reference.sites.items()}


def _filled(value: Tensor) -> Tensor:
    """Replace latents that are masked out by a value of other data: x does not depend on them."""
    if not value.is_floating_point() or not bool(value.isnan().any()):
        return value
    return torch.where(value.isnan(), value.nanmedian(0).values.nan_to_num(), value)


def _flat(x: Tensor) -> Tensor:
    return x.double().flatten(1) if x.dim() > 1 else x.double()[:, None]


@stage("joint")
def _joint(
    log_joint: LogJoint, z: Tensor | None, rows: Tensor, shown: Tensor, replicates: int, seed: int
) -> tuple[dict[str, tuple[str, Judged, str, EffectKind]], dict[str, Tensor]]:
    """Return statistics of data and replicates, and some of the replicates: name -> (S, len(shown), D)."""
    observed = log_joint.program.observed
    wanted: dict[str, tuple[str, Statistic]] = {}
    for site, x in observed.items():
        prefix = f"{site}: " if len(observed) > 1 else ""
        wanted |= {prefix + one.name: (site, one) for one in suited(_flat(x))}
    values: dict[str, list[Tensor]] = {name: [] for name in wanted}
    densities = NATS if z is not None and log_joint.dim else ()
    values |= {name: [] for name in densities}

    def take(of: Mapping[str, Tensor], joint: LogJoint | None, at: Tensor | None) -> None:
        seen = {site: _flat(x) for site, x in of.items()}
        for name, (site, one) in wanted.items():
            values[name].append(one.value(seen[site]).double())
        if joint is not None and at is not None and densities:
            prior, likelihood = joint.terms(at[None])
            for name, value in zip(densities, (likelihood, prior), strict=True):
                values[name].append(value[0, rows].double().mean())

    kept: dict[str, list[Tensor]] = {site: [] for site in observed}
    every = fitting(sum(value.numel() for value in observed.values()), TRACES)
    with torch.no_grad(), policy("never"):  # a replicate is evaluated once: compiling a graph does not pay
        take(observed, log_joint, z)
        for r, (new, joint, at) in enumerate(_replicates(log_joint, MORE * replicates, seed)):
            if r == replicates and not _near(judge({name: torch.stack(parts) for name, parts in values.items()})):
                break
            take(new, joint, at)
            if r % every == every - 1:  # traces are cyclic: only the garbage collector frees them
                gc.collect()
            if r < SHOWN:
                for site in observed:
                    kept[site].append(new[site][shown])
    words = {name: one.words for name, (_, one) in wanted.items()}
    words |= {"log_likelihood": "mean log p(x|z) at one draw of the posterior, nats", "log_prior": "mean log p(z) there, nats"}
    kinds: dict[str, EffectKind] = {name: one.kind for name, (_, one) in wanted.items()} | dict.fromkeys(NATS, "nats")
    found = judge({name: torch.stack(parts) for name, parts in values.items()}, kinds=kinds)
    judged = {name: ("joint", one, words[name], kinds[name]) for name, one in found.items()}
    return judged, {site: torch.stack(parts) for site, parts in kept.items() if parts}


def _replicates(
    log_joint: LogJoint, number: int, seed: int
) -> Iterator[tuple[Mapping[str, Tensor], LogJoint | None, Tensor | None]]:
    """Yield simulated data; with continuous latents also their log joint and z."""
    if log_joint.dim:
        for r in range(number):
            other, z = simulate(log_joint, seed + r)
            yield other.program.observed, other, z
        return
    sites = discrete.at(log_joint, discrete.draw(discrete.table(log_joint).log_prior, number, seed))
    for r in range(number):
        drawn = predict(log_joint, {name: value[r : r + 1] for name, value in sites.items()}, seed + r)
        yield {**log_joint.program.observed, **{name: value[0] for name, value in drawn.items()}}, None, None


@stage("residuals")
def _residuals(
    log_joint: LogJoint, sites: Mapping[str, Tensor], rows: Tensor, draws: int, seed: int
) -> dict[str, Residuals | None]:
    rows = rows[:RANKED].sort().values
    joint, used, inside = _among(log_joint, rows)
    sites = {name: value[used] for name, value in sites.items()}
    found = residuals(joint, sites, inside, draws, seed)
    if any(one is not None and _near(one.judged) for one in found.values()):
        found = residuals(joint, sites, inside, MORE * draws, seed)
    return found


def _near(judged: Mapping[str, Judged]) -> bool:
    return min((one.p_family for one in judged.values()), default=1.0) <= NEAR * LEVEL


def _among(log_joint: LogJoint, rows: Tensor) -> tuple[LogJoint, Tensor, Tensor]:
    """Return the result of `LogJoint.some`, with the observed values of these data."""
    part, used, inside = log_joint.some(rows)
    if part is not log_joint:
        observed = {name: value[rows] for name, value in log_joint.program.observed.items()}
        part.program = dataclasses.replace(part.program, observed=observed)
    return part, used, inside


@stage("predictive")
def _predictive(log_joint: LogJoint, reference: Posterior, shown: Tensor, seed: int) -> dict[str, xr.Dataset]:
    observed = log_joint.program.observed
    total = reference.draws.shape[0] * reference.draws.shape[1]
    pick = torch.linspace(0, total - 1, min(SHOWN, total)).long().to(shown.device)
    joint, used, inside = _among(log_joint, shown)
    everywhere = torch.where(torch.isin(used, shown), used, shown[0])  # a certified datum in place of the others
    take = lambda t: t.to(shown.device).flatten(0, 1)[pick][:, everywhere]
    sites = {name: _filled(take(value)) for name, value in reference.sites.items()}
    with torch.no_grad():
        likelihood = joint.terms(take(reference.draws))[1][:, inside].double()
        drawn = {name: torch.cat(parts) for name, parts in replicated(joint, sites, inside, seed).items()}
    of = "x" if len(observed) != 1 else next(iter(observed))
    return {
        "posterior_predictive": dataset(drawn, shown, draws=True, like=observed),
        "observed_data": dataset({name: value[shown] for name, value in observed.items()}, shown, draws=False),
        "log_likelihood": dataset({of: likelihood}, shown, draws=True),
    }
