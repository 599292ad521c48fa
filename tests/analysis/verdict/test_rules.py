"""The verdicts: which numbers lead to which words, and that the table in the text is the one in the code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from support.cases.tables import UNKNOWN, N, table

from elbowroom.analysis.verdict import judgement, rules
from elbowroom.analysis.verdict import remedies as cures
from elbowroom.analysis.verdict import summary as verdict
from elbowroom.analysis.verdict.judgement import from_dataset
from elbowroom.analysis.verdict.rules import judge, per_datum
from elbowroom.analysis.verdict.thresholds import EFFECTS, MEASURED, SOUND, median


def words(*args: Any) -> list[str]:
    return [one.verdict for one in judge(*args)]


def test_every_verdict_stands_in_the_table_of_the_text_in_its_order() -> None:
    named = re.findall(r"^\| `(.*?)`", rules.__doc__ or "", flags=re.M)
    assert named == [*rules.RULES, SOUND]


def test_no_gap_is_sound() -> None:
    (found,) = judge(table())
    assert found.verdict == "sound"
    assert found.low <= found.number <= found.high < 0.1
    assert set(per_datum(table())) == {"sound"}


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"gap_amortization": 0.5}, ["encoder falls short"]),
        ({"gap_covariance": 0.5}, ["family too small"]),
        ({"gap_shape": 0.5}, ["family too small"]),
        ({"gap_shape": 0.5, "gap_amortization": 0.4}, ["family too small", "encoder falls short"]),
        ({"gap_shape": 0.4, "gap_amortization": 0.5}, ["encoder falls short", "family too small"]),
        ({"gap_amortization": np.where(np.arange(N) < 4, 3.0, 0.01)}, ["encoder falls short"]),  # 10 % far off
        ({"gap_amortization": np.where(np.arange(N) < 1, 3.0, 0.01)}, ["sound"]),  # one of forty
        ({**UNKNOWN, "gap_total": [0.5] * N}, ["guide falls short"]),
        ({"missed_mass": np.where(np.arange(N) < 2, 0.4, 0.0)}, ["mode missed"]),
        ({"missed_mass": np.where(np.arange(N) < 1, 0.4, 0.0)}, ["sound"]),
        ({"gap_total": np.where(np.arange(N) < 1, -0.5, 0.0)}, ["reference not trustworthy"]),
    ],
)  # fmt: skip
def test_numbers_and_words(columns: dict[str, Any], expected: list[str]) -> None:
    assert words(table(**columns)) == expected


def test_only_certified_data_count() -> None:
    """The uncertified half has a large gap; it must not be blamed, nor counted as known."""
    first = np.arange(N) < N // 2 - 1
    half = table(gap_amortization=np.where(first, 5.0, 0.0), status=np.where(first, "uncertified", "exact"))
    assert words(half) == ["sound"]
    assert set(per_datum(half)[first]) == {"reference not trustworthy"}
    few = table(gap_amortization=np.where(~first, 0.5, 0.0), status=np.where(first, "exact", "uncertified"))
    found = judge(few)
    assert [one.verdict for one in found] == ["reference not trustworthy"]
    assert found[0].number == pytest.approx(first.mean())
    none = table(status="uncertified")
    assert words(none) == ["reference not trustworthy"]


def test_a_gap_within_its_errors_is_not_blamed() -> None:
    assert words(table(gap_amortization=0.15, elbo_se=0.05)) == ["sound"]
    assert words(table(gap_amortization=0.15, elbo_se=0.01)) == ["encoder falls short"]


def test_overfitting_takes_the_training_data() -> None:
    here = table(gap_amortization=0.6)
    assert words(here, {"train": table(gap_amortization=0.05)}) == ["encoder overfits"]
    assert words(here, {"train": table(gap_amortization=0.55)}) == ["encoder falls short"]
    assert words(table(gap_amortization=0.6, gap_shape=0.8), {"train": table(gap_amortization=0.05, gap_shape=0.8)}) == [
        "encoder overfits",
        "family too small",
    ]


def test_collapse_and_misfit_are_read_off_their_datasets() -> None:
    information = xr.Dataset({"collapsed": ("coordinate", [False, True])}, coords={"coordinate": ["z[0]", "z[1]"]})
    (found,) = judge(table(), {"information": information})
    assert found.verdict == "latents collapsed"
    assert "z[1]" in found.rests_on
    names = ["residual PIT", "dispersion"]

    def checks(p: list[float], effect: list[float]) -> dict[str, xr.Dataset]:
        columns = {"p_adjusted": p, "effect": effect, "words": names, "effect_kind": ["difference", "relative"]}
        return {"checks": xr.Dataset({name: ("statistic", values) for name, values in columns.items()})}

    assert words(table(), checks([0.001, 1.0], [0.08, 0.5])) == ["model misfit"]
    assert words(table(), checks([0.001, 0.001], [0.03, 0.05])) == ["sound"]  # significant, and too small to matter
    assert words(table(), checks([0.5, 0.02], [0.3, 0.9])) == ["sound"]  # large, and not significant
    assert words(table(), checks([1.0, 0.005], [0.0, -0.4])) == ["model misfit"]
    (found,) = judge(table(), checks([1.0, 0.005], [0.0, -0.4]))
    assert "dispersion, effect -40%" in found.rests_on
    assert found.rule.endswith("an effect above 10% in size (relative to the model's)")


@pytest.mark.parametrize(("kind", "limit"), EFFECTS.items())
def test_every_kind_of_effect_has_its_own_limit_and_words(kind: str, limit: float) -> None:
    for effect, expected in ((0.9 * limit, "sound"), (-1.1 * limit, "model misfit")):
        columns = {"p_adjusted": [0.001], "effect": [effect], "words": ["a statistic"], "effect_kind": [kind]}
        checks = xr.Dataset({name: ("statistic", values) for name, values in columns.items()})
        assert words(table(), {"checks": checks}) == [expected]
    assert f"`{kind}`" in (Path(__file__).parents[3] / "docs" / "numbers.md").read_text()
    assert MEASURED[kind]


def test_advice_names_the_family_and_its_gain() -> None:
    run = {cures.FITTED: "0"}
    (found,) = judge(table(gap_covariance=0.5, gap_shape=0.05).assign_attrs(run))
    assert "full_rank_normal can gain 0.5 nats" in found.advice
    (found,) = judge(table(gap_covariance=0.05, gap_shape=0.5).assign_attrs(run))
    assert "flow or mixture" in found.advice
    (found,) = judge(table(gap_covariance=0.5, gap_shape=0.05))
    assert "MultivariateNormal, its scale_tril from the encoder) can gain 0.5 nats" in found.advice


def test_only_the_advice_of_a_run_points_to_its_spec_and_commands() -> None:
    """Every verdict's advice, for a run and for a Pyro program: the same rules, other cures."""
    found = {"information": xr.Dataset({"collapsed": ("coordinate", [True])}, coords={"coordinate": ["z"]})}
    columns = {"p_adjusted": [0.001], "effect": [0.5], "words": ["ones"], "effect_kind": ["relative"]}
    found["checks"] = xr.Dataset({name: ("statistic", values) for name, values in columns.items()})
    first = np.arange(N) < N // 2 + 1
    cases = [
        (table(gap_amortization=0.6), {"train": table()}),
        (table(gap_amortization=0.6, gap_shape=0.6), found),
        (table(gap_amortization=0.6, gap_covariance=0.6), {}),
        (table(gap_total=[0.5] * N, **UNKNOWN), {}),
        (table(missed_mass=0.3), {}),
        (table(status=np.where(first, "uncertified", "exact")), {}),
        (table(), {}),
    ]
    spec = re.compile(r"elbowroom |guide\.|fit\.|audit\.references|--budget|posteriors/")
    seen = set()
    for one, beside in cases:
        plain, of_run = judge(one, beside), judge(one.assign_attrs({cures.FITTED: "0"}), beside)
        assert [(a.verdict, a.number, a.rests_on, a.rule) for a in plain] == [
            (a.verdict, a.number, a.rests_on, a.rule) for a in of_run
        ]
        for a, b in zip(plain, of_run, strict=True):
            assert not spec.search(a.advice), a.advice
            assert b.verdict == SOUND or spec.search(b.advice), b.advice
            assert not re.search(r"[{}]", a.advice)
        seen |= {a.verdict for a in plain}
    assert seen == {*rules.RULES, SOUND}


def test_sound_says_how_far_means_and_sds_are_off() -> None:
    """A gap of .09 nats can be an sd ratio of .72: KL of one latent = log(1/r) + r^2/2 - 1/2."""
    ratio = np.where(np.arange(N) < 6, 0.72, 1.1)
    mean = np.linspace(0, 0.39, N)
    beside = {"mean_error": (("obs_id", "reference"), mean[:, None]), "sd_ratio": (("obs_id", "reference"), ratio[:, None])}
    (found,) = judge(table(gap_amortization=0.09).assign(beside))
    assert found.verdict == "sound"
    assert "At 95% of the data the means of q(z|x) are off by at most 0.38 posterior sd" in found.advice
    assert "its sds by a factor of at most 1.39 (medians: 0.2 sd, a factor of 1.1)" in found.advice
    assert "use the corrected posterior, audit.posteriors['grid']" in found.advice
    discrete = {"mean_error": np.nan, "sd_ratio": np.nan, "total_variation": 0.04}
    beside = {name: (("obs_id", "reference"), np.full((N, 1), value)) for name, value in discrete.items()}
    (found,) = judge(table().assign(beside).assign_attrs({cures.FITTED: "0"}))
    assert "puts at most 0.04 of its probability on other values than the posterior (median 0.04)" in found.advice
    assert "posteriors/grid.nc" in found.advice
    assert "not known" in judge(table())[0].advice


def test_narrow_and_wide_do_not_cancel_in_the_sentence() -> None:
    def said(ratio: Any) -> str:
        values = {"sd_ratio": ratio, "mean_error": 0.1, "total_variation": np.nan}
        beside = {name: (("obs_id", "reference"), np.broadcast_to(value, (N, 1))) for name, value in values.items()}
        return verdict._shape(table().assign(beside))

    half = np.where(np.arange(N) % 2, 0.6, 1.0 / 0.6)[:, None]
    assert "here narrower and there wider (by a factor of 1.67)" in said(half)
    assert "about as wide as the true posterior (sd ratio 1.10)" in said(1.1)
    assert "too narrow (sd 0.60 of the true one)" in said(0.6)


def test_judgements_survive_a_file() -> None:
    found = judge(table(gap_shape=0.5, gap_amortization=0.4))
    again = from_dataset(judgement.as_dataset(found))
    assert again == found


def test_the_interval_of_the_median_covers() -> None:
    """Of an exponential sample, 95 % +- 3 binomial errors of 2,000; conservative for the smallest."""
    rng = np.random.default_rng(5)
    for n in (12, 40, 101):
        inside = 0
        for _ in range(2000):
            _, low, high = median(rng.exponential(size=n))
            inside += low <= np.log(2) <= high
        assert inside / 2000 > 0.95 - 3 * (0.95 * 0.05 / 2000) ** 0.5
        assert inside / 2000 < 0.99
