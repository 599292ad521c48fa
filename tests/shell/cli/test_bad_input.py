"""The table of bad input: every way to err that we know of, with its one line, exit code 2 and nothing left behind."""

from __future__ import annotations

import re
import resource
import shutil
import struct
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from support import killing

from elbowroom.cli.app import main
from elbowroom.run import fit
from elbowroom.spec import document

SPEC = {
    "data": {"name": "file", "path": "x.npy"},
    "model": {"latent_dim": 1, "likelihood": "bernoulli", "decoder": {"name": "mlp", "hidden": [5]}},
    "guide": {"encoder": {"name": "mlp", "hidden": [5]}},
    "fit": {"epochs": 2, "batch_size": 16, "device": "cpu"},
    "audit": {"draws": 200, "keep": 100},
}
NULL = "embedded null byte" if sys.version_info < (3, 13) else "lstat: embedded null character in path"  # Python's own words
X = (np.random.default_rng(0).random((40, 6)) < np.random.default_rng(1).random((40, 1))).astype(np.float32)


def bomb(path: str) -> None:
    """Write an .npz of a few kilobytes whose directory says that it holds 2 TB."""
    np.savez_compressed(path, x=np.zeros((1000, 10)))
    raw = bytearray(Path(path).read_bytes())
    at = raw.rindex(b"PK\x01\x02")
    extra = struct.pack("<HHQ", 1, 8, 2 * 10**12)
    name_length = struct.unpack_from("<H", raw, at + 28)[0]
    raw[at + 24 : at + 28] = b"\xff" * 4
    raw[at + 30 : at + 32] = struct.pack("<H", len(extra))
    raw[at + 46 + name_length : at + 46 + name_length] = extra
    end = raw.rindex(b"PK\x05\x06")
    raw[end + 12 : end + 16] = struct.pack("<I", struct.unpack_from("<I", raw, end + 12)[0] + len(extra))
    Path(path).write_bytes(raw)


def lie(path: str) -> None:
    """Write an .npz whose array claims to have 10^12 rows."""
    with zipfile.ZipFile(path, "w") as archive, archive.open("x.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, {"descr": "<f8", "fortran_order": False, "shape": (10**12, 6)})
        member.write(X.tobytes())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with specs and data of every bad kind, and run folders, whole and broken."""
    home = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        _data()
        _specs()
        fit("s.yaml", out="run").audit()
        _runs()
    return home


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    """A copy of that folder, as the working folder."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True, symlinks=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _data() -> None:
    np.save("x.npy", X)
    np.save("grey.npy", X / 2)
    np.save("nan.npy", np.where(np.arange(6) == 2, np.nan, X))
    np.save("inf.npy", np.where(np.arange(240).reshape(40, 6) == 15, np.inf, X))
    np.save("one.npy", X[:1])
    np.save("narrow.npy", X[:, :5])
    np.save("none.npy", X[:0])
    np.save("flat.npy", X[0])
    np.save("text.npy", X.astype(str))
    np.save("complex.npy", X * 1j)
    np.save("big.npy", np.where(np.arange(240).reshape(40, 6) == 14, 1e300, X.astype(float)))
    np.save("two.npy", X + 1)
    np.save("objects.npy", np.array([[None, 1]]), allow_pickle=True)
    Path("short.npy").write_bytes(Path("x.npy").read_bytes()[:-50])
    Path("empty.npy").touch()
    np.savez("many.npz", a=X, b=X)
    np.savez("objects.npz", x=np.array([[None, 1]]))
    np.savez("short.npz", x=X)
    Path("short.npz").write_bytes(Path("short.npz").read_bytes()[:-50])
    bomb("bomb.npz")
    lie("lie.npz")
    Path("ragged.csv").write_text("a,b\n1,0\n1\n")
    Path("text.csv").write_text("a,b\n1,0\n1,high\n")
    Path("gap.csv").write_text("a,b\n1,\n1,\n")
    Path("head.csv").write_text("a,b\n")
    Path("latin.csv").write_bytes("größe\n1\n".encode("latin-1"))
    Path("x.mat").write_text("1")


def _specs() -> None:
    def write(name: str, **changes: object) -> None:
        Path(name).write_text(document.write({**SPEC, **changes}))

    write("s.yaml")
    write("newer.yaml", schema=2)
    write("extra.yaml", modle=1)
    write("typed.yaml", fit={"epochs": "ten"})
    write("range.yaml", fit={"learning_rate": 0})
    write("deep.yaml", guide={"encoder": {"name": "mlp", "hiden": [5]}})
    write("list.yaml", guide=[1])
    write("nodata.yaml", data={"name": "file", "path": "y\0.npy"})
    Path("broken.yaml").write_text("data: [1,\n")
    Path("twice.yaml").write_text("seed: 1\nseed: 2\n")
    Path("tab.yaml").write_text("data:\n\tname: digits\n")
    Path("code.yaml").write_text("data: !!python/object/apply:os.system [touch owned]\n")
    Path("alias.yaml").write_text("a: &a [1]\nb: [*a, *a]\n")
    Path("binary.yaml").write_bytes(b"\xff\xfe\x00")
    Path("empty.yaml").touch()
    Path("words.yaml").write_text("just words\n")
    Path("sub").mkdir()


def _runs() -> None:
    def broken(name: str, *gone: str) -> Path:
        shutil.copytree("run", name)
        for file in gone:
            (Path(name) / file).unlink()
        return Path(name)

    def cut(name: str, file: str) -> None:
        path = broken(name) / file
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    for name, file in {
        "cut_weights": "weights.pt", "cut_audit": "audit.nc", "cut_latent": "latent.nc", "cut_split": "split.npz",
        "cut_posterior": "posteriors/grid.nc", "cut_checkpoint": "checkpoint.pt",
    }.items():  # fmt: skip
        cut(name, file)
    broken("no_weights", "weights.pt")
    broken("no_audit", "audit.nc")
    broken("no_split", "split.npz")
    torch.save({"a": torch.zeros(2)}, broken("other_weights") / "weights.pt")
    torch.save(
        {**torch.load("run/weights.pt", weights_only=True), "decoder.body.2.bias": torch.full((6,), torch.nan)},
        broken("nan_weights") / "weights.pt",
    )
    torch.save(Path("x"), broken("pickled") / "weights.pt")
    with (
        zipfile.ZipFile("run/weights.pt") as whole,
        zipfile.ZipFile(broken("packed") / "weights.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for info in whole.infolist():
            packed.writestr(info.filename, whole.read(info))
    (broken("no_history") / "history.csv").write_text("")
    with h5py.File(broken("huge") / "latent.nc", "w") as file:
        file.create_dataset("x", shape=(10**12,), dtype="f8", chunks=(1000,))
    text = Path("run/spec.yaml").read_text()
    for name, (old, new) in {
        "tampered": ("hidden: [5]", "hidden: [6]"), "newer": ("schema: 1", "schema: 9"),
        "plain": (text[text.index("record:") :], ""),
        "newer_record": ("record:\n", "record:\n  signature: x\n"), "wrong_record": ("event_shape: [6]", "event_shape: six"),
    }.items():  # fmt: skip
        assert old in text
        (broken(name) / "spec.yaml").write_text(text.replace(old, new))
    shutil.copytree("run", "another")
    Path("another/spec.yaml").write_text(text)


def listing(path: Path) -> dict[str, int]:
    """Return every file and folder below a path, with the time of its last change."""
    return {str(p.relative_to(path)): p.lstat().st_mtime_ns for p in path.rglob("*") if not p.is_dir()}


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    return stop.value.code


BAD = {
    "run": "missing argument 'SPEC'; see `elbowroom run --help`",
    "rnu": "no such command 'rnu'; did you mean 'run'; see `elbowroom --help`",
    "run s.yaml --ot x": "no such option --ot; did you mean '--out'; see `elbowroom run --help`",
    "run s.yaml --set": "option '--set' requires an argument; see `elbowroom --help`",
    "run s.yaml extra": "got unexpected extra argument (extra); see `elbowroom run --help`",
    "run nowhere.yaml": "nowhere.yaml: no such spec; `elbowroom spec init` copies one of those that come with elbowroom",
    "run broken.yaml": "broken.yaml, line 2, column 1: expected the node content, but found '<stream end>'",
    "run twice.yaml": "twice.yaml, line 2, column 1: the key 'seed' appears twice",
    "run s.yaml --set model.latentdim=2": "--set model.latentdim: unknown; did you mean 'latent_dim'?",
    "run s.yaml --set model.likelihood=bernuli": "--set model.likelihood: unknown likelihood 'bernuli'; "
    "did you mean 'bernoulli'?",
    "run s.yaml --set fit.epochs=ten": "--set fit.epochs: must be a whole number, got 'ten'",
    "run s.yaml --set seed=1 --set seed=2": "--set seed: given twice",
    "run s.yaml --set fit.device=cpu --device cpu": "--set fit.device: given twice",
    "run s.yaml --device tpu": "s.yaml: fit.device: must be auto, cpu, cuda or cuda:NUMBER, got 'tpu'",
    "run s.yaml --set model.latent_dim=7 --set audit.references=grid": "s.yaml: audit.references: grid needs at most 3 "
    "latent dimensions, model.latent_dim is 7; use auto",
    "run s.yaml --set audit.references=closed_form": "s.yaml: audit.references: closed_form needs model.decoder = linear, "
    "it is mlp; use auto",
    "run s.yaml --set audit.observations=9": "s.yaml: audit.observations: the test split has 8 rows, not 9; use all",
    "run s.yaml --set model.decoder.hidden=8,-1": "--set model.decoder.hidden.1: must be at least 1, got -1",
    "run s.yaml --set data.path=y.npy": "y.npy: no such file (looked for {here}/y.npy); did you mean 'x.npy'?",
    "run s.yaml --set data.path=nan.npy": "nan.npy: column 2 has no observed value; remove the column",
    "run s.yaml --set data.path=one.npy": "one.npy: 1 row; at least 3 are needed for train, validation and test",
    "run s.yaml --set data.path=objects.npy": "objects.npy: holds Python objects, which are never loaded; "
    "save numbers: np.save(file, x.astype(float))",
    "run s.yaml --set data.path=ragged.csv": "ragged.csv: line 3 has 1 cell, the lines before it have 2; "
    "every line needs the same",
    "run s.yaml --set data.path=text.csv": "text.csv: line 3, column 'b': the text 'high' is no number, "
    "and other cells of the column are; correct it, or declare the column categorical in data.kinds",
    "run s.yaml --set data.path=grey.npy": "s.yaml: data: bernoulli needs 0 or 1, found 0.5 at row {grey}: binarize the data "
    "(data.binarize = a threshold), or use model.likelihood = continuous_bernoulli for values in [0, 1]",
    "run s.yaml --overwrite --resume": "--overwrite and --resume contradict each other: one starts anew, the other goes on",
    "run s.yaml --out x.npy": "x.npy: this is a file; name a folder with --out",
    "fit s.yaml --out .": ".: is not empty and not a run folder (it has no spec.yaml); name another with --out",
    "fit .": ".: this is a folder; name the spec file",
    "audit nowhere": "nowhere: no such run folder (no spec.yaml); make one with `elbowroom fit SPEC`",
    "audit .": ".: is not a run folder (no spec.yaml); make one with `elbowroom fit SPEC`",
    "report nowhere": "nowhere: no audit.nc here; run `elbowroom audit nowhere` first",
    "components likelihod": "unknown kind of component 'likelihod'; did you mean 'likelihood'?",
    "spec init digit": "there is no spec 'digit' in elbowroom; did you mean 'digits'?",
    "spec init digits --out s.yaml": "s.yaml: is there already; use --overwrite or another --out",
    "spec show s.yaml --set sed=1": "--set sed: unknown; did you mean 'seed'?",
    "spec shw": "no such command 'shw'; did you mean 'show'; see `elbowroom spec --help`",
    # specs
    "run newer.yaml": "newer.yaml: schema: 2 is newer than this elbowroom, which reads 1; upgrade elbowroom",
    "run extra.yaml": "extra.yaml: modle: unknown; did you mean 'model'?",
    "run typed.yaml": "typed.yaml: fit.epochs: must be a whole number, got 'ten'",
    "run range.yaml": "range.yaml: fit.learning_rate: must be greater than 0, got 0",
    "run deep.yaml": "deep.yaml: guide.encoder.hiden: unknown option of mlp; did you mean 'hidden'?",
    "run list.yaml": "list.yaml: guide: must be a block of `key: value` lines, got [1]",
    "run nodata.yaml": f"nodata.yaml: data: {NULL}",
    "run tab.yaml": "tab.yaml, line 2, column 1: found character '\\t' that cannot start any token",
    "run code.yaml": "code.yaml, line 1, column 7: the tag tag:yaml.org,2002:python/object/apply:os.system is not allowed",
    "run alias.yaml": "alias.yaml, line 1, column 4: anchors and aliases are not allowed",
    "run binary.yaml": "binary.yaml: not a text file in UTF-8 (byte 0)",
    "run empty.yaml": "empty.yaml: empty; `elbowroom spec init` copies a spec that comes with elbowroom",
    "run words.yaml": "words.yaml: a spec is a block of `key: value` lines, this is 'just words'",
    "run sub": "sub: this is a folder; name the spec file",
    "run s.yaml --set seed=99999999999999999999": "--set seed, line 1, column 1: this number has too many digits",
    "run s.yaml --set seed=3000000000": "--set seed: must be less than 2147483648, got 3000000000",
    "run s.yaml --set fit.learning_rate=.nan": "--set fit.learning_rate: must be finite, got nan",
    "run s.yaml --set model.latent_dim=0": "--set model.latent_dim: must be at least 1, got 0",
    "run s.yaml --set audit.draws=9999999999": "--set audit.draws: must be at most 1000000, got 9999999999",
    "run s.yaml --set audit.keep=1": "--set audit.keep: must be at least 100, got 1",
    "run s.yaml --set audit.references=grid,grid": "s.yaml: audit.references: grid is given twice",
    "run s.yaml --set data.split=0.5,0.5": "--set data.split: must be a list of at least 3, got [0.5, 0.5]",
    "run s.yaml --set data.split=0.5,0.5,0.5": "s.yaml: data.split: train, validation and test must sum to 1, got 1.5",
    "run s.yaml --set data.split=0.8,0,0.2 --set fit.patience=2": (
        "s.yaml: fit.patience: there are no validation data to judge by (data.split); leave it out"
    ),
    "run s.yaml --set model.likelihood.scale=1": "--set model.likelihood.scale: bernoulli takes no options",
    "run s.yaml --set model.decoder.hidden=500000,500000": (
        "s.yaml: model: these networks need 4,000 GB to train, and this machine has N GB of memory; choose "
        "smaller hidden layers or fewer latents"
    ),
    "run s.yaml --set model.latent_dim=4000000000000000000": (
        "s.yaml: model: these networks need more memory than there is, and this machine has N GB of memory;"
        " choose smaller hidden layers or fewer latents"
    ),
    "run s.yaml --set data=linear_gaussian --set data.n=100000000000": (
        "s.yaml: data: linear_gaussian unpacks to 24,000 GB, and this machine has N GB of memory; make n or dim smaller"
    ),
    "run s.yaml --set data=digits --set data.binarize=99": (
        "s.yaml: data.binarize: 99 leaves every pixel 0: pixels go from 0 to 16"
    ),
    "run s.yaml --set data=digits": (
        "s.yaml: data: bernoulli needs 0 or 1, found 0.3125 at row 0, column (0, 2) (48280 such entries): "
        "binarize the data (data.binarize = a threshold), or use model.likelihood = continuous_bernoulli "
        "for values in [0, 1]"
    ),
    "run s.yaml --set seed": "--set seed: write it as key=value with a dotted key, e.g. --set model.latent_dim=2",
    "run s.yaml --set seed=[1": "--set seed, line 1, column 3: expected ',' or ']', but got '<stream end>'",
    # data
    "run s.yaml --set data.path=inf.npy": (
        "inf.npy: an infinite value at row 2, column 3; correct it, or make it NaN, which is read as missing"
    ),
    "run s.yaml --set data.path=none.npy": "none.npy: empty, shape (0, 6); at least 3 rows of one number are needed",
    "run s.yaml --set data.path=flat.npy": "flat.npy: rows and columns are needed, this array is flat; reshape it to (6, 1)",
    "run s.yaml --set data.path=text.npy": "text.npy: numbers are needed, this array holds text; convert it to float first",
    "run s.yaml --set data.path=complex.npy": (
        "complex.npy: numbers are needed, this array holds complex numbers; convert it to float first"
    ),
    "run s.yaml --set data.path=two.npy": (
        "s.yaml: data: bernoulli needs 0 or 1, found 2 at row 0, column 1 (116 such entries): binarize the "
        "data (data.binarize = a threshold), or use model.likelihood = continuous_bernoulli for values in "
        "[0, 1]"
    ),
    "run s.yaml --set data.path=two.npy --set model.likelihood=continuous_bernoulli": (
        "s.yaml: data: continuous_bernoulli needs values in [0, 1], found 2 at row 0, column 1 (116 such "
        "entries): divide the data by their largest possible value (data.scale), or use model.likelihood = "
        "gaussian"
    ),
    "run s.yaml --set data.path=big.npy --set model.likelihood=gaussian": (
        "s.yaml: big.npy: 1e+300 at row 2, column 2 is too large for float32; rescale the data or use fit.dtype = float64"
    ),
    "run s.yaml --set data.path=short.npy": "short.npy: damaged or cut short (...",
    "run s.yaml --set data.path=empty.npy": "empty.npy: empty",
    "run s.yaml --set data.path=many.npz": "many.npz: holds a, b; say which with data.key",
    "run s.yaml --set data.path=many.npz --set data.key=c": "many.npz: data.key: there is no array 'c'; allowed: a, b",
    "run s.yaml --set data.path=objects.npz": (
        "objects.npz: holds Python objects, which are never loaded; save numbers: np.save(file, x.astype(float))"
    ),
    "run s.yaml --set data.path=short.npz": "short.npz: damaged or cut short (...",
    "run s.yaml --set data.path=bomb.npz": (
        "bomb.npz: x unpacks to 2,000 GB, and this machine has N GB of memory; save it as .npy, which is read piece by piece"
    ),
    "run s.yaml --set data.path=lie.npz": (
        "lie.npz: damaged or cut short (x should take 48,000 GB, it holds 1.1 kB); write it again"
    ),
    "run s.yaml --set data.path=gap.csv": "gap.csv: column 'b' has no observed value; leave it out of data.x, or remove it",
    "run s.yaml --set data.path=head.csv": "head.csv: a header and no rows",
    "run s.yaml --set data.path=latin.csv": "latin.csv: not a text file in UTF-8 (byte 2); export it as UTF-8",
    "run s.yaml --set data.path=x.mat": "x.mat: files of type '.mat' are not read; allowed: .npz, .npy, .csv, .parquet",
    "run s.yaml --set data.path=sub": "sub: files of type 'no suffix' are not read; allowed: .npz, .npy, .csv, .parquet",
    "run s.yaml --set data.key=a": "s.yaml: data.key: x.npy holds one array only; leave the key out",
    "audit run --data narrow.npy": "narrow.npy: each datum has shape (5,), the model expects (6,)",
    "audit run --data grey.npy": (
        "grey.npy: bernoulli needs 0 or 1, found 0.5 at row 0, column 1 (116 such entries): binarize the "
        "data (data.binarize = a threshold), or use model.likelihood = continuous_bernoulli for values in "
        "[0, 1]"
    ),
    "audit run --data nowhere.npy": "nowhere.npy: no such file (looked for {here}/nowhere.npy); did you mean 'none.npy'?",
    "audit run --data bomb.npz": (
        "bomb.npz: x unpacks to 2,000 GB, and this machine has N GB of memory; save it as .npy, which is read piece by piece"
    ),
    # run folders
    "audit cut_weights": "cut_weights/weights.pt: damaged (...",
    "audit cut_split": "cut_split/split.npz: damaged (...",
    "audit no_weights": "no_weights/weights.pt: missing: the fit has not ended; go on with `elbowroom fit SPEC --resume`",
    "audit no_split": "no_split/split.npz: missing; go on with `elbowroom fit SPEC --resume`",
    "audit other_weights": 'other_weights/weights.pt: does not belong to this spec (Unexpected key(s) in state_dict: "a".)',
    "audit nan_weights": "nan_weights/weights.pt: does not belong to this spec (decoder.body.2.bias is not finite)",
    "audit pickled": "pickled/weights.pt: damaged (...",
    "audit packed": "packed/weights.pt: damaged (archive/data.pkl is packed, which PyTorch never does); fit again with "
    "--overwrite",
    "audit tampered": "tampered/spec.yaml: was changed after the fit; fit again with --overwrite",
    "audit newer": "newer/spec.yaml: schema: 9 is newer than this elbowroom, which reads 1; upgrade elbowroom",
    "audit plain": "plain/spec.yaml: has no record of a run; this is a spec, fit it with `elbowroom fit`",
    "audit newer_record": "newer_record/spec.yaml: record.signature: unknown (written by elbowroom {version}, this is "
    "{version}); upgrade elbowroom",
    "audit wrong_record": "wrong_record/spec.yaml: record.event_shape: must be a list such as [64, 64], got 'six'",
    "audit run --set seed=3": "--set seed: the run is fitted; only audit.* can be set for it",
    "audit run --set audit.observations=99": "audit.observations: there are 8 rows, not 99; use all",
    "audit run --out another": "another: is another run's folder; name another with --out",
    "audit run --data x.npy --out run": "run: holds the audit of the run's own test data; name another with --out",
    "fit s.yaml --resume --out cut_checkpoint": "cut_checkpoint/checkpoint.pt: is not a readable checkpoint (...",
    "fit s.yaml --resume --out plain": (
        "plain: belongs to another experiment (other data); use --overwrite to move it aside, or another --out"
    ),
    "fit s.yaml --resume --out tampered": "tampered/spec.yaml: was changed after the fit; fit again with --overwrite",
    "fit s.yaml --resume --out run --set seed=1": (
        "run: belongs to another experiment (seed is 0 there, 1 here); use --overwrite to move it aside, or another --out"
    ),
    "fit s.yaml --resume --out run --set fit.epochs=3": (
        "run: belongs to another experiment (fit.epochs is 2 there, 3 here); use --overwrite to move it aside, or another --out"
    ),
    "report run/weights.pt": "run/weights.pt: no audit.nc here; run `elbowroom audit run/weights.pt` first",
    "report no_audit": "no_audit: no audit.nc here; run `elbowroom audit no_audit` first",
    "report cut_audit": "cut_audit/audit.nc: damaged (...",
    "report cut_latent": "cut_latent/latent.nc: damaged (...",
    "report cut_posterior": "cut_posterior/posteriors/grid.nc: damaged (...",
    "report cut_split": "cut_split/split.npz: damaged (...",
    "report huge": "huge/latent.nc: unpacks to 8,000 GB, and this machine has N GB of memory; make it anew with fewer draws",
    "report no_history": "no_history/history.csv: damaged (...",
    # disk
    "run s.yaml --out x.npy/run": (
        "x.npy/run: cannot be written ({here}/x.npy is not a writable folder); name another with --out"
    ),
    "audit run --out x.npy": "x.npy: this is a file; name a folder with --out",
    "spec init digits --out x.npy/s.yaml": "x.npy: File exists",
    "run s.yaml --out " + "n" * 300: "n" * 300 + ": File name too long",
    # flags
    "run s.yaml --budget soon": "--budget: must be a time above 0, such as 90s, 10m or 1h, or none, got 'soon'",
    "run s.yaml --budget -5": "--budget: must be a time above 0, such as 90s, 10m or 1h, or none, got '-5'",
    "run s.yaml --budget 0s": "--budget: must be a time above 0, such as 90s, 10m or 1h, or none, got '0s'",
    "audit run --budget 1d": "--budget: must be a time above 0, such as 90s, 10m or 1h, or none, got '1d'",
    "audit run --budget -5": "--budget: must be a time above 0, such as 90s, 10m or 1h, or none, got '-5'",
    "audit run --budget 0": "--budget: must be a time above 0, such as 90s, 10m or 1h, or none, got '0'",
    "audit run --budget inf": "--budget: must be a time above 0, such as 90s, 10m or 1h, or none, got 'inf'",
    "run s.yaml --set audit.budget=often": (
        "--set audit.budget: must be a time above 0, such as 90s, 10m or 1h, or none, got 'often'"
    ),
    "run s.yaml --budget 1m --set audit.budget=2m": "--set audit.budget: given twice",
    "run s.yaml --budget": "option '--budget' requires an argument; see `elbowroom --help`",
    "run s.yaml --device cuda": "s.yaml: fit.device: 'cuda' was asked for, but torch sees 0 CUDA devices; use auto or cpu",
    "run s.yaml --device cuda:7": "s.yaml: fit.device: 'cuda:7' was asked for, but torch sees 0 CUDA devices; use auto or cpu",
    "fit s.yaml --json --overwrite --resume": (
        "--overwrite and --resume contradict each other: one starts anew, the other goes on"
    ),
    "run s.yaml --out . --overwrite": ".: is not empty and not a run folder (it has no spec.yaml); name another with --out",
    "run run/spec.yaml --out run": (
        "run: holds a run already; use --resume to go on, --overwrite to move it aside, or another --out"
    ),
    "audit run --resume --overwrite": (
        "no such option --overwrite; allowed: --allow-python, --budget, --data, --device, --dry-run, --json, --out, --profile, "
        "--profile-functions, --resume, --set; see `elbowroom audit --help`"
    ),
    "report run --resume": (
        "no such option --resume; allowed: --json, --profile, --profile-functions; see `elbowroom report --help`"
    ),
    "audit": "missing argument 'RUN'; see `elbowroom audit --help`",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_input_is_one_line_and_leaves_nothing_behind(line, made, monkeypatch, capsys):
    monkeypatch.chdir(made)
    before = listing(made)
    assert call(*line.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("elbowroom: ")
    assert err.count("\n") == 1, err
    row, column = np.argwhere(X != 0)[0]
    grey = f"{row}, column {column} ({int((X != 0).sum())} such entries)"
    wanted = BAD[line].format(here=made, grey=grey, version=metadata.version("elbowroom"))
    said = re.sub(r"this machine has [\d.,]+ GB", "this machine has N GB", err.removeprefix("elbowroom: ").strip())
    if wanted.endswith("..."):  # the rest is PyTorch's, NumPy's or HDF5's
        assert said.startswith(wanted.removesuffix("..."))
    else:
        assert said == wanted
    assert listing(made) == before


def test_the_table_is_long_enough():
    assert len(BAD) >= 60


LINES = ["fit s.yaml --out new", "audit run", pytest.param("report run", marks=pytest.mark.slow)]


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("limit", [1000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_a_full_disk_is_one_line_and_no_half_written_file(line, limit, here, capsys):
    """A limit on the size of files stands for a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        code = call(*line.split())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    err = capsys.readouterr().err.splitlines()
    assert code == 2
    assert err[-1].startswith("elbowroom: ")
    assert err[-1].endswith(": File too large")
    assert killing.unreadable(here / line.split()[-1]) == []
    assert call(*line.split(), *(["--resume"] if line.startswith("fit") else [])) == 0
