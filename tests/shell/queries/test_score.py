"""Scores: log p(x) is the closed form; p-values are valid, exactly; false discoveries are held; doubt is said."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from benchmarks.novelty import auroc
from support.cases.vaes import linear_vae, set_guide
from support.command import SPEC, call

import elbowroom as er
from elbowroom.analysis.plots.queries.novelty import screening as draw
from elbowroom.analysis.plots.style import Absent, Plot
from elbowroom.analysis.queries import novelty as screening
from elbowroom.analysis.queries.best_posterior import methods_for
from elbowroom.analysis.queries.novelty import ALONE, BELOW, INSIDE, LIMITED, adjusted, both_tails, high, judge, low, two_sided
from elbowroom.errors import UserError
from elbowroom.inference.references.grid.grid import Grid
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.inference.target.simulate import simulate
from elbowroom.queries.score.score import KINDS, scorer
from elbowroom.queries.stream import Chunk

CONFORMAL = {
    "low": low,
    "high": high,
    "two-sided": lambda v, x: two_sided(low(v, x), high(v, x)),
    "typicality": screening.typicality,
}


# -- p-values ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFORMAL)
@pytest.mark.parametrize(
    "values", [[0.0, 1.0, 3.0, 3.5, 9.0, 30.0, 31.0, 50.0, -7.0], [1.0, 1.0, 2.0, 2.0, 2.0, 5.0, 5.0, 9.0]]
)
def test_p_values_are_valid_over_all_deals_of_exchangeable_values(name: str, values: list[float]) -> None:
    """Each of the n + 1 is the new one equally often: P(p <= a) <= a is a count, with ties too."""
    deals = [(np.delete(values, i), np.array(values[i : i + 1])) for i in range(len(values))]
    p = np.array([CONFORMAL[name](v, x)[0] for v, x in deals])
    steps = np.arange(1, len(values) + 1) / len(values)
    assert all((p <= a + 1e-12).mean() <= a + 1e-12 for a in steps)
    if name != "two-sided" and len(set(values)) == len(values):
        assert np.sort(p) == pytest.approx(steps)  # and with equality: no level is given away
    if name == "two-sided" and len(set(values)) == len(values):
        assert np.sort(p) == pytest.approx(np.minimum(1, np.repeat(np.arange(1, 6) * 2, 2)[:9] / 9))


def test_values_that_are_not_known_keep_p_values_valid() -> None:
    v = np.array([1.0, 2.0, np.nan, 4.0])
    assert low(v, np.array([2.0, np.nan, 0.0])) == pytest.approx([4 / 5, np.nan, 2 / 5], nan_ok=True)
    assert high(v, np.array([2.0, 5.0])) == pytest.approx([4 / 5, 2 / 5])
    assert screening.typicality(v, np.array([7 / 3])) == pytest.approx([1.0])


def test_adjusted_is_the_procedure_of_benjamini_and_hochberg() -> None:
    p = np.array([0.001, 0.3, np.nan, 0.02, 0.04, 0.011])
    m, order = 5, np.sort(p[~np.isnan(p)])
    for q in (0.01, 0.05, 0.1):
        most = max((k for k in range(1, m + 1) if order[k - 1] <= q * k / m), default=0)
        assert int((adjusted(p) <= q).sum()) == most
    assert np.isnan(adjusted(p)[2])


@pytest.mark.parametrize("seed", [0])
def test_false_discoveries_are_held_and_the_rate_is_used(seed: int) -> None:
    """Of valid rows alone, whatever is flagged is false: P(any) is the rate. n + 1 is a multiple of what BH needs: no slack."""
    rng, any_low, any_two, shares, power = np.random.default_rng(seed), [], [], [], []
    for _ in range(1_000):
        v, x = rng.standard_normal(1_999), rng.standard_normal(20)
        any_low.append((adjusted(low(v, x)) <= 0.1).any())
        any_two.append((both_tails(low(v, x), high(v, x)) <= 0.1).any())
        x[:10] += np.where(np.arange(10) % 2, 4.0, -4.0)
        flags = both_tails(low(v, x), high(v, x)) <= 0.1
        shares.append(flags[10:].sum() / max(1, flags.sum()))
        power.append(flags[:10].mean())
    error = (0.1 * 0.9 / 1_000) ** 0.5
    assert abs(np.mean(any_low) - 0.1) < 4 * error
    assert abs(np.mean(any_two) - 0.1) < 4 * error
    assert np.mean(shares) < 0.1 * 10 / 20 + 4 * np.std(shares) / 1_000**0.5
    assert np.mean(power) > 0.8


def test_enough_rows_are_the_least_that_reach_the_level() -> None:
    for level in (0.05, 0.1, 0.2, 1 / 3, 0.01):
        n = screening.enough(level)
        assert 2 / (n + 1) <= level * (1 + 1e-9) < 2 / n


def test_auroc_is_the_share_of_pairs_and_its_error_that_of_repetition() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 5, 40).astype(float), rng.integers(1, 6, 30).astype(float)
    pairs = (b[:, None] > a).mean() + 0.5 * (b[:, None] == a).mean()
    assert auroc(a, b)[0] == pytest.approx(pairs)
    again = [auroc(rng.standard_normal(60), rng.standard_normal(40) + 1) for _ in range(400)]
    values, errors = np.array(again).T
    assert np.mean(errors) == pytest.approx(values.std(), rel=0.15)


# -- decisions -----------------------------------------------------------------------------------------------------------------


def scored(
    values: np.ndarray, *, width: float = 1e-6, pattern: np.ndarray | int = 0, bounds: np.ndarray | bool = False
) -> xr.Dataset:
    """Scores as `scorer` gives them: values known up to +- width, or lower bounds alone."""
    known = np.where(bounds, np.nan, values)
    columns = {
        "log_evidence": known,
        "log_evidence_lower": values - width,
        "log_evidence_upper": known + width,
        "pattern": np.broadcast_to(pattern, values.shape),
        **dict.fromkeys(("elbo", "distortion", "rate", "gap_total", "pareto_k"), values - 1.0),
    }
    return xr.Dataset({name: ("obs_id", column) for name, column in columns.items()})


def decide(rows: xr.Dataset, valid: xr.Dataset, band: tuple[float, float] = (2.5, 97.5)) -> dict[str, list[str]]:
    found = judge(rows, valid, None, band=band, fdr=0.1)
    return {str(rule): found["decision"].sel(rule=rule).values.tolist() for rule in found["rule"].values}


def test_the_left_tail_is_fooled_by_what_is_too_likely_and_two_sided_rules_are_not() -> None:
    valid = scored(np.random.default_rng(0).standard_normal(199))
    rules = decide(scored(np.array([-9.0, 0.0, 9.0])), valid)
    assert rules["low"] == ["below", "inside", "inside"]
    assert rules["fdr_low"] == ["below", "inside", "inside"]
    for rule in ("band", "two_sided", "fdr_two_sided"):
        assert rules[rule] == ["below", "inside", "above"]


def test_where_the_interval_changes_the_decision_no_decision_is_made() -> None:
    valid = scored(np.random.default_rng(0).standard_normal(199))
    edge = np.percentile(valid["log_evidence"], 2.5)
    for width, expected in ((1e-6, BELOW), (3.0, LIMITED)):
        rules = decide(scored(np.array([edge - 1.0]), width=width), valid)
        assert {rules[rule][0] for rule in ("band", "low", "two_sided")} == {expected}
    rules = decide(scored(np.array([0.0, -9.0, 9.0]), bounds=True), valid)  # from below: may be anything that is higher
    assert rules["low"] == [INSIDE, LIMITED, INSIDE]
    assert rules["band"] == [LIMITED, LIMITED, "above"]
    # an error of the calibration rows is no smaller a doubt
    assert decide(scored(np.array([edge - 1.0])), scored(valid["log_evidence"].values, width=3.0))["two_sided"] == [LIMITED]


def test_equal_rows_are_a_tie_whatever_their_rounding() -> None:
    """Five images of six bits: nearly all rows have the log p(x) of many others, up to rounding."""
    rng = np.random.default_rng(0)
    noisy = lambda n: (
        np.sort(rng.choice([-9.0, -3.0, -2.0, -1.0, 0.0], n, p=[0.02, 0.2, 0.4, 0.3, 0.08])) + 1e-12 * rng.standard_normal(n)
    )
    valid, rows = noisy(300), noisy(100)
    rules = decide(scored(rows, width=1e-12), scored(valid, width=1e-12))
    assert all(LIMITED not in decided for decided in rules.values())
    assert low(valid, rows) == pytest.approx(low(valid.round(), rows.round()))
    assert screening.typicality(valid, rows) == pytest.approx(screening.typicality(valid.round(), rows.round()))


def test_rows_are_compared_with_rows_that_have_the_same_holes() -> None:
    rng = np.random.default_rng(0)
    pattern = np.repeat([0, 7, 9], [100, 100, 10])
    valid = scored(rng.standard_normal(210) + np.where(pattern == 7, 50.0, 0.0), pattern=pattern)
    found = judge(
        scored(np.array([50.0, 50.0, 0.0, 0.0]), pattern=np.array([7, 0, 7, 9])), valid, None, band=(2.5, 97.5), fdr=0.1
    )
    assert found["decision"].sel(rule="two_sided").values.tolist() == [INSIDE, "above", "below", ALONE]
    assert found["compared_with"].values.tolist() == [100, 100, 100, 10]
    assert np.isnan(found["p_conformal"].values[3]).all()
    assert found["p_conformal"].sel(tail="low").values[2] == pytest.approx(1 / 101)


def test_against_rows_that_are_all_alike_nothing_is_so_many_sd_away() -> None:
    found = judge(scored(np.array([1.0, 2.0])), scored(np.ones(50)), None, band=(2.5, 97.5), fdr=0.1)
    assert np.isnan(found["typicality"]).all()
    assert found["p_conformal"].sel(tail="high").values.tolist() == pytest.approx([1.0, 1 / 51])


# -- the estimator -------------------------------------------------------------------------------------------------------------


def test_linear_gaussian_scores_are_closed_forms_and_p_values_uniform() -> None:
    vae, x, oracle = linear_vae(2, 5, n=400)
    set_guide(vae, oracle)
    joint = LogJoint(vae.model, vae.guide, x)
    compute = scorer(vae, methods_for(joint), draws=100, refit=False)
    of = lambda rows, seed: compute(Chunk(LogJoint(vae.model, vae.guide, rows), {"x": rows}, np.arange(len(rows)), seed))
    rows, valid = of(x[:200], 1), of(x[200:], 2)
    exact = oracle.log_evidence(x[:200]).numpy()
    assert set(rows["evidence_method"].values) == {"closed form"}
    assert np.abs(rows["log_evidence"].values - exact).max() < 1e-9
    assert "bits_per_dimension" not in rows  # a density is no code length
    gap = oracle.diagonal_gap().item()
    assert rows["gap_total"].values.mean() == pytest.approx(gap, abs=4 * float(rows["elbo_se"].mean()) / 200**0.5)
    made = scorer(vae, methods_for(joint), draws=100, simulated=True)(Chunk(joint, {"x": x}, np.arange(400), 3))
    again = simulate(joint, 4)[0]
    assert np.abs(made["log_evidence"].values - oracle.log_evidence(again.args[0]).numpy()).max() < 1e-9
    found = judge(rows, valid, made, band=(2.5, 97.5), fdr=0.1)
    for name, size in (("p_conformal", 200), ("p_model", 400)):
        p = np.sort(found[name].sel(tail="low").values)
        away = np.abs(p - np.arange(1, 201) / 201).max()
        assert away < 1.95 * (1 / 200 + 1 / size) ** 0.5, name  # Kolmogorov and Smirnov, two samples, p = 0.001


def test_the_amortization_gap_is_that_of_the_shifted_guide() -> None:
    vae, x, oracle = linear_vae(1, 4, n=8)
    set_guide(vae, oracle)
    with torch.no_grad():
        vae.posterior.encoder.body.bias[0] += 0.5
    joint = LogJoint(vae.model, vae.guide, x)
    found = scorer(vae, [], draws=100, refit=True)(Chunk(joint, {"x": x}, np.arange(8), 0))
    assert found["gap_amortization"].values == pytest.approx(np.full(8, 0.125 * oracle.precision.item()), rel=1e-6)


# -- from data to files --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on 300 rows of 6 bits, with holes in a third of them."""
    folder = tmp_path_factory.mktemp("score")
    rng = np.random.default_rng(0)
    x = (rng.random((300, 6)) < rng.random((300, 1))).astype(np.float32)
    x[::3, :2] = np.nan
    np.save(folder / "x.npy", x)
    spec = {**SPEC, "data": {"name": "file", "path": "x.npy", "split": [0.2, 0.5, 0.3]}}
    er.fit(er.Experiment.from_dict(spec, folder), out=folder / "run")
    return folder


@pytest.mark.slow
def test_scores_of_a_run_in_the_kind_of_array_that_was_asked_with(fitted: Path) -> None:
    run = er.Run.load(fitted / "run")
    rows = torch.tensor(
        [[0.0, 1, 0, 1, 0, 1], [1, 1, 1, 1, 1, 1], [torch.nan, torch.nan, 1, 1, 0, 0], [torch.nan, 0, 0, 0, 0, 0]]
    )
    answer = run.score(rows, simulated=50)
    value = answer["log_evidence"]
    assert isinstance(value, torch.Tensor)
    assert answer["bits_per_dimension"].tolist()[:2] == pytest.approx((-value[:2] / (6 * np.log(2))).tolist())
    assert answer["bits_per_dimension"][2:].isnan().all()
    assert answer["observed"].tolist() == [6, 6, 4, 5]
    assert answer["decision"][:, 2].tolist()[3] == ALONE
    assert answer["compared_with"].tolist()[3] == 0
    assert any("1 rows are not compared" in sentence for sentence in answer.said)
    kept = sorted(path.name for path in (fitted / "run" / "answers").iterdir())
    assert [name.partition("-")[0] for name in kept] == ["calibration", "simulated"]
    stamp = [(fitted / "run" / "answers" / name).stat().st_mtime_ns for name in kept]
    again = run.score(rows, simulated=50)
    assert again.dataset.identical(answer.dataset)
    assert [(fitted / "run" / "answers" / name).stat().st_mtime_ns for name in kept] == stamp  # not computed again
    run.score(rows, simulated=0, references=[Grid(tolerance=1e-3)])
    assert len(list((fitted / "run" / "answers").iterdir())) == 3  # other settings have scores of their own
    by_guide = run.score(rows, simulated=0, references=[])
    told = [sentence for sentence in by_guide.said if "a mode of p(z|x) that the encoder misses" in sentence]
    assert bool(told) == ("importance sampling estimate" in by_guide["evidence_method"])
    assert not any("encoder misses" in sentence for sentence in answer.said)
    by_count = run.score(rows, simulated=0, holes="count")
    assert by_count["compared_with"].tolist()[3] == 0
    assert set(KINDS) == {"pattern", "count"}
    assert isinstance(draw(answer.dataset), Plot)
    assert isinstance(draw(answer.dataset.isel(obs_id=[3])), Plot)  # no row can be compared: no p-values, no warning
    assert isinstance(draw(answer.dataset.assign(log_evidence=answer.dataset["log_evidence"] * np.nan)), Absent)


def test_bad_input_is_one_line(fitted: Path) -> None:
    run, x = er.Run.load(fitted / "run"), np.ones((2, 6), dtype=np.float32)
    for options, words in (
        ({"band": "5"}, "band: 5 is no band of percentiles; write it as 2.5-97.5"),
        ({"band": (97.5, 2.5)}, "is no band of percentiles"),
        ({"fdr": 0.0}, "fdr: 0 is no rate; use one between 0 and 1, such as 0.1"),
        ({"holes": "patern"}, "holes: unknown 'patern'"),
        ({"most": 0}, "most: 0 rows; use 1 or more"),
        ({"most": 30}, "30 calibration rows give two-sided p-values of 0.0645 at least, and the band leaves 0.05 outside"),
        ({"band": (0.1, 99.9)}, "which needs 999 rows; use a narrower --band, or more rows (--calibration)"),
    ):
        with pytest.raises(UserError) as error:
            run.score(x, **options)
        assert words in str(error.value)
        assert "\n" not in str(error.value)


def test_a_question_that_was_killed_goes_on(fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done lies beside the answer; what is kept of the calibration rows is used by any later question."""
    run, x, out = er.Run.load(fitted / "run"), np.ones((4, 6), dtype=np.float32), tmp_path / "a.nc"
    expected = run.score(x, simulated=0)
    told = []

    def kill(done: int, total: int) -> None:
        told.append((done, total))
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.score(x, simulated=0, out=out, report=kill)
    assert told[-1] == (154, 154)
    monkeypatch.setattr("elbowroom.queries.score.score.read", lambda *_, **__: pytest.fail("computed again"))
    assert run.score(x, simulated=0, out=out, resume=True).dataset.identical(expected.dataset)


def test_the_command(fitted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(fitted)
    np.save("new.npy", np.concatenate([np.ones((3, 6)), np.zeros((3, 6))]).astype(np.float32))
    assert call("score", "run", "new.npy", "--json", "--simulated", "0") == 0
    printed = json.loads(capsys.readouterr().out)
    assert [Path(path).name for path in printed["files"]] == ["score-new.nc", "score-new.csv", "score-new.png"]
    assert set(printed["decisions"]) == set(screening.RULES)
    assert all(sum(of_rule.values()) == 6 for of_rule in printed["decisions"].values())
    assert all(Path(path).is_file() for path in printed["files"])
    head = Path("run/answers/score-new.csv").read_text().partition("\n")[0].split(",")
    assert {"log_evidence", "evidence_method", "p_conformal[two_sided]", "decision[fdr_two_sided]", "p_score[k-hat]"} <= set(
        head
    )
    assert call("score", "run", "new.npy") == 2
    assert "is there already" in capsys.readouterr().err
    before = {path.name for path in Path("run/answers").iterdir()}
    assert call("score", "run", "--band", "0-100", "--out", "else.nc") == 2
    assert "band: 0-100 is no band" in capsys.readouterr().err
    assert {path.name for path in Path("run/answers").iterdir()} == before
    assert not Path("else.nc").exists()


def test_a_row_that_cannot_be_evaluated_does_not_take_the_others_with_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(120, 2)) @ rng.normal(size=(2, 5)) + 0.3 * rng.normal(size=(120, 5))).astype(np.float32)
    tree = {**SPEC, "data": {"name": "memory", "split": [0.4, 0.4, 0.2]}}
    tree["model"] = {**tree["model"], "likelihood": "gaussian"}
    run = er.fit(er.Experiment.from_dict(tree, data=x), out=tmp_path / "run")
    rows = x[:9].copy()
    rows[3], rows[7] = 1e30, -1e25
    answer = run.score(rows, simulated=0)
    lost = np.isin(np.arange(9), [3, 7])
    assert np.isnan(answer["log_evidence"]).tolist() == lost.tolist()
    assert set(answer["evidence_method"][lost]) == {"none"}
    assert answer["evidence_reason"][7].startswith("model: log p(x, z) of row 7 is not finite at a draw of the guide: the log ")
    assert set(answer["decision"][lost][:, 2]) == {LIMITED}
    assert any("At 2 rows the model cannot be evaluated" in sentence for sentence in answer.said)
    alone = run.score(x[:9], simulated=0)
    np.testing.assert_allclose(answer["log_evidence"][~lost], alone["log_evidence"][~lost], atol=1e-3)
    with pytest.raises(UserError, match="row 3 is not finite"):
        run.encode(rows)
