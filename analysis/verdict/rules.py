r"""The verdicts and their rules, from certified evidence only.

| verdict                     | rule                                                                                         |
|-----------------------------|----------------------------------------------------------------------------------------------|
| `reference not trustworthy` | less than half of the data are exact or certified, or log p(x) lies below the ELBO somewhere |
| `mode missed`               | at 5 % of the data or more, modes with above 5 % of the posterior are missed by the guide    |
| `latents collapsed`         | a latent's rate is below 0.01 nats, that of the guide and that of the certified posterior    |
| `model misfit`              | a check fails at a familywise level of 0.5 % AND by more than matters                        |
| `encoder overfits`          | the amortization gap is 0.1 nats larger than on training data, which is half of it or more   |
| `encoder falls short`       | the gap is not small, 1/3 of it or more is amortization, and the encoder does not overfit    |
| `family too small`          | the gap is not small, and 1/3 of it or more is approximation                                 |
| `guide falls short`         | the gap is not small, and could not be told apart (the guide's family was not refitted)      |
| `sound`                     | none of these                                                                                |

The gap is `not small` where the median over certified data exceeds 0.1 nats, or 5 % of them have more than 1 nat; each datum
counts with the lower end of its own interval. The verdict is about these data; the distribution-free interval of a median, by
order statistics, is about their population. Several verdicts may hold, in this order, the two causes of the gap by their size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import xarray as xr

from elbowroom.analysis.measures.evidence_kinds import CONTRADICTED, ERRORS, counts, kinds
from elbowroom.analysis.measures.population import sampled
from elbowroom.analysis.measures.table import (
    FEW,
    LARGE_GAP,
    LEVEL,
    MISSED,
    SMALL_GAP,
    UNUSED,
    Z95,
    best_reference,
    column,
    trusted,
)
from elbowroom.analysis.verdict.judgement import Judgement
from elbowroom.analysis.verdict.remedies import Remedies
from elbowroom.analysis.verdict.thresholds import (
    CAUSE,
    COLLAPSED,
    EFFECT,
    EFFECTS,
    ENCODER,
    FAMILY,
    FEWEST,
    GUIDE,
    HALF,
    MEASURED,
    MISFIT,
    MODE_MISSED,
    OVERFITS,
    SOUND,
    UNTRUSTED,
    effect_in_words,
    known,
    median,
)


class Facts:
    """The data for the rules: the table of certified data, and the further evidence.

    Args:
        table: the audit's table.
        beside: `information`, `checks`, `train` and so on, where available.
    """

    def __init__(self, table: xr.Dataset, beside: Mapping[str, xr.Dataset]) -> None:
        self.table, self.beside, self.cures = table, beside, Remedies.of(table)
        self.n = table.sizes["obs_id"]
        self.known = known(table)
        self.gap = column(table, "gap_total")[self.known]
        self.low = column(table, "gap_total_lower")[self.known]

    def part(self, name: str) -> np.ndarray:
        """Return a column of the certified data."""
        return column(self.table, name)[self.known]

    @property
    def small(self) -> bool:
        """Whether the gap is small."""
        if not self.gap.size:
            return True
        return bool(np.median(self.low) <= SMALL_GAP and np.mean(self.low > LARGE_GAP) < FEW)


def judge(table: xr.Dataset, beside: Mapping[str, xr.Dataset] | None = None) -> list[Judgement]:
    """Return the verdicts, the most consequential first; `sound` alone where no other applies.

    Args:
        table: the audit's table; where a budget cut the audit short, its random sample alone is judged.
        beside: datasets by name, as `Audit.diagnosis` holds them; rules without their evidence give no verdict.
    """
    facts = Facts(sampled(table), beside or {})
    if not facts.known.any():  # a missed mode needs a certified posterior, not log p(x)
        return [one for one in (_mode_missed(facts), _untrusted(facts)) if one is not None] or [_sound(facts)]
    found = [judgement for find in RULES.values() if (judgement := find(facts)) is not None]
    causes = sorted((one for one in found if one.verdict in (ENCODER, FAMILY)), key=lambda one: -one.number)
    rest = iter(causes)
    found = [next(rest) if one.verdict in (ENCODER, FAMILY) else one for one in found]
    return found or [_sound(facts)]


def per_datum(table: xr.Dataset) -> np.ndarray:
    """Return a verdict for each datum, (N,), based on its own numbers only."""
    gap, low = column(table, "gap_total"), column(table, "gap_total_lower")
    shares = (column(table, "gap_amortization"), column(table, "gap_approximation"))
    verdict = np.full(table.sizes["obs_id"], SOUND, dtype=object)
    wide = (gap > SMALL_GAP) & (low > 0)
    cause = np.where(np.isnan(shares[0]), GUIDE, np.where(shares[0] >= shares[1], ENCODER, FAMILY))
    verdict = np.where(wide, cause, verdict)
    verdict = np.where(known(table), verdict, UNTRUSTED)
    verdict = np.where(column(table, "missed_mass") > MISSED, MODE_MISSED, verdict)
    return np.where(kinds(table) == CONTRADICTED, UNTRUSTED, verdict).astype(str)


# -- the rules --------------------------------------------------------------------------------------------------------------


def _untrusted(facts: Facts) -> Judgement | None:
    share, wrong = float(facts.known.mean()), counts(facts.table)[CONTRADICTED]
    rule = f"less than {HALF:.0%} of the data are exact or certified, or log p(x) lies below the ELBO by {ERRORS:.0f} errors"
    if share >= HALF and not wrong:
        return None
    if wrong:
        said = f"log p(x) lies below the ELBO by more than their errors allow at {wrong} of {facts.n} data, which cannot be"
        advice = "A mode was missed or a density is not normalised; trust none of the numbers."
    else:
        n = int(facts.known.sum())
        said = f"{n} of {facts.n} data have a certified posterior and a value of log p(x), the others bounds at most"
        advice = (
            f"What follows rests on these alone. Give the references {facts.cures.references}; the reasons stand beside each "
            "datum."
        )
    return Judgement(UNTRUSTED, share, math.nan, math.nan, "share of the data", said, rule, advice)


def _mode_missed(facts: Facts) -> Judgement | None:
    mass = column(facts.table, "missed_mass")  # of every certified posterior, whether or not log p(x) is known
    lost, seen = mass > MISSED, ~np.isnan(mass)
    if not seen.any() or lost.sum() < max(1.0, FEW * seen.sum()):
        return None
    share = lost.sum() / seen.sum()
    error = math.sqrt(share * (1 - share) / seen.sum())
    return Judgement(
        MODE_MISSED,
        float(share),
        max(0.0, share - Z95 * error),
        min(1.0, share + Z95 * error),
        "share of the data",
        f"the guide misses a mode at {lost.sum()} of {seen.sum()} certified data (median mass {np.median(mass[lost]):.0%})",
        f"modes with above {MISSED:.0%} of the posterior are missed at {FEW:.0%} of the data or more",
        f"Use a family with several modes ({facts.cures.modes}), and the reference's posterior until then; importance sampling "
        "from this guide does not see what is missed.",
    )


def _collapsed(facts: Facts) -> Judgement | None:
    found = facts.beside.get("information")
    if found is None or "collapsed" not in found:
        return None
    names = found["name" if "name" in found else "coordinate"].values
    dead = [str(name) for name in names[found["collapsed"].values.astype(bool)]]
    if not dead:
        return None
    d = found.sizes["coordinate"]
    return Judgement(
        COLLAPSED,
        float(len(dead)),
        math.nan,
        math.nan,
        "latents",
        f"{len(dead)} of {d} latents carry nothing ({', '.join(dead[:5])}{', ...' if len(dead) > 5 else ''})",
        f"rate below {UNUSED:g} nats, of the guide and of the certified posterior",
        f"The model does without them: take them away, or keep them alive while training ({facts.cures.alive}) and see whether "
        f"held-out log p(x) rises: {facts.cures.held_out}.",
    )


def _misfit(facts: Facts) -> Judgement | None:
    found = facts.beside.get("checks")
    if found is None or not found.sizes.get("statistic"):
        return None
    names = found["words"].values.astype(str)
    effect, p = np.abs(found["effect"].values), found["p_adjusted"].values
    limit = np.array([EFFECTS[kind] for kind in found["effect_kind"].values.astype(str)])
    bad = (p <= LEVEL) & (effect > limit)
    if not bad.any():
        return None
    worst = int(np.argmax(np.where(bad, effect / limit, -1.0)))
    kind, signed = str(found["effect_kind"].values[worst]), float(found["effect"].values[worst])
    return Judgement(
        MISFIT,
        signed,
        math.nan,
        math.nan,
        f"{EFFECT}{kind}",
        f"{bad.sum()} of {bad.size} checks fail, the worst: {names[worst]}, effect {effect_in_words(signed, kind)}, "
        f"p = {p[worst]:.1g} over all checks",
        f"p at most {LEVEL} over all checks, and an effect above {effect_in_words(EFFECTS[kind], kind).lstrip('+')} in "
        f"size ({MEASURED[kind]})",
        "The posterior is that of a model that does not make such data: try another likelihood "
        f"({facts.cures.likelihoods}), more latents or a larger decoder; {facts.cures.held_out}.",
    )


def _overfits(facts: Facts) -> Judgement | None:
    train = facts.beside.get("train")
    if train is None or facts.small:
        return None
    name = "gap_amortization" if np.isfinite(facts.part("gap_amortization")).any() else "gap_total"
    here, there = facts.part(name), column(train, name)[known(train)]
    here, there = here[np.isfinite(here)], there[np.isfinite(there)]
    if min(here.size, there.size) < FEWEST:
        return None
    difference = float(np.median(here) - np.median(there))
    rng = np.random.default_rng(0)
    again = [np.median(rng.choice(here, here.size)) - np.median(rng.choice(there, there.size)) for _ in range(1000)]
    low, high = (float(q) for q in np.quantile(again, (0.025, 0.975)))
    if not (low > SMALL_GAP and difference >= HALF * np.median(here)):
        return None
    what = "amortization gap" if name == "gap_amortization" else "gap"
    return Judgement(
        OVERFITS,
        difference,
        low,
        high,
        "nats",
        f"the median {what} is {np.median(here):.3g} nats here and {np.median(there):.3g} on training data, "
        f"{_interval((difference, low, high))} more",
        f"the lower end above {SMALL_GAP} nats, and the difference half of the {what} or more",
        "The encoder has learnt its training data by heart: train it on data drawn from the model, of which there is no end "
        f"({facts.cures.simulated}); more data, {facts.cures.regularise} help as well.",
    )


def _encoder(facts: Facts) -> Judgement | None:
    """Return `encoder falls short`, unless the encoder overfits, which has its own verdict."""
    return None if _overfits(facts) is not None else _cause(facts, ENCODER)


def _cause(facts: Facts, verdict: str) -> Judgement | None:
    """Name the cause of a gap that is not small: the encoder, the family, or both without separation."""
    if facts.small:
        return None
    gap, low, high = median(facts.gap)
    tail = float(np.mean(facts.low > LARGE_GAP))
    large = f"{tail:.0%} of {facts.gap.size} data above {LARGE_GAP:.0f} nat"
    whole = f"the median gap is {_interval((gap, low, high))}, {large}"
    rule = f"the gap not small (median above {SMALL_GAP} nats, or above {LARGE_GAP:.0f} nat at {FEW:.0%} of the data)"
    amortization, approximation = facts.part("gap_amortization"), facts.part("gap_approximation")
    rows = np.isfinite(amortization) & np.isfinite(approximation)
    if rows.any() == (verdict == GUIDE):
        return None
    if verdict == GUIDE:
        said = f"{whole}; {_not_refitted(facts)}, so family and encoder cannot be told apart"
        advice = f"Train it longer with a wider encoder and see whether that was it; {facts.cures.try_encoder}."
        return Judgement(GUIDE, gap, low, high, "nats", said, rule, advice)
    if np.median(facts.low) <= SMALL_GAP:  # only the tail is large: look for the tail's cause
        rows &= facts.low > LARGE_GAP
    of_encoder, of_family = median(amortization[rows]), median(approximation[rows])
    mine, part = (of_encoder, "amortization") if verdict == ENCODER else (of_family, "approximation")
    if not mine[0] >= CAUSE * (max(of_encoder[0], 0) + max(of_family[0], 0)):
        return None
    if verdict == ENCODER and facts.table.attrs.get("amortization") == "none":
        said = (
            f"{whole}; the guide has no encoder (amortization: none by construction), and the parameters of a datum end "
            f"{_interval(mine)} short of its own family's best"
        )
        advice = (
            f"Train these parameters until the ELBO stands still, with a smaller step at the end: up to {mine[0]:.3g} nats per "
            "datum with the same p(x)."
        )
    elif verdict == ENCODER:
        said = f"{whole}; the encoder misses {_interval(mine)} of its own family's best (amortization)"
        advice = (
            f"A wider encoder, trained longer and on data drawn from the model too, can gain up to {mine[0]:.3g} nats per "
            f"datum with the same p(x); {facts.cures.try_encoder}."
        )
    else:
        said = f"{whole}; the best member of the family is {_interval(mine)} short of log p(x) (approximation)"
        advice = _richer(facts, rows)
    return Judgement(verdict, *mine, "nats", said, f"{rule}, and {CAUSE:.0%} of it or more is {part}", advice)


def _interval(values: tuple[float, float, float]) -> str:
    return f"{values[0]:.3g} nats [{values[1]:.3g}, {values[2]:.3g}]"


def _not_refitted(facts: Facts) -> str:
    """Explain why there is no best member of the guide's family."""
    if "elbo_refit_full" in facts.table and np.isfinite(facts.part("elbo_refit_full")).any():
        return "the guide is no normal and was not refitted (it offers no variational_parameters, or time was short)"
    if "total_variation" in facts.table and np.isfinite(facts.table["total_variation"].values).any():
        return "all latents are discrete, for which no family is refitted"
    return "its family was not refitted"


def _richer(facts: Facts, rows: np.ndarray) -> str:
    """Name the family that would close the approximation gap, and by how much, from the refits."""
    covariance, shape = median(facts.part("gap_covariance")[rows]), median(facts.part("gap_shape")[rows])
    if math.isnan(covariance[0]):  # the guide is not normal
        gain = f"{facts.cures.richer} can gain up to {_interval(median(facts.part('gap_approximation')[rows]))} per datum"
        return f"{gain}; the best normal is {shape[0]:.3g} nats short of log p(x)."
    if covariance[0] >= HALF * (max(covariance[0], 0) + max(shape[0], 0)) and covariance[0] > 0:
        gain = f"{facts.cures.covariance} can gain {_interval(covariance)} per datum, by the refit"
        return f"{gain}; what is left, {max(shape[0], 0):.3g} nats, takes a flow; {facts.cures.try_family}."
    rest = f" (a full covariance alone would gain {covariance[0]:.3g})" if covariance[0] > 0 else ""
    return f"{facts.cures.shape} can gain up to {_interval(shape)} per datum{rest}; {facts.cures.try_family}."


def _sound(facts: Facts) -> Judgement:
    gap, low, high = median(facts.gap)
    return Judgement(
        SOUND,
        gap,
        low,
        high,
        "nats",
        f"the median gap is {gap:.3g} nats [{low:.3g}, {high:.3g}] over {facts.gap.size} certified data, and no rule that "
        "could be applied finds a fault",
        f"no other verdict holds; median gap at most {SMALL_GAP} nats",
        _distance(facts),
    )


def _distance(facts: Facts) -> str:
    """Describe the remaining distance of q(z|x) from the certified posterior where the gap is small."""
    reference = best_reference(facts.table)
    rows = facts.known & trusted(facts.table, reference)
    if reference is None or "mean_error" not in facts.table or not rows.any():
        return "How far means and sds are off is not known: no certified posterior stands beside q(z|x)."
    part = facts.table.sel(reference=reference)
    mean, ratio = (np.asarray(part[name].values, dtype=float)[rows] for name in ("mean_error", "sd_ratio"))
    draws = facts.cures.draws.format(reference=reference)
    end = f"where that matters, use the corrected posterior, {draws}; elsewhere q(z|x) may be used as it is."
    if not np.isfinite(mean).any():  # discrete latents, without mean and width
        most, middle = _at_most(np.asarray(part["total_variation"].values, dtype=float)[rows])
        return (
            f"At {1 - FEW:.0%} of the data q(z|x) puts at most {most:.2g} of its probability on other values than the "
            f"posterior (median {middle:.2g}): {end}"
        )
    (most, middle), (widest, factor) = _at_most(mean), _at_most(np.exp(np.abs(np.log(ratio))))
    return (
        f"At {1 - FEW:.0%} of the data the means of q(z|x) are off by at most {most:.2g} posterior sd and its sds by a factor "
        f"of at most {widest:.3g} (medians: {middle:.2g} sd, a factor of {factor:.3g}), each in the datum's worst latent: {end}"
    )


def _at_most(values: np.ndarray) -> tuple[float, float]:
    """Return the 95 % quantile of the values (of few, the largest), and their median."""
    values = values[np.isfinite(values)]
    return float(np.quantile(values, 1 - FEW, method="higher")), float(np.median(values))


RULES: dict[str, Callable[[Facts], Judgement | None]] = {
    UNTRUSTED: _untrusted,
    MODE_MISSED: _mode_missed,
    COLLAPSED: _collapsed,
    MISFIT: _misfit,
    OVERFITS: _overfits,
    ENCODER: _encoder,
    FAMILY: lambda facts: _cause(facts, FAMILY),
    GUIDE: lambda facts: _cause(facts, GUIDE),
}
"""All verdicts but `sound`, in the order in which they are listed."""
