"""Ways to tamper with a run folder, chosen by a seed: what somebody else's folder may hold."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import h5py
import numpy as np
import torch

from elbowroom.spec import document

FILES = (
    "weights.pt", "split.npz", "spec.yaml", "audit.nc", "latent.nc", "diagnosis.nc", "history.csv", "audit.csv",
    "posteriors/guide.nc", "posteriors/grid.nc",
)  # fmt: skip
SHAPES = ("six", [], [0], [-5], [5, 5], [2**62], [5.5], None, [10**6, 10**6])
ODD = (
    None,
    "x",
    -1,
    0,
    2**62,
    [],
    {},
    [[]],
    1e300,
    True,
    {"x": 1},
    {"x": ["a"]},
    {"levels": {"0": 3}},
    {"kinds": {"0": "odd"}},
)


def tamper(run: Path, seed: int) -> str:
    """Change one thing in a run folder; return what was changed."""
    rng = np.random.default_rng(seed)
    kinds = (_bytes, _bytes, _replaced, _weights, _weights, _split, _shape, _record, _netcdf, _netcdf, _links)
    return kinds[seed % len(kinds)](run, rng)


def _bytes(run: Path, rng: np.random.Generator) -> str:
    """Cut a file, or change, insert or remove some of its bytes."""
    path = run / str(rng.choice([name for name in FILES if (run / name).is_file()]))
    raw, how = bytearray(path.read_bytes()), int(rng.integers(4))
    at = int(rng.integers(len(raw)))
    if how == 0:
        del raw[at:]
    elif how == 1:
        for place in rng.integers(len(raw), size=8):
            raw[place] = int(rng.integers(256))
    elif how == 2:
        raw[at:at] = rng.bytes(20)
    else:
        del raw[at : at + 20]
    path.write_bytes(raw)
    return f"{path.name}: bytes, way {how}"


def _replaced(run: Path, rng: np.random.Generator) -> str:
    """Put something else in place of a file."""
    path = run / str(rng.choice([name for name in FILES if (run / name).is_file()]))
    how = str(rng.choice(["gone", "empty", "folder", "pipe", "loop", "text"]))
    path.unlink()
    if how == "empty":
        path.touch()
    elif how == "folder":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "loop":
        path.symlink_to(path.name)
    elif how == "text":
        path.write_text("a,b\n1,2\n")
    return f"{path.name}: {how}"


def _weights(run: Path, rng: np.random.Generator) -> str:
    """Change one tensor of the weights."""
    state = torch.load(run / "weights.pt", weights_only=True)
    name = str(rng.choice(list(state)))
    old = state[name]
    changed = {
        "complex": lambda: old * 1j,
        "huge": lambda: old.double() + 1e300,
        "large": lambda: torch.full_like(old, 1e30),
        "int64": lambda: (100 * old).long(),
        "half": lambda: old.half(),
        "shape": lambda: old[None],
        "none": lambda: old[:0] if old.dim() else old[None][:0],
        "text": lambda: "x",
        "list": lambda: [1.0],
        "nan": lambda: old * torch.nan,
    }
    how = str(rng.choice(list(changed)))
    torch.save({**state, name: changed[how]()}, run / "weights.pt")
    return f"weights.pt: {name} {how}"


def _split(run: Path, rng: np.random.Generator) -> str:
    """Change the row numbers of a split."""
    rows = dict(np.load(run / "split.npz"))
    name = str(rng.choice(list(rows)))
    old = rows[name]
    changed = {
        "out of range": old + 1000,
        "huge": old + 2**62,
        "negative": -old - 1,
        "repeated": np.concatenate([old, old]),
        "of another part": rows["train"] if name != "train" else rows["test"],
        "real": old + 0.5,
        "complex": old * 1j,
        "flat": old[None],
        "none": old[:0],
        "text": old.astype(str),
        "unsigned": old.astype(np.uint64) + np.uint64(2**63),
    }
    how = str(rng.choice(list(changed)))
    np.savez(run / "split.npz", **{**rows, name: changed[how]})
    return f"split.npz: {name} {how}"


def _shape(run: Path, rng: np.random.Generator) -> str:
    return _set(run, "event_shape", SHAPES[int(rng.integers(len(SHAPES)))])


def _record(run: Path, rng: np.random.Generator) -> str:
    """Change the layout, or another entry of the record."""
    record = document.read(run / "spec.yaml")["record"]
    key = "layout" if rng.random() < 0.5 else str(rng.choice(list(record)))
    return _set(run, key, ODD[int(rng.integers(len(ODD)))])


def _set(run: Path, key: str, value: object) -> str:
    tree = document.read(run / "spec.yaml")
    tree["record"][key] = value
    (run / "spec.yaml").write_text(document.write(tree))
    return f"spec.yaml: record.{key} = {value!r}"


def _netcdf(run: Path, rng: np.random.Generator) -> str:
    """Remove, rename or change a variable or an attribute of a netCDF file."""
    names = [name for name in ("audit.nc", "audit.nc", *FILES) if name.endswith(".nc") and (run / name).is_file()]
    path = run / str(rng.choice(names))
    with h5py.File(path, "r+") as file:
        places: list[str] = []
        file.visititems(lambda name, item: places.append(name) if isinstance(item, h5py.Dataset) else None)
        place, how = str(rng.choice(places)), str(rng.choice(["gone", "nan", "text", "short", "attributes"]))
        old = file[place]
        if how == "attributes":
            for name in list(file.attrs):
                if not name.startswith("_"):
                    file.attrs[name] = "odd"
        elif how == "nan" and old.dtype.kind == "f":
            old[...] = np.nan
        else:
            value = old[...]
            del file[place]
            if how == "text":
                file[place] = np.full(value.shape, "x", dtype="S1")
            elif how == "short":
                file[place] = value[:1] if value.ndim else value
    return f"{path.name}: {place} {how}"


def _links(run: Path, rng: np.random.Generator) -> str:
    """Make a netCDF file lead to another file."""
    path = run / str(rng.choice([name for name in FILES if name.endswith(".nc") and (run / name).is_file()]))
    shutil.copy(path, run / "other.nc")
    how = str(rng.choice(["external", "soft", "raw", "virtual", "circle"]))
    with h5py.File(path, "r+") as file:
        if how == "external":
            file["led"] = h5py.ExternalLink("other.nc", "/")
        elif how == "soft":
            file["led"] = h5py.SoftLink("/nowhere")
        elif how == "circle":
            file.create_group("led")["back"] = file["/"]
        elif how == "raw":
            file.create_dataset("led", (10,), "u1", external=[(str(run / "weights.pt"), 0, 10)])
        else:
            layout = h5py.VirtualLayout((10,), "f8")
            layout[:] = h5py.VirtualSource(str(run / "other.nc"), "x", (10,))
            file.create_virtual_dataset("led", layout)
    return f"{path.name}: {how}"
