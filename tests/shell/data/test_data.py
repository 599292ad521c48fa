"""Data: every way in which they can be wrong, the fingerprint, and the split."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from elbowroom.components import registry
from elbowroom.components.slots import build
from elbowroom.data import chunks
from elbowroom.data.builtin import Digits, LinearGaussianData
from elbowroom.data.dataset import DataError, Dataset, split_rows
from elbowroom.data.file import File
from elbowroom.errors import SpecError, UserError


def load(folder: Path, **options) -> Dataset:
    chosen = registry.options_model("data", "file").model_validate({"name": "file", **options})
    return build("data", chosen, folder=folder).load()


def problem(call, *arguments, **options) -> str:
    with pytest.raises(UserError) as error:
        call(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


X = np.arange(12.0).reshape(4, 3)


@pytest.mark.parametrize(
    "text",
    [
        "a,b,c\n0,1,2\n3,4,5\n6,7,8\n9,10,11\n",
        "0.0,1,2\n3,4,5\n6,7,8\n9,10,11",
        "a;b;c\r\n0;1;2\r\n3;4;5\r\n6;7;8\r\n9;10;11\r\n",
        "\ufeffa\tb\tc\n0\t1\t2\n3\t4\t5\n\n6\t7\t8\n9\t10\t11\n",
        '"a","b","c"\n"0",1,2\n3,4e0,5\n6,7,8\n9,10,11\n',
        "\n0.0, 1, 2\n3, 4, 5\n6, 7, 8\n9, 10, 11\n",
    ],
)
def test_csv(text, tmp_path):
    (tmp_path / "x.csv").write_text(text, encoding="utf-8", newline="")
    dataset = load(tmp_path, path="x.csv")
    np.testing.assert_array_equal(dataset.x, X)
    assert dataset.columns in (("a", "b", "c"), None)


MIXED = "is no number, and other cells of the column are; correct it, or declare the column categorical in data.kinds"
CSV = {
    "a,b\n1,2\n3\n": "x.csv: line 3 has 1 cell, the lines before it have 2; every line needs the same",
    "a,b\n1,2\n3,4,5\n": "x.csv: line 3 has 3 cells, the lines before it have 2; every line needs the same",
    "3,1,2\n4,5\n": "x.csv: line 2 has 2 cells, the lines before it have 3; every line needs the same",
    "a,b,c\n1,2\n3,4\n": "x.csv: line 2 has 2 cells, the lines before it have 3; every line needs the same",
    "a,b\n1,2\n3,four\n": f"x.csv: line 3, column 'b': the text 'four' {MIXED}",
    "1,2\n3,four\n": f"x.csv: line 2, column '1': the text 'four' {MIXED}",
    "a,b\n1,\n3,\n": "x.csv: column 'b' has no observed value; leave it out of data.x, or remove it",
    "1,?\n3,NA\n": "x.csv: column 1 has no observed value; remove the column",
    "a,b\nnan,\nNA,?\n": "x.csv: every value is missing; at least one of each column is needed",
    "a,b\n1,2\n3,1_0\n": f"x.csv: line 3, column 'b': the text '1_0' {MIXED}",
    "1,2\n3,inf\n5,6\n": "x.csv: an infinite value at row 1, column 1; correct it, or make it NaN, which is read as missing",
    "a,b\n": "x.csv: a header and no rows",
    "a,a\n1,2\n": "x.csv: the column name 'a' appears twice in the header",
    "  \n\n": "x.csv: empty",
    "": "x.csv: empty",
    "1,2\n\x00": "x.csv: not a text file (it holds NUL characters)",
    '1,2\n"3,4\n': "x.csv: line 2 has 1 cell, the lines before it have 2; every line needs the same",
}


@pytest.mark.parametrize("text", CSV, ids=[repr(t[:20]) for t in CSV])
def test_csv_problems_name_line_and_column(text, tmp_path):
    (tmp_path / "x.csv").write_text(text, newline="")
    assert problem(load, tmp_path, path="x.csv") == CSV[text]


def test_csv_in_another_encoding(tmp_path):
    (tmp_path / "x.csv").write_bytes("größe,b\n1,2\n".encode("latin-1"))
    assert problem(load, tmp_path, path="x.csv") == "x.csv: not a text file in UTF-8 (byte 2); export it as UTF-8"


ARRAYS = {
    "flat": (np.arange(5.0), "x.npy: rows and columns are needed, this array is flat; reshape it to (5, 1)"),
    "scalar": (np.array(1.0), "x.npy: empty, shape (); at least 3 rows of one number are needed"),
    "no rows": (np.empty((0, 3)), "x.npy: empty, shape (0, 3); at least 3 rows of one number are needed"),
    "no columns": (np.empty((3, 0)), "x.npy: empty, shape (3, 0); at least 3 rows of one number are needed"),
    "text": (np.array([["a"]]), "x.npy: numbers are needed, this array holds text; convert it to float first"),
    "complex": (X * 1j, "x.npy: numbers are needed, this array holds complex numbers; convert it to float first"),
    "objects": (
        np.array([[1, None]], dtype=object),
        "x.npy: holds Python objects, which are never loaded; save numbers: np.save(file, x.astype(float))",
    ),
    "nothing but nan": (X * np.nan, "x.npy: every value is missing; at least one of each column is needed"),
    "a column of nan": (
        np.where(X % 3 == 1, np.nan, X),
        "x.npy: column 1 has no observed value; remove the column",
    ),
    "infinity in an image": (
        np.where(X == 7, np.inf, X).reshape(2, 2, 3),
        "x.npy: an infinite value at row 1, position (0, 1); correct it, or make it NaN, which is read as missing",
    ),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_that_are_no_data(name, tmp_path):
    array, wanted = ARRAYS[name]
    np.save(tmp_path / "x.npy", array)
    assert problem(load, tmp_path, path="x.npy") == wanted


def test_npy_is_memory_mapped(tmp_path):
    np.save(tmp_path / "x.npy", X)
    dataset = load(tmp_path, path="x.npy")
    assert isinstance(dataset.x, np.memmap)
    np.testing.assert_array_equal(dataset.x, X)


def test_npz(tmp_path):
    np.savez(tmp_path / "one.npz", counts=X)
    np.savez(tmp_path / "many.npz", x=X, y=X + 1)
    np.savez(tmp_path / "other.npz", train=X, test=X + 1)
    np.testing.assert_array_equal(load(tmp_path, path="one.npz").x, X)
    np.testing.assert_array_equal(load(tmp_path, path="many.npz").x, X)
    np.testing.assert_array_equal(load(tmp_path, path="many.npz", key="y").x, X + 1)
    assert problem(load, tmp_path, path="other.npz") == "other.npz: holds train, test; say which with data.key"
    wanted = "other.npz: data.key: there is no array 'trian'; did you mean 'train'?"
    assert problem(load, tmp_path, path="other.npz", key="trian") == wanted
    roles = {"covariates": ["batch", "dose"], "exposure": "total", "labels": "kind"}
    beside = {
        "dose": X[:, :2],
        "batch": np.array(["b", "a", "a", "b"]),
        "total": X[:, 0] + 1,
        "kind": np.array(["u", "v", "u", ""]),
    }
    np.savez(tmp_path / "table.npz", x=X.reshape(4, 3, 1), **beside)
    dataset = load(tmp_path, path="table.npz", **roles)
    assert dataset.covariate_names == ("batch=a", "batch=b", "dose.0", "dose.1")
    np.testing.assert_array_equal(dataset.covariates, np.c_[[0, 1, 1, 0], [1, 0, 0, 1], X[:, :2]])
    np.testing.assert_array_equal(dataset.exposure, beside["total"])
    assert dataset.labels.tolist() == ["u", "v", "u", "missing"]
    assert dataset.event_shape == (3, 1)
    wanted = "table.npz: data.exposure: there is no array 'totl'; did you mean 'total'?"
    assert problem(load, tmp_path, path="table.npz", exposure="totl") == wanted
    wanted = "table.npz[x]: data.exposure: 'dose' has shape (4, 2); one number for each row is needed"
    assert problem(load, tmp_path, path="table.npz", exposure="dose", key="x") == wanted
    wanted = "table.npz[x]: data.x: an array has no columns with names; choose the array with data.key"
    assert problem(load, tmp_path, path="table.npz", x=["dose"], key="x") == wanted
    np.savez(tmp_path / "objects.npz", x=np.array([[1, None]], dtype=object))
    assert "objects.npz: holds Python objects" in problem(load, tmp_path, path="objects.npz")


def test_damaged_files(tmp_path):
    np.savez(tmp_path / "x.npz", x=X)
    np.save(tmp_path / "x.npy", X)
    for name in ("x.npz", "x.npy"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:-20])
        assert problem(load, tmp_path, path=name).startswith(f"{name}: damaged or cut short (")
    (tmp_path / "text.npy").write_text("1 2 3")
    wanted = "text.npy: damaged or cut short (it does not begin like an .npy file); write it again"
    assert problem(load, tmp_path, path="text.npy") == wanted
    with zipfile.ZipFile(tmp_path / "zip.npz", "w") as archive:
        archive.writestr("a.txt", "hello")
    assert problem(load, tmp_path, path="zip.npz").startswith("zip.npz: ")


FILES = {
    ("path", "nofile.csv"): "nofile.csv: no such file (looked for {folder}/nofile.csv)",
    ("path", "x.nyp"): "x.nyp: files of type '.nyp' are not read; allowed: .npz, .npy, .csv, .tsv, .parquet",
    ("path", "x"): "x: files of type 'no suffix' are not read; allowed: .npz, .npy, .csv, .tsv, .parquet",
    ("path", "sub.csv"): "sub.csv: this is a folder; name a file",
    ("path", "empty.npy"): "empty.npy: empty",
    ("path", "y.npy"): "y.npy: no such file (looked for {folder}/y.npy); did you mean 'x.npy'?",
}


@pytest.mark.parametrize("option", FILES, ids=[name for _, name in FILES])
def test_files_that_cannot_be_read(option, tmp_path):
    np.save(tmp_path / "x.npy", X)
    (tmp_path / "sub.csv").mkdir()
    (tmp_path / "empty.npy").touch()
    assert problem(load, tmp_path, path=option[1]) == FILES[option].format(folder=tmp_path)


def test_a_key_for_a_file_without_keys(tmp_path):
    np.save(tmp_path / "x.npy", X)
    assert problem(load, tmp_path, path="x.npy", key="x") == "data.key: x.npy holds one array only; leave the key out"


def test_relative_paths_start_at_the_given_folder(tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    np.save(tmp_path / "x.npy", X)
    assert len(File(tmp_path, path=Path("x.npy")).load()) == 4


def test_digits():
    grey, binary = Digits().load(), Digits(binarize=8.0).load()
    assert grey.x.shape == binary.x.shape == (1797, 8, 8)
    assert grey.labels is not None
    assert (grey.x.min(), grey.x.max()) == (0.0, 1.0)
    np.testing.assert_array_equal(binary.x, (grey.x >= 0.5).astype(np.float32))
    assert (Digits(scale=1.0).load().levels, grey.levels, binary.levels) == (17, None, 2)
    assert "leaves every pixel 0" in problem(Digits(binarize=17.0).load)


def test_linear_gaussian_data_follow_their_truth():
    dataset = LinearGaussianData(n=20_000, dim=4, latent_dim=2, noise=0.3, seed=3).load()
    truth = dataset.truth
    assert truth is not None
    x = torch.from_numpy(dataset.x)
    covariance = truth.W @ truth.W.T + truth.psi.diag()
    assert (torch.cov(x.T) - covariance).abs().max() < 5 * covariance.abs().max() * (2 / len(x)) ** 0.5
    assert (x.mean(0) - truth.mu).abs().max() < 5 * (covariance.diagonal().max() / len(x)).sqrt()
    again = LinearGaussianData(n=20_000, dim=4, latent_dim=2, noise=0.3, seed=3).load()
    np.testing.assert_array_equal(dataset.x, again.x)


def test_the_fingerprint_sees_values_shape_and_type(monkeypatch):
    whole = Dataset(X, "x").fingerprint()
    assert whole == Dataset(X.copy(), "y").fingerprint()
    assert len({whole, *(Dataset(x, "x").fingerprint() for x in (X + 1, X.reshape(3, 4), X.astype(np.float32)))}) == 4
    monkeypatch.setattr(chunks, "CHUNK", 3)
    assert Dataset(X, "x").fingerprint() == whole


def test_the_first_bad_row_is_found_in_any_part(monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK", 3)
    with pytest.raises(DataError, match=r"^x: an infinite value at row 3, column 2;"):
        Dataset(np.where(X == 11, np.inf, X), "x").check()


@pytest.mark.parametrize("chunk", [3, 2**22])
def test_missing_values_and_levels_are_found_in_any_part(chunk, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK", chunk)
    gap = np.where(X == 7, np.nan, X)
    assert (Dataset(X, "x").missing, Dataset(gap, "x").missing) == (False, True)
    assert Dataset(X.astype(np.int64), "x").missing is False
    Dataset(gap, "x").check()
    levels = {
        12: [X, gap, X.astype(np.uint8), X.reshape(2, 2, 3)],
        2: [X > 3, np.where(X > 3, 1.0, np.nan)],
        1: [X * 0],
        None: [X - 1, X + 0.5, np.where(X == 11, 0.5, X), -X.astype(np.int8)],
    }
    for wanted, arrays in levels.items():
        assert [Dataset(x, "x").levels for x in arrays] == [wanted] * len(arrays)


def test_some_rows_may_miss_a_column_of_which_all_rows_have_a_value(tmp_path):
    gap = np.where((X % 3 == 1) & (X < 9), np.nan, X)
    whole = Dataset(gap, "x", covariates=X[:, :1], covariate_names=("c",), exposure=X[:, 0] + 1, labels=np.arange(4))
    whole.check()
    for index in (np.array([2, 0]), slice(2)):
        some = whole.take(index)
        with pytest.raises(DataError, match="column 1 has no observed value"):
            some.check()
        some.check(whole=False)
        np.testing.assert_array_equal(some.covariates[:, 0], X[index, 0])
        np.testing.assert_array_equal(some.exposure, X[index, 0] + 1)
        np.testing.assert_array_equal(some.labels, np.arange(4)[index])
        assert len(some) == 2


BESIDE = {
    "x: an exposure must be above 0, it is 0 at row 0, column 'exposure'; correct it or remove the row": {"exposure": X[:, 0]},
    "x: an exposure must be above 0, it is inf at row 1, column 'exposure'; correct it or remove the row": {
        "exposure": np.array([1, np.inf, 1, 1])
    },
    "x: an exposure must be above 0, it is missing at row 2, column 'exposure'; fill it in or remove the row": {
        "exposure": np.array([1, 1, np.nan, 1])
    },
    "x: a covariate must be a finite number, it is missing at row 2, column 'b'; fill it in or remove the row": {
        "covariates": np.where(X == 7, np.nan, X),
        "covariate_names": ("a", "b", "c"),
    },
    "x: 3 rows of exposure for 4 of x; both need the same number": {"exposure": np.ones(3)},
}


@pytest.mark.parametrize("wanted", BESIDE)
def test_what_stands_beside_x_is_checked(wanted):
    assert problem(Dataset(X, "x", **BESIDE[wanted]).check) == wanted


def test_the_fingerprint_sees_what_stands_beside_x():
    beside = [{}, {"covariates": X}, {"covariates": X + 1}, {"exposure": X[:, 0]}, {"grey": X.astype(np.uint8)}]
    assert len({Dataset(X, "x", **more).fingerprint() for more in beside}) == len(beside)
    assert Dataset(X, "x", labels=X[:, 0]).fingerprint() == Dataset(X, "x").fingerprint()


@pytest.mark.parametrize("n", [3, 4, 10, 1797])
def test_split_is_a_partition_and_deterministic(n):
    first, second = split_rows(n, (0.6, 0.2, 0.2), 7), split_rows(n, (0.6, 0.2, 0.2), 7)
    parts = [first.train, first.validation, first.test]
    assert sorted(np.concatenate(parts).tolist()) == list(range(n))
    assert all(len(part) >= 1 and part.dtype == np.int64 for part in parts)
    for a, b in zip(parts, [second.train, second.validation, second.test], strict=True):
        np.testing.assert_array_equal(a, b)
    if n > 100:
        assert [len(p) for p in parts] == [n - 2 * round(n / 5), round(n / 5), round(n / 5)]
        assert not np.array_equal(first.test, split_rows(n, (0.6, 0.2, 0.2), 8).test)
        np.testing.assert_array_equal(first.test, split_rows(n, (0.8, 0.0, 0.2), 7).test)


def test_split_problems():
    assert problem(split_rows, 2, (0.6, 0.2, 0.2), 0, "x.csv") == (
        "x.csv: 2 rows; at least 3 are needed for train, validation and test"
    )
    assert problem(split_rows, 1, (0.6, 0.2, 0.2), 0, "x.csv").startswith("x.csv: 1 row; ")
    with pytest.raises(SpecError, match="must sum to 1, got 0.9"):
        split_rows(10, (0.5, 0.2, 0.2), 0)
