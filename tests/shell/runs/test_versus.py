"""Runs against each other: paired differences by hand, bounds apart, what cannot be compared refused or said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

import elbowroom as er
from elbowroom.analysis.report.key_figures import key_figures
from elbowroom.analysis.report.report import Files
from elbowroom.cli import app as cli
from elbowroom.errors import RunFolderError, SpecError
from elbowroom.models import measure
from elbowroom.run import Run, fit
from elbowroom.runs.compare import Versus, tabulate
from elbowroom.spec import document

N = 200


def audited(evidence: np.ndarray, *, gap: float = 0.1, method: str = "grid", half: float = 0.0) -> xr.Dataset:
    """An audit's table with this log p(x); NaN is a bound of half-width `half` around 0."""
    n, bound = len(evidence), np.isnan(evidence)
    middle = np.where(bound, 0.0, evidence)
    fields = {
        "log_evidence": evidence,
        "log_evidence_se": np.zeros(n),
        "log_evidence_lower": middle - half,
        "log_evidence_upper": middle + half,
        "elbo": evidence - gap,
        "gap_total": np.where(bound, np.nan, gap),
        "pareto_k": np.full(n, 0.3),
    }
    return xr.Dataset(
        {
            **{name: ("obs_id", value) for name, value in fields.items()},
            "evidence_method": ("obs_id", np.full(n, method)),
            "status": (("obs_id", "reference"), np.full((n, 1), "exact")),
        },
        coords={"obs_id": np.arange(n), "reference": ["grid"]},
    )


def test_differences_are_paired() -> None:
    generator = np.random.default_rng(0)
    a = generator.normal(-100, 20, N)  # data differ by far more than models
    b = a - 0.5 + 0.1 * generator.normal(size=N)
    found = Versus(tabulate(["b", "a"], [audited(b), audited(a, gap=0.3)]))
    d = b - a
    row = found.table.sel(run="b")
    assert found.best == "a"
    assert float(row["difference"]) == pytest.approx(d.mean())
    assert float(row["difference_se"]) == pytest.approx(d.std(ddof=1) / N**0.5)
    assert float(row["z"]) == pytest.approx(d.mean() / (d.std(ddof=1) / N**0.5))
    assert float(row["se"]) > 1
    assert "b is worse than a by 0.5" in found.verdict()[0]
    assert (float(row["gap"]), float(found.table.sel(run="a")["gap"])) == (pytest.approx(0.1), pytest.approx(0.3))
    assert found.lines()[0] == ("", "a", "b")


def test_the_standard_error_holds_what_it_says() -> None:
    """Of equal models |z| exceeds 1.96 in 5 % of the cases (here: 100 of them)."""
    generator = np.random.default_rng(1)
    beyond = 0
    for _ in range(100):
        a = generator.normal(-100, 20, N)
        z = tabulate(["a", "b"], [audited(a + generator.normal(size=N)), audited(a + generator.normal(size=N))])["z"].values
        beyond += int(np.nanmax(np.abs(z)) > 1.96)
    assert beyond <= 15


def test_noise_is_no_difference() -> None:
    generator = np.random.default_rng(2)
    a = generator.normal(-100, 20, N)
    found = Versus(tabulate(["a", "b"], [audited(a), audited(a + 0.01 * generator.normal(size=N))]))
    assert "cannot be told from" in found.verdict()[0]


def test_equal_evidence_is_called_the_same() -> None:
    """Also where two grids differ by rounding, whose 0.000 +- 0.000 is no difference whatever its z."""
    a = np.random.default_rng(2).normal(-100, 20, N)
    for b in (a, a + 1e-6 * (1 + np.arange(N) / N)):
        found = Versus(tabulate(["a", "b"], [audited(a), audited(b)]))
        assert "nan" not in repr(found)
        assert "the same" in [cell for row in found.lines() for cell in row]
        other = "a" if found.best == "b" else "b"
        assert found.verdict() == [
            f"{other} and {found.best} are the same: log p(x) of none of 200 data differs by 0.001 nats."
        ]
        json.dumps(found.tree(), allow_nan=False)
    one = Versus(tabulate(["a", "b"], [audited(a[:1]), audited(a[:1] - 0.3)]))
    assert "nan" not in repr(one)
    assert one.verdict() == ["b cannot be told from a: -0.300 (one datum, no error) nats per datum."]


def test_bounds_enter_no_difference_and_are_counted() -> None:
    a = np.full(N, -1.0)
    b = np.linspace(-2.5, -1.5, N)
    b[:10] = np.nan
    upper = audited(b, half=0.25)
    upper["log_evidence_upper"][:4] = -3.0  # surely below a's value
    upper["log_evidence_lower"][:4] = -4.0
    upper["log_evidence_lower"][4:7] = -0.5  # surely above
    upper["log_evidence_upper"][4:7] = np.nan
    upper["log_evidence_lower"][7:10] = -2.0
    upper["log_evidence_upper"][7:10] = 0.0  # undecided
    found = Versus(tabulate(["a", "b"], [audited(a), upper]))
    row = found.table.sel(run="b")
    assert float(row["paired"]) == N - 10
    assert float(row["left_out"]) == 10
    assert (float(row["above"]), float(row["below"])) == (3, 4)
    assert float(row["difference"]) == pytest.approx(np.nanmean(b) + 1)
    assert any("10 of 200 data is only a bound" in said for said in found.verdict())


def test_bounds_alone_rank_nothing() -> None:
    unknown = audited(np.full(N, np.nan), half=1.0)
    found = Versus(tabulate(["a", "b"], [unknown, unknown]))
    assert found.best == ""
    assert found.verdict()[0].startswith("log p(x) is known for none")
    assert "not available" in repr(found)
    one = Versus(tabulate(["a", "b"], [audited(np.full(N, -1.0)), unknown]))
    assert one.best == "a"
    assert "no data where log p(x) is known in both" in one.verdict()[0]
    json.dumps(one.tree(), allow_nan=False)


def test_random_samples_are_compared_where_they_overlap() -> None:
    """What was audited because a proxy showed it as the worst is in no mean."""
    generator = np.random.default_rng(8)
    a = -90 + 5 * generator.standard_normal(N)
    first, second = audited(a), audited(a + 0.5)
    inside = np.arange(N) < N // 2
    first = first.assign(in_sample=("obs_id", inside.astype(float)))
    first["log_evidence"][-1] = 0.0  # outside the sample
    second = second.assign(in_sample=("obs_id", (np.arange(N) > 3).astype(float)))
    found = tabulate(["a", "b"], [first, second])
    assert found["obs_id"].values.tolist() == list(range(4, N // 2))
    assert found["difference"].values == pytest.approx([-0.5, 0.0])
    assert Versus(found).best == "b"


def test_the_order_of_the_data_does_not_matter() -> None:
    a, b = np.arange(N) * 1.0, np.arange(N) - 0.5
    shuffled = audited(b).isel(obs_id=np.random.default_rng(0).permutation(N))
    xr.testing.assert_identical(tabulate(["a", "b"], [audited(a), audited(b)]), tabulate(["a", "b"], [audited(a), shuffled]))


SPEC = {
    "data": {"name": "file", "path": "x.npy"},
    "model": {"latent_dim": 1, "likelihood": "bernoulli", "decoder": {"name": "mlp", "hidden": [4]}},
    "guide": {"encoder": {"name": "mlp", "hidden": [4]}},
    "fit": {"epochs": 2, "batch_size": 16, "device": "cpu"},
    "audit": {"draws": 200, "keep": 100, "references": ["grid"]},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Audited runs: a and b on the same data, `poisson` and `gaussian` too, others on other rows."""
    home = tmp_path_factory.mktemp("home")
    x = (np.random.default_rng(0).random((40, 5)) < np.random.default_rng(1).random((40, 1))).astype(np.float32)
    np.save(home / "x.npy", x)
    np.save(home / "y.npy", 1 - x)
    runs = {
        "a": [],
        "b": ["fit.epochs=4"],
        "gaussian": ["model.likelihood=gaussian"],
        "poisson": ["model.likelihood=poisson"],
        "elsewhere": ["data.path=y.npy"],
        "seed": ["seed=1"],
        "few": ["audit.observations=5"],
    }
    (home / "s.yaml").write_text(document.write(SPEC))
    for name, changes in runs.items():
        fit(er.Experiment.load(home / "s.yaml", set=changes), home / name).audit()
    fit(home / "s.yaml", home / "bare")
    return home


def test_runs_are_compared(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = er.compare([home / "a", Run.load(home / "b")])
    a, b = (xr.open_dataset(home / name / "audit.nc")["log_evidence"].values for name in ("a", "b"))
    worse = found.table.sel(run="b" if found.best == "a" else "a")
    assert abs(float(worse["difference"])) == pytest.approx(abs((a - b).mean()))
    assert not found.notes
    out = tmp_path / "c.csv"
    assert call("compare", str(home / "a"), str(home / "b"), "--out", str(out), "--json") == 0
    assert json.loads(capsys.readouterr().out)["best"] == found.best
    table = pd.read_csv(out, index_col="obs_id")
    np.testing.assert_allclose(table["log_evidence[a]"], a)
    assert call("compare", str(home / "a"), str(home / "b")) == 0
    assert "mean log p(x)" in capsys.readouterr().out


def test_runs_of_one_name_are_told_apart(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "b", tmp_path / "a")
    found = er.compare([home / "a", tmp_path / "a"])
    assert set(found.table["run"].values) == {str(home / "a"), str(tmp_path / "a")}


def test_some_of_the_test_data_are_a_random_sample_of_them(home: Path) -> None:
    """Rows with the lowest labels would be one class of data that are sorted by class."""
    labels, test = (xr.open_dataset(home / "few" / "audit.nc")["obs_id"].values, np.load(home / "few" / "split.npz")["test"])
    assert labels.tolist() == sorted(test[:5])
    assert labels.tolist() != sorted(test)[:5]


def test_masses_and_densities_are_not_comparable(home: Path) -> None:
    found = er.compare([home / "gaussian", home / "poisson"])
    assert found.notes[0].startswith("NOT comparable: gaussian (density), poisson (mass)")
    assert not er.compare([home / "a", home / "poisson"]).notes


@pytest.mark.slow
@pytest.mark.usefixtures("diagnosed")
def test_bits_stand_in_diagnosis_and_report_where_data_are_discrete(home: Path, tmp_path: Path) -> None:
    """Those of the rate and distortion, and those of the ELBO, are the same but for the noise of its draws."""
    for name, entries in (("poisson", 5), ("gaussian", None)):
        run = Run.load(home / name, set=["audit.references=[grid]", "audit.draws=2000"])
        found = run.audit(out=tmp_path / name)
        information = found.diagnosis["information"].to_dataset()
        assert Files.read(tmp_path / name).entries == entries
        assert ("bits_per_dimension" in information) == (entries is not None)
        if entries is not None:
            bits = -found.table["elbo"].values.mean() / (entries * np.log(2))
            assert float(information["bits_per_dimension"]) == pytest.approx(bits, abs=0.02)
            note = key_figures(found.table, entries, held_out=True)[1].note
            assert f"{bits:.2f} ± " in note
            assert "bits per dimension" in note
    missing = torch.tensor([[0.0, torch.nan, 1.0, 0.0, 0.0]])
    assert measure.entries(Run.load(home / "poisson").vae, missing) is None


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(arguments))
    return int(stopped.value.code or 0)


BAD = [
    (["a"], "needs at least two runs"),
    (["a", "a"], "is given twice"),
    (["a", "nowhere"], "no such run folder"),
    (["a", "bare"], "is not audited"),
    (["a", "elsewhere"], "was fitted to other data than a"),
    (["a", "seed"], "audit the same rows"),
    (["a", "few"], "its audit is of 5 data, of which 5 are among the 8 of a"),
    (["a", "b", "--out", "."], "this is a folder"),
    (["a", "b", "--out", "s.yaml/c.csv"], "s.yaml"),
]


@pytest.mark.parametrize(("line", "told"), BAD, ids=[" ".join(line) for line, _ in BAD])
def test_bad_input_is_one_line(home, monkeypatch, capsys, line, told) -> None:
    monkeypatch.chdir(home)
    before = sorted(home.rglob("*"))
    assert call("compare", *line) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert told in captured.err
    assert not captured.out
    assert sorted(home.rglob("*")) == before


def test_an_audit_of_other_weights_is_refused(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "b", tmp_path / "mixed")
    shutil.copy(home / "a" / "audit.nc", tmp_path / "mixed" / "audit.nc")
    with pytest.raises(RunFolderError, match="its audit is of other weights"):
        er.compare([home / "a", tmp_path / "mixed"])
    with pytest.raises(SpecError, match="at least two"):
        er.compare([])
