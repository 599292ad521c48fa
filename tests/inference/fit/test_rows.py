"""Rows that are read as they are needed, or drawn anew in every epoch: the same fit, bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.cases.fits import data as made
from support.cases.fits import make, parameters, same

import elbowroom as er
from elbowroom.data import chunks
from elbowroom.data import dataset as data
from elbowroom.data.dataset import Dataset
from elbowroom.errors import DataError, RunFolderError
from elbowroom.inference.fit import rows, svi
from elbowroom.inference.fit.plan import Session
from elbowroom.inference.fit.rows import Rows
from elbowroom.inference.fit.svi import fit

TREE = {
    "data": {"name": "file", "path": "x.npy"},
    "model": {"latent_dim": 1, "likelihood": "gaussian", "decoder": {"name": "mlp", "hidden": [4]}},
    "guide": {"encoder": {"name": "mlp", "hidden": [4]}},
    "fit": {"epochs": 3, "batch_size": 16, "device": "cpu"},
    "audit": {"draws": 100, "keep": 100, "observations": 7},
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", np.random.default_rng(0).normal(size=(100, 5)))
    return tmp_path


def weights(run: er.Run) -> dict[str, torch.Tensor]:
    return run.vae.state_dict()


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.usefixtures("here")
def test_a_memory_map_above_the_budget_gives_the_same_run(monkeypatch: pytest.MonkeyPatch) -> None:
    resident = er.fit(er.Experiment.from_dict(TREE), out="resident")
    audit = resident.audit()
    monkeypatch.setattr(data, "BUDGET", 1000)
    monkeypatch.setattr(chunks, "CHUNK", 70)
    monkeypatch.setattr(rows, "CHUNK", 70)
    experiment = er.Experiment.from_dict(TREE)
    asked: list[int] = []
    read = er.Experiment.rows

    def counted(self: er.Experiment, index: np.ndarray) -> torch.Tensor:
        asked.append(len(index))
        return read(self, index)

    monkeypatch.setattr(er.Experiment, "rows", counted)
    experiment.check()
    asked.clear()
    train = experiment.part(experiment.split.train, training=True)
    assert train.whole is None
    assert not asked
    monkeypatch.setattr(rows, "SAMPLE", 2**28)
    mapped = er.fit(experiment, out="mapped")
    assert max(asked) <= 60  # the means and scales of 60 training rows; no more at once
    assert (Path("mapped") / "history.csv").read_text().count("\n") == 4
    assert equal(weights(resident), weights(mapped))
    assert experiment.identity == resident.experiment.identity
    asked.clear()
    found = mapped.audit()
    assert asked == [7, 60, 20]  # of training and validation data what stands beside the audited ones
    np.testing.assert_array_equal(found.table["elbo"], audit.table["elbo"])
    np.testing.assert_array_equal(found.table["obs_id"], audit.table["obs_id"])


@pytest.mark.usefixtures("here")
@pytest.mark.slow
def test_an_audit_reads_the_audited_rows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "BUDGET", 1000)
    er.fit(er.Experiment.from_dict(TREE), out="run")

    def never(*_: object) -> str:
        raise AssertionError("the whole file was read")

    with monkeypatch.context() as patch:
        patch.setattr(Dataset, "fingerprint", never)
        patch.setattr(data, "rows_of", never)
        er.Run.load("run").audit()
    x = np.load("x.npy")
    np.save("x.npy", x)  # written again, the same: read once more, and accepted
    er.Run.load("run").audit()
    np.save("x.npy", x + 1)
    with pytest.raises(RunFolderError, match=r"x\.npy has changed since the fit"):
        er.Run.load("run").audit()
    x[50] = np.nan
    np.save("other.npy", x)
    assert er.Run.load("run").audit("other.npy", out="other").table.sizes["obs_id"] == 7
    x[3, 2] = np.inf
    np.save("other.npy", x)
    with pytest.raises(DataError, match=r"^other.npy: an infinite value at row 3, column 2;"):
        er.Run.load("run").audit("other.npy", out="other")


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (np.inf, "data: inf at row 41, column 3 .* make it NaN to treat it as missing"),
        (1e300, "1e\\+300 at row 41, column 3 is too large for"),
    ],
)
def test_a_bad_value_in_a_large_map_is_found_before_the_fit(value: float, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "BUDGET", 1000)
    monkeypatch.setattr("elbowroom.spec.experiment.CHUNK", 70)
    x = np.load("x.npy")
    x[41, 3] = value
    np.save("x.npy", x)
    with pytest.raises(DataError, match=wanted):
        er.fit(er.Experiment.from_dict(TREE), out="run")
    assert not Path("run").exists()


def test_means_and_scales_of_more_than_the_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.arange(40.0).reshape(10, 4)
    monkeypatch.setattr(rows, "SAMPLE", 5 * 16)
    kept = Rows.of(x)
    read = Rows((10, 4), lambda index: x[index])
    assert torch.equal(kept.sample()["x"], x[::2])
    assert torch.equal(read.sample()["x"], x[::2])
    assert torch.equal(torch.cat([part["x"] for part in read.split(3)]), x)
    monkeypatch.setattr(rows, "CHUNK", 8)
    assert b"".join(kept.bytes()) == b"".join(read.bytes())


# dynamic binarization


def grey(n: int = 40) -> torch.Tensor:
    return torch.randint(0, 256, (n, 6), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)


def dynamic() -> Rows:
    return Rows.of((grey() > 127).double(), grey())


def test_covariates_and_exposure_stay_beside_their_rows() -> None:
    x, c, e = torch.arange(40.0).reshape(10, 4), torch.arange(20.0).reshape(10, 2), torch.arange(10.0)
    both = Rows.of({"x": x, "covariates": c, "exposure": e}).to(torch.device("cpu"), torch.float64)
    index = torch.tensor([7, 2])
    taken = both.batch(index, torch.Generator())
    assert list(taken) == ["x", "covariates", "exposure"]
    assert torch.equal(taken["covariates"], c[index].double())
    assert torch.equal(torch.cat([part["exposure"] for part in both.split(3)]), e.double())
    other = Rows.of({"x": x, "covariates": c + 1, "exposure": e}).to(torch.device("cpu"), torch.float64)
    assert b"".join(both.bytes()) != b"".join(other.bytes())


def test_training_batches_are_fresh_draws_of_the_grey_values() -> None:
    generator = torch.Generator().manual_seed(0)
    replay = dynamic()
    index = torch.arange(40)
    drawn = torch.stack([replay.batch(index, generator)["x"] for _ in range(2000)])
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    p = grey().double() / 255
    assert ((drawn.mean(0) - p).abs() <= 5 * (p * (1 - p) / 2000).sqrt() + 1e-9).all()
    assert torch.equal(replay.take(index)["x"], (grey() > 127).double())
    assert torch.equal(next(replay.split(40))["x"], (grey() > 127).double())


def test_a_dynamic_fit_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    options = {"epochs": 6, "batch_size": 16, "dtype": "float64", "device": "cpu"}
    held = made(10, binary=True)

    def run(folder: Path, stop_after: int | None, resume: bool = False, seen: list | None = None):
        vae = make(binary=True)

        def report(_: object, row: svi.Row) -> None:
            if row.epoch == stop_after:
                raise KeyboardInterrupt

        session = Session(folder=folder, resume=resume, seed=5, report=report, checkpoint_seconds=0)
        try:
            fit(vae, dynamic(), held, session, **options)
        except KeyboardInterrupt:
            assert stop_after is not None
        return vae

    whole = run(tmp_path / "a", None)
    run(tmp_path / "b", 3)
    assert same(parameters(whole), parameters(run(tmp_path / "b", None, resume=True)))
    static = make(binary=True)
    fit(static, Rows.of((grey() > 127).double()), held, Session(seed=5), **options)
    assert not same(parameters(whole), parameters(static), 1e-6)
    with pytest.raises(RunFolderError, match="another data"):
        fit(
            make(binary=True),
            Rows.of(dynamic().whole, 255 - grey()),
            held,
            Session(folder=tmp_path / "b", resume=True, seed=5),
            **options,
        )


def test_epochs_see_different_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    take = svi.Step.__call__

    def record(self: svi.Step, x: torch.Tensor, **options: object) -> tuple[float, float]:
        seen.append(x.clone())
        return take(self, x, **options)

    monkeypatch.setattr(svi.Step, "__call__", record)
    fit(make(binary=True), dynamic(), made(10, binary=True), epochs=2, batch_size=40, dtype="float64", device="cpu")
    first, second = (x.sum() for x in seen)
    assert first != second


def test_a_dynamic_experiment_trains_on_draws_and_audits_the_fixed_one() -> None:
    pixels = grey(30).numpy()
    fixed = (pixels > 100).astype(np.uint8)
    experiment = er.Experiment.from_dict(
        {**TREE, "data": "digits", "model": {**TREE["model"], "likelihood": "bernoulli"}, "audit": {}}
    )
    experiment.__dict__["data"] = Dataset(fixed, "grey", grey=pixels)
    experiment.check()
    index = experiment.split.train
    np.testing.assert_array_equal(experiment.part(index, training=True).grey.numpy(), pixels[index])
    assert experiment.part(experiment.split.validation).grey is None
    np.testing.assert_array_equal(experiment.rows(experiment.split.test).numpy(), fixed[experiment.split.test])
    assert Dataset(fixed, "grey").fingerprint() != experiment.data_sha256
