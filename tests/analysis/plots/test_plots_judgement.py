"""Figures of the diagnosis: what is drawn and said for sound and for faulty cases, from small trees and from a real one."""

from __future__ import annotations

import re

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from matplotlib import pyplot
from support.report.run_folder import INJECTION, Page, write_run
from support.report.trees import MISFIT, MISSED, SPLITS, contains, criticism, gaps, latents, pit, predictions, saved, sbc, whole

import elbowroom as er
from elbowroom.analysis.latents.information import VARIABLES as OF_INFORMATION
from elbowroom.analysis.measures.tabulate import VARIABLES
from elbowroom.analysis.plots.report import calibration as plots_calibration
from elbowroom.analysis.plots.report import criticism as plots_checks
from elbowroom.analysis.plots.report import gaps as plots_gaps
from elbowroom.analysis.plots.report import information as plots_information
from elbowroom.analysis.plots.report import predictive as plots_predictive
from elbowroom.analysis.plots.style import Absent, Plot
from elbowroom.analysis.report import diagnosis
from elbowroom.analysis.report.report import Files, draw, write_report
from elbowroom.analysis.verdict import judgement, rules
from elbowroom.analysis.verdict.summary import sentences, summary
from elbowroom.analysis.verdict.thresholds import MISFIT as thresholds_MISFIT

# -- calibration ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("regime", ["simulated", "observed"])
def test_a_calibrated_guide_is_said_to_be_one(regime):
    plot = saved(plots_calibration.calibration(sbc(regime), regime))
    assert plot.name == f"calibration_{regime}"
    assert "None of 4 quantities is off" in plot.caption
    assert "cannot be told from the posterior" in plot.caption
    assert "within three standard errors" in plot.caption
    assert "little" not in plot.caption
    assert ("z-scores" in plot.caption) == (regime == "simulated")
    assert ("3 data without a certified posterior are left out" in plot.caption) == (regime == "observed")
    assert len(plot.figure.axes) == (3 if regime == "simulated" else 2)


def test_a_fault_is_named_with_effect_and_direction():
    found = sbc("simulated", narrow=0.6)
    plot = saved(plots_calibration.calibration(found, "simulated"))
    assert "2 of 4 quantities are off" in plot.caption
    assert re.search(r"z\[0\] too narrow \(by 0\.\d+\)", plot.caption)
    assert "the guide is too narrow" in plot.caption
    legend = [text.get_text() for text in plot.figure.axes[0].get_legend().get_texts()]
    assert sum("too narrow" in text for text in legend) == 2
    assert "2 within" in legend
    shifted = saved(plots_calibration.calibration(sbc("observed", shift=0.8), "observed"))
    assert "shifted up" in shifted.caption or "shifted down" in shifted.caption
    wide = saved(plots_calibration.calibration(sbc("simulated", narrow=1.6), "simulated"))
    assert "too wide" in wide.caption


def test_many_faults_and_many_latents_are_counted():
    plot = saved(plots_calibration.calibration(sbc("simulated", narrow=0.5, d=10), "simulated"))
    legend = [text.get_text() for text in plot.figure.axes[0].get_legend().get_texts()]
    assert "4 more that fail" in legend
    assert plot.caption.count("too narrow (by") == 10
    assert plot.figure.axes[1].get_title(loc="left") == "coverage, the 6 latents farthest off"


def test_no_figure_mixes_the_regimes():
    """Among all figures of a report the ECDFs of a regime are drawn in its own one alone; a swap is refused."""
    tree = whole()
    plots = [item for item in diagnosis.draw(gaps(), tree, audited="test") if isinstance(item, Plot)]
    for group, name in (("prior_sbc", "calibration_simulated"), ("posterior_sbc", "calibration_observed")):
        found = tree[group].to_dataset()
        for ecdf in found["ecdf"].values:
            assert {plot.name for plot in plots if contains(plot, ecdf - found["point"].values)} == {name}
    with pytest.raises(ValueError, match="regime"):
        plots_calibration.calibration(sbc("observed"), "simulated")
    for plot in plots:
        if plot.name == "calibration_simulated":
            assert "real" not in plot.figure.get_suptitle()
        if plot.name == "calibration_observed":
            assert "simulated" not in plot.figure.get_suptitle() + plot.caption


def test_a_small_effect_is_called_small():
    found = sbc("simulated", n=2000, narrow=0.93, seed=3)
    assert found["p_holm"].min() < 0.05
    assert found["effect"].max() < 0.05
    assert "clear but little" in saved(plots_calibration.calibration(found, "simulated")).caption
    assert "little" not in saved(plots_calibration.calibration(sbc("simulated", narrow=0.6), "simulated")).caption


def test_discrete_latents_have_no_coverage():
    found = sbc("simulated").drop_vars(["coverage", "coverage_se", "z_score", "contraction"])
    plot = saved(plots_calibration.calibration(found, "simulated"))
    assert len(plot.figure.axes) == 1
    assert "nominal" not in plot.caption


# -- gaps -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"encoder": 0.5}, "the encoder is to be mended"),
        ({"covariance": 0.5}, "a family with full covariance would gain most"),
        ({"shape": 0.5}, "a flow or a mixture may"),
        ({"encoder": 0.5, "covariance": 0.4}, "encoder and family both count"),
        ({"shape": 0.5, "told": False}, "family and encoder cannot be told apart"),
        ({"encoder": 0.02}, "little is to be gained"),
    ],
)
def test_the_largest_part_of_the_gap_is_named(options, words):
    plot = saved(plots_gaps.parts({"test": gaps(**options)}))
    assert words in plot.caption
    assert len(plot.figure.axes) == (2 if options.get("told") is False else 4)


def test_splits_are_side_by_side_and_medians_stand_where_they_are():
    tables = {name: gaps(encoder=value) for name, value in zip(SPLITS, (0.5, 0.1, 0.5, 0.9), strict=True)}
    plot = saved(plots_gaps.parts(tables))
    first = plot.figure.axes[0]
    assert [label.get_text() for label in first.get_yticklabels()] == [
        "test (40)",
        "training (40)",
        "validation (40)",
        "simulated (40)",
    ]
    dots = [float(line.get_xdata()[0]) for line in first.lines if line.get_marker() == "o"]
    assert dots == pytest.approx([0.5, 0.1, 0.5, 0.9])
    assert "the encoder knows its training data better" in plot.caption
    assert "On validation data it is 0.51 nats [0.49, 0.53], no clear difference" in plot.caption
    assert "the encoder has not learnt all that the model makes" in plot.caption


def test_bounds_are_counted_and_never_drawn():
    """Bounds of 5 nats lie far to the right of all that is drawn."""
    plot = saved(plots_gaps.parts({"test": gaps(encoder=0.5, bounds=7), "train": gaps(bounds=39)}))
    assert "7 data of 40 (test) are not drawn: only bounds on log p(x)" in plot.caption
    assert "39 data of 40 (training) are not drawn" in plot.caption
    for axes in plot.figure.axes:
        ends = [end for collection in axes.collections for path in collection.get_paths() for end in path.vertices[:, 0]]
        assert max(ends) < 1
        assert axes.get_xlim()[1] < 1
    nothing = plots_gaps.parts({"test": gaps(bounds=40)})
    assert isinstance(nothing, Absent)
    assert "for none of the data" in nothing.reason


def test_a_negative_part_is_called_error():
    assert "The negative shape is error" in saved(plots_gaps.parts({"test": gaps(encoder=0.5, shape=-0.02)})).caption


# -- information ------------------------------------------------------------------------------------------------------------


def test_used_collapsed_and_ignored_latents_are_told_apart():
    sound = saved(plots_information.information(latents([2.0, 1.0])))
    assert "None of 2 latents is collapsed or ignored; 2 are active" in sound.caption
    assert [text.get_text() for text in sound.figure.axes[-1].texts] == [
        "mean rate 3.00",
        "I(x; z) from 2.40 to 2.50",
        "log 100",
    ]
    assert "collapsed:" not in str([text.get_text() for legend in sound.figure.legends for text in legend.get_texts()])
    sick = saved(plots_information.information(latents([2.0, 0.0, 0.001, 1.0], collapsed=[1], ignored=[2])))
    assert "1 of 4 latents is collapsed (z[1])" in sick.caption
    assert "ignored by the guide (z[2]): the encoder is at fault" in sick.caption
    legend = {text.get_text() for legend in sick.figure.legends for text in legend.get_texts()}
    assert legend == {"used: 2", "ignored by the guide: 1", "collapsed: 1"}
    assert [label.get_text() for label in sick.figure.axes[0].get_yticklabels()] == ["z[0]", "z[3]", "z[2]", "z[1]"]
    assert sick.figure.axes[0].get_xscale() == "log"


def test_the_information_is_an_interval_that_the_number_of_data_limits():
    assert "log 100 = 4.61 can be shown" in saved(plots_information.information(latents([3.0, 3.0], lower=4.5))).caption
    assert "can be shown" not in saved(plots_information.information(latents([1.0, 1.0]))).caption
    assert "differs from the prior (p = 0.0010)" in (
        saved(plots_information.information(latents([1.0]).assign(aggregate_p_value=0.001))).caption
    )


def test_sixty_latents_and_none():
    plot = saved(plots_information.information(latents(np.geomspace(1e-5, 1, 60), collapsed=range(20))))
    assert "20 of 60 latents are collapsed (z[0], z[1]" in plot.caption
    assert "and 12 more" in plot.caption
    whole_only = latents([1.0])
    bare = whole_only.drop_dims("coordinate")
    assert len(saved(plots_information.information(bare)).figure.axes) == 1


# -- checks, PIT, predictive ------------------------------------------------------------------------------------------------


def test_checks_fail_by_the_rule_of_the_verdict():
    found = criticism([0.1, 9.0, 4.0, 5.0], [0.9, 0.0025, 0.005, 0.2], [0.01, 0.4, 0.05, 0.4])
    plot = saved(plots_checks.checks(found))
    bad, slight = plots_checks.failing(found)
    assert bad.tolist() == [False, True, False, False]
    assert slight.tolist() == [False, False, True, False]
    assert "1 of 4 checks fail: check 1 <b>of entries</b> (effect +40%, p = 0.0025)" in plot.caption
    texts = [text.get_text() for text in plot.figure.axes[0].texts]
    assert texts[1] == "p 0.0025   effect +40%"
    points = {label: c for c in plot.figure.axes[0].collections if (label := c.get_label()).startswith("fails")}
    (failed,) = points.values()
    np.testing.assert_allclose(failed.get_offsets(), [[9.0, 1.0]], rtol=1e-6)
    (misfit,) = [one for one in rules.judge(gaps(), {"checks": found}) if one.verdict == thresholds_MISFIT]
    assert "1 of 4 checks fail" in misfit.rests_on


def test_effects_are_ordered_by_what_matters_to_their_own_limits():
    found = criticism([9.0, 9.0], [0.001, 0.001], [1.5, 0.2], ["kurtosis", "difference"])
    caption = saved(plots_checks.checks(found)).caption
    assert caption.index("check 1") < caption.index("check 0")  # 0.2 is four times its limit, 1.5 half as much again
    assert "from these sizes on: 0.05 of probabilities or correlations, 1 of kurtosis." in caption


def test_sound_and_slight_checks():
    sound = saved(plots_checks.checks(criticism([0.1, -1.0], [0.9, 0.4], [0.01, -0.02])))
    assert "None of 2 checks fails, the smallest p-value is 0.4" in sound.caption
    slight = saved(plots_checks.checks(criticism([60.0, -1.0], [0.005, 0.4], [0.01, -0.02], ["difference"] * 2)))
    assert "1 deviate more than chance allows, by less than matters" in slight.caption
    assert slight.figure.axes[0].get_xscale() == "symlog"
    none = plots_checks.checks(xr.Dataset(attrs={"joint": "not available: fewer than 10 data", "residual": ""}))
    assert none == Absent("checks", "No checks of the model, not available: fewer than 10 data.")


def test_pit_of_entries_and_columns():
    assert "stays within its 95% band" in saved(plots_checks.pit({"pit": pit(0.01)})).caption
    assert "leaves its band by less than matters" in saved(plots_checks.pit({"pit": pit(0.03)})).caption
    plot = saved(plots_checks.pit({"pit_a": pit(0.2, low=5), "pit_b": pit(0.01, columns=1)}))
    assert "a: The PIT of all entries leaves its band (largest difference 0.20)" in plot.caption
    assert "5 of 12 columns (42%)" in plot.caption
    assert len(plot.figure.axes) == 4


@pytest.mark.parametrize("options", [{}, {"d": 1}, {"counts": False}, {"counts": False, "holes": True}])
def test_predictive_distributions_beside_the_data(options):
    same = saved(plots_predictive.predictive(predictions(**options)))
    assert "Data drawn from the prior are like the real ones" in same.caption
    other = saved(plots_predictive.predictive(predictions(shift=3.0, **options)))
    assert "by the prior predictive, which is above the data by" in other.caption
    assert "speaks against the model" in other.caption


# -- the report -------------------------------------------------------------------------------------------------------------


def test_numbers_of_verdicts_have_interval_and_units():
    assert diagnosis.number(MISSED) == "25% [20%, 30%] of the data"
    assert diagnosis.number(MISFIT) == "effect +0.3"
    assert diagnosis.number(judgement.Judgement("", 0.158, 0.1154, 0.1844, "nats", "", "", "")) == "0.158 [0.115, 0.184] nats"
    assert diagnosis.number(judgement.Judgement("", 1.0, np.nan, np.nan, "latents", "", "", "")) == "1 latent"


@pytest.mark.usefixtures("no_figures")
def test_the_verdicts_stand_first_and_everything_is_escaped(tmp_path):
    folder = write_run(tmp_path / "run", n=12, event=(6,), labels=False)
    whole(missing="validation: the budget ended before it").to_netcdf(folder / "diagnosis.nc", engine="h5netcdf")
    text = write_report(folder).read_text("utf-8")
    assert "<script" not in text
    assert "<b>of entries" not in text
    page = Page(text)
    assert INJECTION in page.text
    order = ["mode missed", "25% [20%, 30%] of the data", "model misfit", "Try another likelihood.", "First sentence.", "ELBO"]
    places = [page.text.index(words) for words in order]
    assert places == sorted(places)
    assert "Not known: gaps of validation data (the budget ended before it)." in page.text
    shown = {path.stem for path in (folder / "figures").iterdir()}
    assert {"parts", "calibration_simulated", "calibration_observed", "information", "checks", "pit", "predictive"} <= shown


@pytest.mark.usefixtures("no_figures")
@pytest.mark.slow
def test_absent_groups_and_an_absent_diagnosis_cost_a_sentence(tmp_path):
    folder = write_run(tmp_path / "run", n=12, event=(6,), labels=False)
    assert diagnosis.missing(None)[0].startswith("Judged by the gaps alone")
    parts, *others = diagnosis.draw(gaps(), None, audited="test")
    assert isinstance(parts, Plot)
    assert [isinstance(item, Absent) and "the run folder has no diagnosis.nc" in item.reason for item in others] == 6 * [True]
    left_out = ("prior_sbc", "checks", "pit", "predictive", "information")
    missing = "prior_sbc: the model cannot be simulated\nchecks: no reference certified any datum"
    whole(missing=missing, leave_out=left_out).to_netcdf(folder / "diagnosis.nc", engine="h5netcdf")
    page = Page(write_report(folder).read_text("utf-8")).text
    assert "No figure of calibration on simulated data: the model cannot be simulated." in page
    assert "No figure of PIT of the data given z: no reference certified any datum." in page
    assert "No figure of what the latents carry: diagnosis.nc has no information." in page
    shown = {path.stem for path in (folder / "figures").iterdir()}
    assert "calibration_observed" in shown
    assert shown.isdisjoint({"calibration_simulated", "checks", "pit", "predictive", "information"})


def test_every_split_is_drawn_by_the_same_parts():
    """A family that is no normal has no covariance part; where another split was not refitted either, its shape is no panel."""
    audited, other = gaps(encoder=2.0, covariance=1.0), gaps(n=7, encoder=4.0, told=False)
    audited["gap_covariance"] = audited["gap_covariance"] * np.nan
    other["gap_approximation"] = other["gap_approximation"] * np.nan
    plot = saved(plots_gaps.parts({"test": audited, "simulated": other}))
    titles = [axes.get_title(loc="left").partition("\n")[0] for axes in plot.figure.axes]
    assert titles == ["amortization", "approximation", "total"]


def test_a_gap_whose_parts_are_known_is_not_said_to_be_untold():
    from elbowroom.analysis.report.conclusions import conclusions

    names = ("evidence_method", "obs_id")
    table = gaps(encoder=0.5).assign(evidence_method=(names[1], np.full(40, "grid")))
    table = table.assign({name: (("obs_id", "reference"), np.full((40, 1), 0.9)) for name in ("mean_error", "sd_ratio")})
    may, may_not = conclusions(table)
    assert any("the encoder misses 0.5" in line for line in may)
    assert not any("to blame" in line for line in may_not)
    may, may_not = conclusions(table.drop_vars(["gap_amortization", "gap_covariance"]))
    assert any("to blame" in line for line in may_not)
    assert not any("What makes the gap" in line for line in may)


# -- a real one -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def audited(tmp_path_factory):
    """A plain Pyro pair with a guide that is too wide, audited with diagnosis and reported."""
    from elbowroom.analysis.audit import auditor as auditing
    from elbowroom.analysis.audit.diagnosis import diagnose

    def model(y):
        with pyro.plate("rows", len(y)):
            rate = pyro.sample("rate", dist.Gamma(2.0, 0.5))
            pyro.sample("y", dist.Poisson(rate), obs=y)

    def wide(y):
        with pyro.plate("rows", len(y)):
            pyro.sample("rate", dist.LogNormal((y + 2).log() - 0.6, 1.0))

    with torch.random.fork_rng(), pytest.MonkeyPatch.context() as patch:
        torch.manual_seed(1)
        y = dist.Poisson(dist.Gamma(2.0, 0.5).sample((40,))).sample()
        patch.setattr(auditing, "find_out", diagnose)
        audit = er.audit(model, wide, y)
    folder = tmp_path_factory.mktemp("runs") / "poisson"
    audit.save(folder)
    return folder, Page(write_report(folder).read_text("utf-8"))


@pytest.mark.slow
def test_a_real_diagnosis_is_drawn_and_says_what_is_wrong(audited):
    folder, page = audited
    drawn = draw(Files.read(folder))
    names = {name for name, item in drawn.items() if isinstance(item, Plot)}
    assert {"parts", "calibration_simulated", "calibration_observed", "information", "checks", "pit", "predictive"} <= names
    assert "too wide" in drawn["calibration_simulated"].caption
    assert "None of" in drawn["checks"].caption
    assert "the encoder is to be mended" in drawn["parts"].caption
    assert page.text.index("encoder falls short") < page.text.index("ELBO")


def test_arviz_draws_the_same_ranks(audited):
    """As docs/numbers.md says."""
    import arviz_plots

    tree = xr.open_datatree(audited[0] / "diagnosis.nc", engine="h5netcdf")
    drawn = arviz_plots.plot_ecdf_pit(
        tree, var_names="pit", group="prior_sbc", sample_dims=["simulation"], stats={"ecdf_pit": {"n_simulations": 50}}
    )
    panels = [axes for axes in drawn.viz["figure"].item().axes if axes.lines]
    assert len(panels) == tree["prior_sbc"].sizes["quantity"]
    pyplot.close("all")


# -- bounds -----------------------------------------------------------------------------------------------------------------


def bounded(folder, known: int):
    """A run for whose data beyond the first `known` nothing but bounds is known, and what a user sees of it."""
    write_run(folder, n=12, event=(6,), labels=False, known=known, references=known > 0)
    tree = whole()
    tree["train"] = xr.DataTree(gaps(bounds=40))
    tree.to_netcdf(folder / "diagnosis.nc", engine="h5netcdf")
    page = Page(write_report(folder).read_text("utf-8"))  # with all captions, and the reasons of what is absent
    audit = Files.read(folder).audit
    table = audit.assign(total_variation=audit["elbo"].expand_dims(reference=audit["reference"]) * np.nan)
    terminal = [f"{name}: {value}" for name, value in summary(table)] + sentences(table)
    return audit, page.text, [*(image["alt"] for image in page.images), *terminal]


CALLED = re.compile(
    r"bound|≥|not known|is known|unknown|no known|not drawn|KL\(|none of|conditional|log p\(x\|z\)|log p\(x, z\)"
)


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("known", [pytest.param(0, marks=pytest.mark.slow), 5])
def test_no_bound_is_called_log_p_anywhere_a_user_looks(tmp_path, known):
    """Wherever a number of a bound is printed it is called one; a sentence that says log p(x) says no value of it."""
    table, page, texts = bounded(tmp_path / "run", known)
    rows = slice(known, None)
    from elbowroom.analysis.plots.style import say

    numbers = {say(float(value), 4) for value in table["log_evidence_lower"].values[rows]}
    values = {say(float(value), 4) for value in table["log_evidence"].values[:known]}
    found = 0
    for number in numbers - values:
        for match in re.finditer(rf"(?<![\d.]){re.escape(number)}(?![\d])", page):
            around = page[max(0, match.start() - 40) : match.end() + 30]
            assert "bound" in around or "ELBO" in around or "±" in page[match.end() : match.end() + 3], around
            found += "bound" in around
    assert found >= min(10, 12 - known) - 5  # the table of the worst shows ten data
    if known:
        return
    for sentence in re.split(r"(?<=[.;])\s", " ".join([page, *texts])):
        if "log p(x)" in sentence:
            assert CALLED.search(sentence) or "log p(x) −" in sentence or "held-out log p(x)" in sentence, sentence
    shown = dict(line.split(": ", 1) for line in texts if line.startswith("mean log p(x)"))
    assert shown == {"mean log p(x) [nats], 0 data": "not available"}


def test_descriptions_of_bounds_say_so():
    """In the columns of the audit and of what the latents carry."""
    for name, (_, text) in (VARIABLES | OF_INFORMATION).items():
        if re.search(r"(evidence|information|aggregate_kl)_(lower|upper)$|^bound_(lower|upper)$", name):
            assert "bound" in text, name
        elif re.search(r"log p\(x\)", text):
            assert name.startswith(("log_evidence", "gap_", "refinement", "elbo")), name
