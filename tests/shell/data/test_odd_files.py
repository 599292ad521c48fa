"""Files that are not what they are called, that are no files, and values that are no numbers: one line each, with a cure."""

from __future__ import annotations

import datetime
import os
import struct
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse

from elbowroom.cli.app import main
from elbowroom.data.file import File
from elbowroom.data.frames import from_frame, from_python
from elbowroom.errors import LONGEST, DataError, UserError, shortened

X = np.arange(30.0).reshape(10, 3)


def array(path: Path, shape: str, descr: str = "<f8") -> None:
    """Write an .npy file whose header has this shape."""
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + X.tobytes())


def archive(path: Path, shape: str) -> None:
    """Write an .npz file of which one header has this shape."""
    import zipfile

    array(path.with_name("member.npy"), shape)
    with zipfile.ZipFile(path, "w") as file:
        file.write(path.with_name("member.npy"), "x.npy")


def renamed(path: Path, suffix: str) -> None:
    (np.save if suffix == ".npy" else np.savez)(path.with_suffix(suffix), X)
    path.with_suffix(suffix).rename(path)


def sparse(path: Path) -> None:
    scipy.sparse.save_npz(path, scipy.sparse.csr_matrix(X))


ODD = {
    "renamed.npy": (lambda p: renamed(p, ".npz"), "not an .npy file: it is an archive of arrays, call it .npz"),
    "renamed.npz": (lambda p: renamed(p, ".npy"), "not an .npz file: it is one array, call it .npy"),
    "text.npy": (lambda p: p.write_text("1,2\n3,4\n"), "damaged or cut short (it does not begin like an .npy file)"),
    "text.npz": (lambda p: p.write_text("1,2\n3,4\n"), "damaged or cut short (it does not begin like an .npz file)"),
    "sparse.npz": (sparse, "np.save('x.npy', scipy.sparse.load_npz('sparse.npz').toarray())"),
    "pipe.csv": (os.mkfifo, "this is a pipe, not a file; write what it gives to a file first"),
    "pipe.npy": (os.mkfifo, "this is a pipe, not a file; write what it gives to a file first"),
    "zero.npz": (lambda p: p.symlink_to("/dev/zero"), "files of type 'no suffix' are not read"),
    "folder.npy": (Path.mkdir, "this is a folder; name a file"),
    "loop.csv": (lambda p: p.symlink_to(p.name), "cannot be read"),
    "inside.csv/x.csv": (lambda p: p.parent.touch(), "cannot be read: Not a directory"),
    f"{'n' * 300}.csv": (lambda p: None, "ile name too long"),
    "~nosuchuser/x.csv": (lambda p: None, "~nosuchuser/x.csv: cannot be read: could not determine home directory"),
    **{f"{i}.npy": ((lambda s: lambda p: array(p, s))(shape), ": ") for i, shape in enumerate(
        ("(-1, 3)", "(10, -3)", "(2**70, 3)", f"({2**62}, 3)", f"({2**63}, 3)", f"({2**40}, 3)", "(1.5, 3)", "('a',)", "5"))},
    **{f"{i}.npz": ((lambda s: lambda p: archive(p, s))(shape), ": ") for i, shape in enumerate(
        ("(-1, 3)", "(-10, -3)", f"({2**62}, 3)", f"({2**63}, {2**63})", f"({2**40}, 3)", "(1.5, 3)", "5"))},
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_an_odd_file_is_refused_in_one_line(name, tmp_path):
    make, wanted = ODD[name]
    make(tmp_path / name)
    with pytest.raises(DataError) as refused:
        File(tmp_path, path=Path(name)).load()
    assert str(refused.value).startswith(name)
    assert "\n" not in str(refused.value)
    assert wanted in str(refused.value)


@pytest.mark.parametrize("make", [scipy.sparse.csr_matrix, scipy.sparse.coo_matrix, scipy.sparse.csc_array])
def test_a_sparse_matrix_is_refused_with_a_cure_that_works(make):
    with pytest.raises(DataError, match=r"^data: this is a sparse matrix .*; hand over an array: x\.toarray\(\)$"):
        from_python(make(X))
    assert np.array_equal(from_python(make(X).toarray()).x, X)


CELLS = {
    "dates": datetime.date(2024, 1, 1),
    "durations": datetime.timedelta(seconds=1),
    "lists": [1.0, 2.0],
    "records": {"a": 1},
    "bytes": b"a",
    "complex numbers": 1j,
}


@pytest.mark.parametrize("what", CELLS)
def test_cells_that_are_no_numbers_are_refused_by_column_with_a_cure(what):
    frame = pd.DataFrame({"v": pd.Series([CELLS[what]] * 5, dtype=object), "w": range(5)})
    with pytest.raises(DataError, match=rf"^t: column 'v' holds {what}, such as .*; .*, or leave it out of data\.x$"):
        from_frame(frame, "t")


def test_decimals_are_numbers():
    frame = pd.DataFrame({"v": [Decimal("1.5"), None, Decimal("NaN"), Decimal("-2")]})
    assert np.array_equal(from_frame(frame, "t").x[:, 0], [1.5, np.nan, np.nan, -2], equal_nan=True)


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("spec show /dev/zero", "/dev/zero: this is a device, not a file"),
        ("run pipe", "pipe: this is a pipe, not a file"),
        ("run large.yaml", "large.yaml: more than 1,000,000 bytes: this is not a spec"),
        ("run loop", "loop: cannot be read: Too many levels of symbolic links"),
        ("audit file/x", "file/x: no such run folder"),
        ("spec init digits --overwrite --out pipe", "pipe: this is no regular file; name another"),
        ("spec init digits --out file/x.yaml", "file"),
        ("spec init digits --out loop/x.yaml", "loop"),
        (f"spec init digits --out {'n' * 300}", "n" * 100),
        ("spec show a\0b", "'a\\x00b': holds a NUL character"),
    ],
)
def test_a_path_that_is_no_file_is_one_line(line, wanted, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    Path("large.yaml").write_bytes(b"#" * 1_000_001)
    Path("loop").symlink_to("loop")
    Path("file").touch()
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(SystemExit) as stop:
        main(line.split(" "))
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith(f"elbowroom: {wanted}")
    assert err.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_long_message_keeps_its_begin_and_its_end():
    told = shortened("x.csv: " + "a" * 500 + "; write it again")
    assert len(told) == LONGEST
    assert told.startswith("x.csv: a")
    assert told.endswith("a; write it again")
    assert shortened("short") == "short"
    assert str(UserError("a\x1b[31m\nb\0")) == "a\\x1b[31m b\\x00"


@pytest.mark.parametrize("line", ["score run x2.npy", "explain run", "audit run", "encode run"])
def test_a_run_without_its_data_says_how_to_hand_rows_over(line, tmp_path, monkeypatch, capsys):
    from elbowroom.run import fit

    monkeypatch.chdir(tmp_path)
    np.save("x.npy", X)
    np.save("x2.npy", X[:2])
    data, model = "data: {name: file, path: x.npy}", "model: {latent_dim: 1, likelihood: gaussian}"
    Path("s.yaml").write_text(f"{data}\n{model}\nfit: {{epochs: 1, device: cpu}}\n")
    fit("s.yaml", out="run")
    Path("x.npy").unlink()
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(line.split())
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert f"{tmp_path}/x.npy: no such file" in err
    assert "or from Python er.Run.load(run, data=...); or name other rows: DATA, and --calibration FILE of score" in err
