"""The short table and the sentences of the terminal and the report, from an audit's table.

Only data with a value of log p(x) (exact or a trusted estimate) enter the gap; the others are counted.
"""

from __future__ import annotations

import numpy as np
import xarray as xr

from elbowroom.analysis.measures import evidence_kinds
from elbowroom.analysis.measures.evidence_kinds import CONTRADICTED, ESTIMATE, EXACT, counts, estimated, has_value
from elbowroom.analysis.measures.population import population, sampled
from elbowroom.analysis.measures.table import FEW, GOOD_K, LARGE_GAP, MISSED, SMALL_GAP, best_reference, column, needed, trusted
from elbowroom.analysis.verdict.thresholds import bad_k, certified, mean_se

MEAN_ERROR = 0.2  # reference standard deviations
SD_RATIO = 1.25
NAMED = 5  # largest number of data named in a sentence


def mean_in_words(values: np.ndarray) -> str:
    """Format the mean of the finite values and its standard error."""
    mean, error = mean_se(values)
    return "not available" if np.isnan(mean) else f"{mean:.3f} +- {error:.3f}"


def _quartiles(values: np.ndarray, digits: int = 3) -> str:
    values = values[np.isfinite(values)]
    if not values.size:
        return "not available"
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def summary(table: xr.Dataset) -> list[tuple[str, str]]:
    """Return (quantity, value) rows: means +- standard error over data, medians (quartiles), counts.

    Where a budget cut the audit short, they are those of its random sample, after the estimates for all data.
    """
    of_all = _population_rows(table)
    table = sampled(table)
    n, k, gap = table.sizes["obs_id"], table["pareto_k"].values, table["gap_total"].values
    largest = f"{gap[np.isfinite(gap)].max():.3f}" if np.isfinite(gap).any() else "not available"
    no_k = not (np.isfinite(k) | np.isposinf(k)).any()  # for example weights of a few discrete values, which have no tail
    rows = [
        ("data audited", str(n)),
        *of_all,
        ("evidence by", ", ".join(f"{name} {count}" for name, count in sorted(evidence_kinds.methods(table).items()))),
        (
            f"mean ELBO [nats]{', at the median of the global latents' if held(table) else ''}",
            mean_in_words(table["elbo"].values),
        ),
        (f"mean log p(x) [nats], {int(has_value(table).sum())} data", mean_in_words(table["log_evidence"].values)),
        ("gap [nats], median (quartiles)", _quartiles(gap)),
        ("gap [nats], largest", largest),
        ("k-hat, median (quartiles)", _quartiles(k, 2)),
        (f"k-hat > {GOOD_K}", "not available" if no_k else f"{bad_k(table)} of {n}"),
        ("effective sample fraction, median", _quartiles(table["ess_fraction"].values, 2)),
    ]
    for reference in table["reference"].values:
        part, good = table.sel(reference=reference), trusted(table, reference)
        asked = int(needed(table, reference).sum())
        rows.append((f"{reference}: exact or certified", f"{int(good.sum())} of {asked}" + " left over" * (asked < n)))
        if not good.any():  # for example annealing, which certifies nothing: its bounds are in the table
            continue
        if np.isfinite(part["total_variation"].values).any():
            rows.append((f"{reference}: total variation", _quartiles(part["total_variation"].values[good])))
            continue
        rows += [
            (f"{reference}: mean error [sd]", _quartiles(part["mean_error"].values[good], 2)),
            (f"{reference}: sd ratio", _quartiles(part["sd_ratio"].values[good], 2)),
            (f"{reference}: sliced Wasserstein [sd]", _quartiles(part["sliced_wasserstein"].values[good], 3)),
            (f"{reference}: its noise floor [sd]", _quartiles(part["noise_floor"].values[good], 3)),
        ]
        if "kl_forward" in part:  # absent in audits of older versions
            rows.append((f"{reference}: KL(p || q) [nats]", _quartiles(part["kl_forward"].values[good])))
    return rows


def sentences(table: xr.Dataset) -> list[str]:
    """Return two to five plain sentences: the size of the gap, the errors of q, and the data that could not be certified."""
    part = sampled(table)
    lines = (_sample(table), _gap(part), _missed(part), _shape(part), _trust(part), _caveat(part))
    return [line for line in lines if line]


def _population_rows(table: xr.Dataset) -> list[tuple[str, str]]:
    """Return estimates for all data from a random sample; nothing where all were audited."""
    if sampled(table) is table:
        return []
    found, n = population(table), table.sizes["obs_id"]
    out = [("a random sample of", f"{n:,}")]
    for name, what in {
        "gap_total": "mean gap of all [nats], 95 %",
        "gap_amortization": "  of it amortization [nats], 95 %",
        "gap_approximation": "  of it approximation [nats], 95 %",
        "log_evidence": "mean log p(x) of all [nats], 95 %",
        "gap_above_1_nat": "share of all above 1 nat, 95 %",
    }.items():
        out.append((what, interval(found.sel(quantity=name))))
    return out


def interval(row: xr.Dataset) -> str:
    """Format an estimate of `population` with its interval."""
    mean, low, high = (float(row[name]) for name in ("mean", "lower", "upper"))
    return "not available" if np.isnan(mean) else f"{mean:.3f} ({low:.3f} to {high:.3f})"


def _sample(table: xr.Dataset) -> str:
    """Say that the audit is one of a random sample, and what it says of all data."""
    part = sampled(table)
    if part is table:
        return ""
    n, found = table.sizes["obs_id"], population(table)
    few, missing = part.sizes["obs_id"], int(found.attrs["without_value"])
    gap, above = found.sel(quantity="gap_total"), found.sel(quantity="gap_above_1_nat")
    worst = int((np.isfinite(column(table, "gap_total")) & _audited(table)).sum()) - (few - missing)
    line = f"The budget let {few:,} of {n:,} data be audited, drawn at random; verdicts and figures are those of this sample."
    if np.isfinite(float(gap["mean"])):
        line += f" The mean gap of all {n:,} is {interval(gap)} nats, the share above 1 nat {interval(above)} (95 %)."
    if missing:
        line += f" {missing} of the sample have no value of log p(x): these intervals do not speak for data like them."
    if worst > 0:
        line += f" {worst} more were audited because a proxy shows them as the worst; they are in no mean."
    return line


def _audited(table: xr.Dataset) -> np.ndarray:
    """Return which data a reference was run on, (N,)."""
    if not table.sizes["reference"]:
        return np.zeros(table.sizes["obs_id"], dtype=bool)
    return np.asarray(np.isfinite(table["sliced_wasserstein"].values).any(1))


def _missed(table: xr.Dataset) -> str:
    """Name the data at which the guide misses a mode, and the missed mass."""
    mass = column(table, "missed_mass")
    lost = np.flatnonzero(mass > MISSED)
    if not lost.size:
        return ""
    lost = lost[np.argsort(-mass[lost], kind="stable")]
    labels = ", ".join(str(label) for label in table["obs_id"].values[lost[:NAMED]])
    more = f" and {lost.size - NAMED} more" if lost.size > NAMED else ""
    low, high = mass[lost].min(), mass[lost].max()
    share = f"{high:.0%}" if f"{low:.0%}" == f"{high:.0%}" else f"{low:.0%} to {high:.0%}"
    return (
        f"The guide misses a mode at {lost.size} of {mass.size} data (obs {labels}{more}; it holds {share} of the posterior "
        "there): draws of q, and importance sampling from it, know nothing of it."
    )


def _gap(table: xr.Dataset) -> str:
    n, gap, kind = table.sizes["obs_id"], table["gap_total"].values, counts(table)
    gap, infinite = gap[np.isfinite(gap)], int(np.isposinf(gap).sum())
    if wrong := kind[CONTRADICTED]:
        return (
            f"The numbers contradict each other: for {wrong} of {n} data log p(x) lies below the ELBO by more than their "
            "errors allow, which cannot be; a mode was missed or a density is not normalised. Trust none of them."
        )
    if not gap.size:
        if infinite:
            return f"The ELBO of {infinite} of {n} data is minus infinity: q puts mass where p(x, z) is zero."
        why = (
            "no reference gave a value that could be certified"
            if table.sizes["reference"]
            else "the latent space is too large for the references here"
        )
        above = int(np.isfinite(column(table, "log_evidence_upper")).sum())
        upper = f", log_evidence_upper a conditional upper bound for {above}" if above else ""
        return (
            f"The gap of none of the {n} data is known: {why} and the guide's importance weights cannot be trusted; "
            f"log_evidence_lower holds a probabilistic lower bound for each{upper}."
        )
    median, high = np.median(gap), np.quantile(gap, 0.95)
    worst = table["obs_id"].values[int(np.nanargmax(table["gap_total"].values))]
    tail = (
        f"the ELBO of a typical datum lies {median:.3g} nats below log p(x) (95 % of the data: below {high:.3g}; the largest "
        f"gap, {gap.max():.3g}, is at datum {worst})."
    )
    if infinite:
        tail += f" For {infinite} more the ELBO is minus infinity: q puts mass where p(x, z) is zero."
    if not kind[EXACT]:
        if evidence_kinds.of_guide(table).any():
            return (
                f"Where the guide puts mass, {tail} log p(x) is estimated by importance sampling from the guide itself: a mode "
                "that the guide misses would be missing in it too, and the true gap larger."
            )
        tail += f" log p(x) is estimated by {estimated(table)[1]}, not from the guide."
    lost = (column(table, "missed_mass") > MISSED).mean() >= FEW or (gap > LARGE_GAP).mean() >= FEW
    near = "not everywhere close to" if lost else "close to"
    size = near if median < SMALL_GAP else "at some distance from" if median < LARGE_GAP else "far from"
    return f"The amortized posterior is {size} the true one: {tail}"


def _shape(table: xr.Dataset) -> str:
    best = best_reference(table)
    if best is None:
        return ""
    part, good = table.sel(reference=best), trusted(table, best)
    variation = part["total_variation"].values[good]
    if np.isfinite(variation).all():  # every latent is discrete: no mean and no width
        return (
            f"The typical q(z|x) puts {np.median(variation):.2g} of its probability on other values than the true posterior "
            f"(total variation; the largest, {variation.max():.2g})."
        )
    ratio, shift = np.median(part["sd_ratio"].values[good]), np.median(part["mean_error"].values[good])
    factor = np.median(np.exp(np.abs(np.log(part["sd_ratio"].values[good]))))  # so that narrow and wide ones do not cancel
    width = (
        f"too narrow (sd {ratio:.2f} of the true one)"
        if ratio < 1 / SD_RATIO
        else f"too wide (sd {ratio:.2f} of the true one)"
        if ratio > SD_RATIO
        else f"of another width than the true posterior, here narrower and there wider (by a factor of {factor:.2f})"
        if factor > SD_RATIO
        else f"about as wide as the true posterior (sd ratio {ratio:.2f})"
    )
    place = f"off centre by {shift:.2f} posterior sd" if shift > MEAN_ERROR else f"centred within {shift:.2f} posterior sd"
    return f"In its worst latent the typical q(z|x) is {width} and {place}."


def _trust(table: xr.Dataset) -> str:
    bad = bad_k(table)
    if not bad or np.isnan(table["pareto_k"].values).all():
        return ""
    return (
        f"For {bad} of {table.sizes['obs_id']} data k-hat exceeds {GOOD_K}: importance sampling from this guide is not "
        "reliable there."
    )


def _caveat(table: xr.Dataset) -> str:
    n, kind, missing = table.sizes["obs_id"], counts(table), int((~has_value(table)).sum())
    parts = []
    if kind[EXACT]:
        parts.append(f"log p(x) is exact, up to the numerical error stated, for {kind[EXACT]} of {n} data")
    if kind[ESTIMATE]:
        parts.append(f"log p(x) is an {estimated(table)[0]} for {kind[ESTIMATE]} of {n}")
    if kind[CONTRADICTED]:
        parts.append(f"log p(x) is contradicted by the ELBO for {kind[CONTRADICTED]} of {n}")
    if missing:
        both = int((np.isfinite(column(table, "log_evidence_upper")) & ~has_value(table)).sum())
        parts.append(f"only a lower bound is known for {missing - both} of {n}, which enter no gap above")
        if both:
            parts[-1] = (
                f"only bounds are known for {missing} of {n}, which enter no gap above (an upper one for {both}, "
                "conditional on the certified draws that it starts from)"
            )
    uncertified = int((~certified(table)).sum())
    if uncertified and table.sizes["reference"]:
        parts.append(f"no reference could be certified for {uncertified}")
    return f"{'; '.join(parts)}. All of this is conditional on the trained decoder.{_held(table)}"


def held(table: xr.Dataset) -> list[str]:
    """Return the names of the global latents that are held at the guide's median."""
    return [name for name in str(table.attrs.get("held", "")).split("\n") if name]


def _held(table: xr.Dataset) -> str:
    """Say what ELBO this is, if global latents are held: not the one of training."""
    names = held(table)
    if not names:
        return ""
    which = f"latent {names[0]!r} is" if len(names) == 1 else f"latents {', '.join(map(repr, names))} are"
    return (
        f" The global {which} held at the guide's median: ELBO, log p(x) and gap are those of each datum at that value. The "
        "ELBO of SVI is another number: it averages over the guide's draws of the global latents, and counts their "
        "own divergence."
    )
