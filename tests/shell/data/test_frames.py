"""Arrays and frames from Python, and parquet files: what is taken, and the one line for what is not."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import elbowroom as er
from elbowroom.data.dataset import Dataset
from elbowroom.data.file import File
from elbowroom.data.frames import Memory, from_python
from elbowroom.errors import DataError, RunFolderError, UserError

MODEL = {"latent_dim": 1, "likelihood": "gaussian", "decoder": {"name": "mlp", "hidden": [4]}}
TREE = {
    "model": MODEL,
    "guide": {"encoder": {"name": "mlp", "hidden": [4]}},
    "fit": {"epochs": 1, "device": "cpu"},
    "audit": {"draws": 100, "keep": 100},
}


def frame() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    return pd.DataFrame({"height": rng.normal(size=30), "age": rng.integers(0, 90, 30), "smokes": rng.random(30) < 0.5})


def problem(call, *arguments, **options) -> str:
    with pytest.raises(UserError) as error:
        call(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_frame_becomes_rows_with_names() -> None:
    dataset = from_python(frame())
    assert dataset.columns == ("height", "age", "smokes")
    assert dataset.x.dtype == np.float64
    np.testing.assert_array_equal(dataset.x, frame().astype(float).to_numpy())
    dataset.check()
    narrow = pd.DataFrame({1: np.arange(3, dtype=np.uint8), 2: np.arange(3, dtype=np.uint8)}, index=["a", "b", "c"])
    assert from_python(narrow).x.dtype == np.uint8
    assert from_python(narrow).columns == ("1", "2")
    nullable = frame().convert_dtypes()
    assert "Int64" in set(map(str, nullable.dtypes))
    np.testing.assert_array_equal(from_python(nullable).x, dataset.x)
    x = np.zeros((3, 2))
    assert from_python(x).x is x
    assert from_python(np.ma.masked_array(x)).x.shape == (3, 2)


def test_all_ways_to_say_that_a_value_is_missing() -> None:
    whole = frame()
    gap = whole.astype(float).mask(lambda f: (f.index.to_numpy()[:, None] == 4) & (np.arange(3) > 0))
    nullable = whole.convert_dtypes().assign(
        age=whole.age.astype("Int64").mask(whole.index == 4), smokes=whole.smokes.astype("boolean").mask(whole.index == 4)
    )
    objects = whole.astype({"age": object, "smokes": object})
    objects.loc[4, "age"], objects.loc[4, "smokes"] = None, pd.NA
    masked = np.ma.masked_array(whole.astype(float).to_numpy(), mask=gap.isna().to_numpy())
    for given in (gap, nullable, objects, masked, gap.to_numpy()):
        dataset = from_python(given)
        assert dataset.x.dtype == np.float64
        assert dataset.missing
        np.testing.assert_array_equal(dataset.x, gap.to_numpy())
        dataset.check()
    counts = np.ma.masked_array(np.arange(6).reshape(3, 2), mask=[[0, 0], [1, 0], [0, 0]])
    np.testing.assert_array_equal(from_python(counts).x, [[0, 1], [np.nan, 3], [4, 5]])
    assert from_python(counts.astype(np.float32)).x.dtype == np.float32


FRAMES = {
    "objects": (
        lambda f: f.assign(name=pd.Series([{}] * 30, dtype=object)),
        "data: column 'name' holds records, such as '{}', neither numbers nor text; make a column of each of their fields",
    ),
    "numbers and text": (
        lambda f: f.assign(name=pd.Series([1.0, "a"] * 15, dtype=object)),
        "data: column 'name' holds both numbers and text, such as ",
    ),
    "an identifier": (
        lambda f: pd.concat([f] * 4).assign(name=[f"n{i}" for i in range(120)]),
        "data: column 'name' holds 120 different values in 120 rows; leave it out: name the columns to use in data.x",
    ),
    "dates": (
        lambda f: f.assign(day=pd.Timestamp("2020-01-01")),
        "holds dates, such as '2020-01-01 00:00:00', neither numbers nor text; convert them to numbers",
    ),
    "durations": (lambda f: f.assign(d=pd.Timedelta(1, "D")), "data: column 'd' holds durations"),
    "complex": (lambda f: f.assign(c=1j), "data: column 'c' holds complex numbers, such as '1j', neither numbers nor text"),
    "nothing observed": (
        lambda f: f.assign(age=pd.array([pd.NA] * 30, dtype="Int64")),
        "data: column 'age' has no observed value; leave it out of data.x, or remove it",
    ),
    "infinite": (
        lambda f: f.assign(height=f.height.where(f.index != 7, np.inf)),
        "data: an infinite value at row 7, column 'height'; correct it, or make it NaN, which is read as missing",
    ),
    "twice": (lambda f: pd.concat([f, f], axis=1), "data: the column name 'height' appears twice"),
    "no columns": (lambda f: f[[]], "data: empty, shape (30, 0)"),
    "no rows": (lambda f: f[:0], "data: empty, shape (0, 3)"),
    "one row": (lambda f: f[:1], "data: 1 row; at least 3 are needed for train, validation and test"),
    "a column": (lambda f: f.age, "data: must be a NumPy array or a pandas DataFrame, got pandas"),
    "a list": (
        lambda f: [[1.0]],
        "data: must be a NumPy array or a pandas DataFrame, got list; convert it with np.asarray(...)",
    ),
    "masked": (lambda f: np.ma.masked_less(np.arange(6.0).reshape(3, 2), 9), "data: every value is missing"),
    "masked objects": (
        lambda f: np.ma.masked_array(np.array([[None]]), mask=True),
        "data: numbers are needed, this array holds Python objects",
    ),
    "flat": (lambda f: np.arange(5.0), "data: rows and columns are needed, this array is flat; reshape it to (5, 1)"),
    "object array": (lambda f: np.array([[None]]), "data: numbers are needed, this array holds Python objects"),
}


@pytest.mark.parametrize("name", FRAMES)
def test_what_is_no_data(name: str) -> None:
    damage, wanted = FRAMES[name]

    def check() -> None:
        er.Experiment.from_dict(TREE, data=damage(frame())).check()

    assert wanted in problem(check)


@pytest.mark.slow
def test_a_run_on_a_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(
        "data: {name: file, path: nowhere.csv, split: [0.5, 0.2, 0.3]}\n"
        "model: {latent_dim: 1, likelihood: gaussian, decoder: {name: mlp, hidden: [4]}}\n"
        "fit: {epochs: 1, device: cpu}\naudit: {draws: 100, keep: 100}\n"
    )
    run = er.fit(er.Experiment.load("mine.yaml", data=frame()))
    assert [len(part) for part in (run.experiment.split.train, run.experiment.split.test)] == [15, 9]
    found = run.audit()
    assert found.table.sizes["obs_id"] == 9
    again = er.Run.load("runs/mine", data=frame())
    np.testing.assert_array_equal(again.audit().table["elbo"], found.table["elbo"])
    assert problem(lambda: er.Run.load("runs/mine").audit()).startswith(
        "runs/mine/spec.yaml: data: these rows came from Python"
    )
    with pytest.raises(RunFolderError, match="data has changed since the fit"):
        er.Run.load("runs/mine", data=frame() + 1).audit()
    other = frame()[:5]
    from_frame = again.audit(other, out="a").table
    np.testing.assert_array_equal(from_frame["elbo"], again.audit(other.astype(float).to_numpy(), out="b").table["elbo"])
    turned = again.audit(other.assign(name=1j)[["name", "smokes", "age", "height"]], out="c").table  # read by name
    np.testing.assert_array_equal(turned["elbo"], from_frame["elbo"])
    assert "there is no column 'smokes'" in problem(again.audit, other[["age", "height"]], out="d")


def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.parquet"
    frame().to_parquet(path)
    dataset = File(tmp_path, path=Path("x.parquet")).load()
    assert dataset.columns == ("height", "age", "smokes")
    np.testing.assert_array_equal(dataset.x, from_python(frame()).x)
    frame().assign(name="x", age=frame().age.astype("Int64").mask(frame().index == 4)).to_parquet(path)
    dataset = File(tmp_path, path=Path("x.parquet")).load()
    assert dataset.categories == {"name": ("x",)}
    assert np.argwhere(np.isnan(dataset.x)).tolist() == [[4, 1]]
    frame().assign(day=pd.Timestamp("2020-01-01")).to_parquet(path)
    assert problem(File(tmp_path, path=Path("x.parquet")).load).startswith("x.parquet: column 'day' holds ")
    path.write_bytes(path.read_bytes()[:-20])
    assert problem(File(tmp_path, path=Path("x.parquet")).load).startswith("x.parquet: damaged or no parquet file (")
    assert problem(File(tmp_path, path=Path("y.parquet")).load).endswith("did you mean 'x.parquet'?")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DataError) as error:
        File(tmp_path, path=Path("x.parquet")).load()
    assert str(error.value) == "x.parquet: parquet files need pyarrow; install it with: pip install 'elbowroom[parquet]'"


def test_rows_in_memory_cannot_come_from_a_spec() -> None:
    assert Memory().missing() == "the rows come from Python"
    experiment = er.Experiment.from_dict({**TREE, "data": "memory"})
    assert problem(experiment.check).startswith("spec: data: these rows came from Python and are in no file; hand them over")
    assert isinstance(er.Experiment.from_dict(TREE, data=frame()).data, Dataset)
