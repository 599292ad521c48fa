"""`fit.start`: weights of another run, checked against the new experiment."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elbowroom.components import registry
from elbowroom.components.schema import short
from elbowroom.errors import SpecError
from elbowroom.inference.fit.warm_start import GUIDE, Start
from elbowroom.models.vae import VAE
from elbowroom.spec import document, run_folder, spec
from elbowroom.spec.identity import identity
from elbowroom.system.archive import check_stored
from elbowroom.system.files import sha256

WHERE = "fit.start.run"
MODEL = ("latent_dim", "prior", "decoder", "likelihood")


def path_of(loaded: spec.Loaded) -> Path:
    """Return the folder of the run that a fit starts from; a relative path starts from the spec's folder."""
    given = Path(loaded.spec.fit.start.run)
    with suppress(RuntimeError):  # the user has no home folder: `~` is kept as it is
        given = given.expanduser()
    path: Path = loaded.folder / given
    return path.absolute()


def read(loaded: spec.Loaded, data_sha256: Callable[[], str], build: Callable[[], VAE]) -> Start:
    """Read the weights that a fit starts from.

    Args:
        loaded: the spec of the new fit.
        data_sha256: returns the hash of its data.
        build: builds its VAE, with fresh weights.

    Raises:
        SpecError: the run does not exist, or has other data or another model; says which.
    """
    chosen, path = loaded.spec.fit.start, path_of(loaded)
    theirs = _spec(path)
    ours = loaded.spec.tree()
    for part, keys in (("data", [key for key in ours["data"] if key != "path"]), ("model", MODEL)):
        old, new = ({key: tree[part].get(key) for key in keys} for tree in (theirs, ours))
        if (found := _apart(old, new, part)) is not None:
            name, there, here = found
            raise SpecError(f"{WHERE}: {path}: {name} is {short(there)} there, {short(here)} here; it must be the same")
    if theirs["record"].get("data_sha256") != data_sha256():
        raise SpecError(f"{WHERE}: {path}: was fitted to other data; they must be the same")
    weights = _weights(path / run_folder.WEIGHTS)
    if _apart(theirs["guide"], ours["guide"], "guide") is not None:
        kept = {name: value for name, value in weights.items() if not name.startswith(GUIDE)}
    else:
        kept = dict(weights)
    start = Start(kept, fingerprint(weights), chosen.freeze, chosen.simulated)
    vae = build()
    parameters = {name: value.shape for name, value in vae.named_parameters() if not name.startswith(GUIDE)}
    if any(name not in weights or weights[name].shape != shape for name, shape in parameters.items()):
        raise SpecError(f"{WHERE}: {path}: its weights do not fit the model")
    return start


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of weights: names, types and values."""
    parts: list[bytes] = []
    for name, value in state.items():
        parts += [f"{name} {value.dtype} {tuple(value.shape)}".encode(), value.detach().cpu().contiguous().numpy().tobytes()]
    return sha256(*parts)


def _spec(path: Path) -> dict[str, Any]:
    if not (path / run_folder.SPEC).is_file():
        what = "is not a run folder" if path.is_dir() else "no such run folder"
        raise SpecError(f"{WHERE}: {path}: {what} (no {run_folder.SPEC})")
    tree = document.read(path / run_folder.SPEC)
    record = tree.get("record")
    if not isinstance(record, dict) or not all(isinstance(tree.get(key), dict) for key in ("data", "model", "guide", "fit")):
        raise SpecError(f"{WHERE}: {path}: has no record of a run; fit it first")
    try:
        same = identity(tree, str(record.get("data_sha256")), record.get("start_sha256")) == record.get("experiment")
    except (TypeError, ValueError):  # for example a date, which no run folder contains
        same = False
    if not same:
        raise SpecError(f"{WHERE}: {path}: its {run_folder.SPEC} was changed after the fit")
    return tree


def _weights(path: Path) -> dict[str, Tensor]:
    try:
        check_stored(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            raise ValueError("it holds something else")
        bad = [name for name, value in state.items() if not bool(value.isfinite().all())]
        if bad:
            raise ValueError(f"{bad[0]} is not finite")
    except FileNotFoundError:
        raise SpecError(f"{WHERE}: {path}: missing: the fit there has not ended") from None
    except Exception as error:
        raise SpecError(f"{WHERE}: {path}: damaged ({str(error).split('. ')[0][:80]})") from None
    return state


def _apart(old: Any, new: Any, name: str) -> tuple[str, Any, Any] | None:
    """Return the first setting that differs between two blocks, with both values; options unknown to an old run agree."""
    known = dict(_leaves(registry.portable(old), name))
    for key, value in _leaves(registry.portable(new), name):
        if key in known and known.pop(key) != value:
            return key, dict(_leaves(registry.portable(old), name))[key], value
        known.pop(key, None)
    return next(((key, value, None) for key, value in known.items()), None)


def _leaves(tree: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, f"{prefix}.{key}")
    else:
        yield prefix, tree
