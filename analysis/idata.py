"""ArviZ's schema; only this module and `datatree.py` use ArviZ's data structures.

A posterior becomes a DataTree with groups posterior (sites in constrained space; dims chain, draw, obs_id, then the site's
own), sample_stats, observed_data, moments (unconstrained mean and covariance, where known more exactly than from draws), and
assignments (exact probability of each joint value of the discrete sites, where known). Draws of discrete sites are integers.

`Posteriors` hands such trees out as the type that the installed ArviZ takes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import h5netcdf
import h5py
import numpy as np
import xarray as xr

from elbowroom.errors import RunFolderError
from elbowroom.system.archive import too_large
from elbowroom.system.files import atomic
from elbowroom.system.paths import unreadable

RESERVED = frozenset({"chain", "draw", "obs_id", "assignment", "probability"})  # dimensions and variables of the files


def narrowed(values: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """Return values in a type of fewer bytes; unchanged where one of them is too large for it."""
    largest = float(np.iinfo(dtype).max if dtype.kind == "i" else np.finfo(dtype).max)
    finite = values[np.isfinite(values)]
    return values if finite.size and max(finite.max(), -finite.min()) > largest else values.astype(dtype)


def file_names(shapes: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """Return a name for each site in files, given its shape.

    The slash of Pyro's scopes, which a file format reads as a group, becomes a dot. A site that has the name of a dimension,
    such as `draw`, gets `_site` at its end: xarray would take its values for coordinates.
    """
    taken = RESERVED | {dim for name, shape in shapes.items() for dim in site_dims(name.replace("/", "."), shape)}
    found: dict[str, str] = {}
    for name in shapes:
        new = name.replace("/", ".")
        new = f"{new}_site" if new in taken else new
        while new in found.values() or (new != name and new in shapes):
            new += "_"
        found[name] = new
    return found


def site_dims(name: str, shape: Sequence[int]) -> list[str]:
    """Return the names of a site's own dimensions: `latent` for the vector z, else `<site>_dim_0`, ..."""
    return ["latent"] if name == "z" and len(shape) == 1 else [f"{name}_dim_{i}" for i in range(len(shape))]


class _NoLogLikelihood:
    """In place of a group `log_likelihood`: ArviZ asks `hasattr`, and so says why there is none; one's own group counts."""

    def __get__(self, holder: Any, kind: type | None = None) -> Any:
        if isinstance(holder, xr.DataTree) and "log_likelihood" in holder.children:
            return holder.children["log_likelihood"]
        if holder is None:
            return self
        raise TypeError(
            "no log_likelihood, on purpose: loo and waic leave a datum out of what all data share, here every datum has its "
            "own z; log p(x) of each datum is audit.table['log_evidence'], and `elbowroom compare` or er.compare([...]) "
            "compares models"
        )


class _Tree(xr.DataTree):
    log_likelihood = _NoLogLikelihood()


@cache
def _inference_data() -> type:
    """Return ArviZ's InferenceData that says why it has no log_likelihood; made late, since reading runs needs no ArviZ."""
    import arviz

    return type("InferenceData", (arviz.InferenceData,), {"log_likelihood": _NoLogLikelihood(), "__module__": __name__})


def __getattr__(name: str) -> type:
    """Let pickle find that class by its name."""
    if name == "InferenceData":
        return _inference_data()
    raise AttributeError(name)


def native(tree: xr.DataTree) -> Any:
    """Return a tree as the type that the installed ArviZ takes: an InferenceData before ArviZ 1.0, else a DataTree.

    The arrays are shared, not copied. Where there is no `log_likelihood`, asking for it says why.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of ArviZ 0.23, about its own future
        import arviz
    if int(arviz.__version__.split(".")[0]) >= 1:
        return _Tree.from_dict({node.path: node.to_dataset(inherit=False) for node in tree.subtree}, name=tree.name)
    groups = {str(name): group.to_dataset() for name, group in tree.children.items()}
    return _inference_data()(attrs=dict(tree.attrs), **groups)


def tree_of(given: Any) -> xr.DataTree:
    """Return what `native` returned as a DataTree again; a DataTree is returned as it is."""
    if isinstance(given, xr.DataTree):
        return given
    tree = xr.DataTree.from_dict({name: given[name] for name in given.groups()})
    tree.attrs.update(given.attrs)
    return tree


class Posteriors(Mapping[str, Any]):
    """Posteriors by method, each as the type that the installed ArviZ takes: `az.summary(audit.posteriors["grid"])`.

    ArviZ is imported at the first access to a posterior. What a user changes in one is kept, and saved.

    Args:
        given: method -> DataTree, or what this class handed out.
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        self._held: dict[str, Any] = dict(given._held if isinstance(given, Posteriors) else given)

    def __getitem__(self, name: str) -> Any:
        held = self._held[name]
        if isinstance(held, xr.DataTree) and not isinstance(held, _Tree):  # else it was handed out before
            held = self._held[name] = native(held)
        return held

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, name: object) -> bool:
        return name in self._held

    def trees(self) -> dict[str, xr.DataTree]:
        """Return the posteriors as DataTrees, whatever ArviZ is installed."""
        return {name: tree_of(held) for name, held in self._held.items()}

    def __repr__(self) -> str:
        return f"Posteriors({', '.join(self._held)})"


def write(tree: xr.DataTree | xr.Dataset, path: str | Path) -> None:
    """Write a DataTree or Dataset to a netCDF file, completely or not at all.

    HDF5 writes to memory first: on a full disk it would crash the process.

    Raises:
        OSError: the disk is full or cannot be written to.
    """
    with tree.to_netcdf(None, engine="h5netcdf") as packed, atomic(path) as temporary:  # released in an error too
        temporary.write_bytes(packed)


def read(path: str | Path) -> xr.DataTree:
    """Read a DataTree into memory and close the file.

    Raises:
        RunFolderError: it is damaged, or larger than this machine's memory.
    """
    return _read(Path(path), xr.open_datatree)


def read_table(path: str | Path) -> xr.Dataset:
    """Read a Dataset into memory and close the file; raises the errors of `read`."""
    return _read(Path(path), xr.open_dataset)


# h5netcdf file objects that failed to open lack this attribute; their destructor would print an error.
if not hasattr(h5netcdf.File, "_writable"):
    h5netcdf.File._writable = False


def _stays_inside(path: Path) -> None:
    """Refuse an HDF5 file that leads to other files or in circles, before anything of it is read.

    Raises:
        ValueError: it has a link that is not plain, data in other files, or a group that holds itself.
    """
    with h5py.File(path, "r") as file:
        seen, ahead = {h5py.h5o.get_info(file.id).addr}, [file["/"]]
        while ahead:
            group = ahead.pop()
            for name in group:
                place = f"{group.name.rstrip('/')}/{name}"
                if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                    raise ValueError(f"{place} is a link to elsewhere")
                item = group[name]
                if isinstance(item, h5py.Dataset) and (item.external or item.is_virtual):
                    raise ValueError(f"{place} holds data of other files")
                if isinstance(item, h5py.Group):
                    address = h5py.h5o.get_info(item.id).addr
                    if address in seen:
                        raise ValueError(f"{place} leads back to a group above it")
                    seen.add(address)
                    ahead.append(item)


def _read(path: Path, opener: Callable[..., Any]) -> Any:
    try:
        if problem := unreadable(path):
            raise ValueError(problem)
        _stays_inside(path)
        with opener(path, engine="h5netcdf", phony_dims="sort") as opened:
            problem = too_large(opened.nbytes)
            if problem is None:
                return opened.load()
    except Exception as error:  # HDF5, h5netcdf and xarray raise many types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        raise RunFolderError(f"{path}: damaged ({reason}); make it anew, or remove it") from error
    raise RunFolderError(f"{path}: {problem}; make it anew with fewer draws")
