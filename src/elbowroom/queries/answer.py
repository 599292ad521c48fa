"""The result of a query: numbers with units, in the array type of the input, and in files."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import xarray as xr

from elbowroom.errors import DataError, SpecError, UserError
from elbowroom.system.files import atomic
from elbowroom.system.stages import stage

if TYPE_CHECKING:
    import pandas as pd

    from elbowroom.analysis.plots.style import Absent, Plot

DRAWS = (("draw", "obs_id"), ("sample", "obs_id"))  # first dimensions of draws per row
SUFFIXES = (".nc", ".csv", ".parquet", ".npz")


@dataclass(frozen=True)
class Form:
    """The array type of a query's input, so that the answer has the same type.

    Attributes:
        kind: `numpy` (also for files), `torch` or `pandas`.
        index: row labels of a frame.
        like: a tensor whose device and precision the answer takes.
    """

    kind: Literal["numpy", "torch", "pandas"] = "numpy"
    index: Any = None
    like: torch.Tensor | None = None

    @classmethod
    def of(cls, given: Any) -> tuple[Any, Form]:
        """Return the input as a path, an array or a frame, and its form."""
        if isinstance(given, torch.Tensor):
            plain = given.detach().cpu()  # numpy has no bfloat16
            return (plain.float() if plain.dtype == torch.bfloat16 else plain).numpy(), cls("torch", like=given)
        if hasattr(given, "iloc") and hasattr(given, "columns"):
            return given, cls("pandas", index=given.index)
        return given, cls()

    def back(self, value: xr.DataArray) -> Any:
        """Return a variable in this form: an array, a tensor, or a Series or frame over the input rows."""
        if self.kind == "torch" and value.dtype.kind in "fiub":
            tensor = torch.as_tensor(value.values.copy())
            if self.like is None:
                return tensor
            floating = tensor.is_floating_point() and self.like.is_floating_point()
            return tensor.to(self.like.device, self.like.dtype if floating else tensor.dtype)
        if self.kind == "pandas" and value.dims[:1] == ("obs_id",) and value.ndim <= 2:
            frame = flat(value.to_dataset(name="value"))
            frame.index = self.index
            if value.ndim == 1:
                return frame["value"].rename(str(value.name))
            return frame.set_axis([str(v) for v in value[value.dims[1]].values], axis=1)
        return value.values


@dataclass(frozen=True, eq=False)
class Answer:
    """An answer: `answer["mean"]` in the array type of the input, `answer.frame()`, `answer.dataset`, `answer.save(path)`.

    Attributes:
        dataset: all numbers, over `obs_id` and other dimensions, with units and long names; its attributes name run and data.
        said: the conclusions, in sentences.
        form: the array type that `answer[...]` returns.
        drawings: functions that draw the figures, in order; see `figures`.
    """

    dataset: xr.Dataset
    said: Sequence[str] = ()
    form: Form = field(default_factory=Form, repr=False)
    drawings: Sequence[Callable[[], Plot | Absent]] = field(default=(), repr=False)

    @cached_property
    def figures(self) -> Mapping[str, Plot | Absent]:
        """Figures with captions by name, drawn at the first access; an `Absent` says why its figure cannot be drawn."""
        found = [draw() for draw in self.drawings]
        return {one.name: one for one in found}

    def __getitem__(self, name: str) -> Any:
        """Return a variable in the array type of the input: numpy, torch or pandas."""
        if name not in self.dataset:
            raise UserError(f"answer[{name!r}]: there is {', '.join(map(str, self.dataset.data_vars))}")
        return self.form.back(self.dataset[name])

    @property
    def posterior(self) -> Any:
        """The draws per row, as the installed ArviZ takes them: `az.summary(run.encode(x, samples=400).posterior)`.

        They are one chain: of the latents, by their names, for `encode`; of completed rows, `x`, for imputations and
        reconstructions, whose dimensions are called `x_column`, ...: ArviZ has a `column` of its own.

        Raises:
            UserError: the answer holds no draws of rows.
        """
        drawn = {str(name): value for name, value in self.dataset.data_vars.items() if value.dims[:2] in DRAWS}
        if not drawn:
            raise UserError(
                "posterior: this answer holds no draws of rows; ask encode, impute or sample(data=...) for samples="
            )
        from elbowroom.analysis import idata

        names = {name: "x" if name == "samples" else name.removeprefix("draws").removeprefix("_") or "z" for name in drawn}
        own = {dim: f"x_{dim}" for value in drawn.values() for dim in value.dims[2:] if value.name == "samples"}
        named = {names[name]: value.rename({value.dims[0]: "draw"}) for name, value in drawn.items()}
        sites = xr.Dataset(named).rename(own)
        sites = sites.expand_dims("chain").assign_coords(chain=[0], draw=np.arange(sites.sizes["draw"]))
        return idata.native(xr.DataTree.from_dict({"posterior": sites}))

    def frame(self) -> pd.DataFrame:
        """Return one line per row and one column per number, such as `mean[0]`, `quantile[0,0.5]`; covariances are left out.

        An answer without rows has one line per combination of its dimensions.
        """
        if "obs_id" not in self.dataset.dims:
            return self.dataset.to_dataframe().reset_index()
        frame = flat(self.dataset)
        if self.form.index is not None and len(frame) == len(self.form.index):
            frame.index = self.form.index
        return frame

    @stage("files")
    def save(self, path: str | Path) -> Path:
        """Write the answer to one file, atomically.

        Args:
            path: .nc holds everything; .csv and .parquet hold `frame()` (a column of numbers and texts as text); .npz holds
                each array by its name.

        Raises:
            UserError: the file has another suffix, or pyarrow is not installed.
        """
        path = check_suffix(Path(path))
        if path.suffix == ".nc":
            from elbowroom.analysis import idata

            idata.write(self.dataset, path)
            return path
        with atomic(path) as temporary:
            if path.suffix == ".npz":
                names = [*self.dataset.coords, *self.dataset.data_vars]
                arrays = {str(name): _plain(self.dataset[name].values) for name in names}
                np.savez_compressed(temporary, allow_pickle=False, **arrays)
            elif path.suffix == ".csv":
                self.frame().to_csv(temporary)
            else:
                _one_kind(self.frame()).to_parquet(temporary)
        return path

    @stage("figures")
    def save_figures(self, path: str | Path) -> list[Path]:
        """Write the available figures beside `path`: the first to `<stem>.png`, the others to `<stem>-<name>.png`."""
        if not self.drawings:
            return []
        from elbowroom.analysis.plots.style import Plot

        path, written = Path(path), []
        for number, one in enumerate(self.figures.values()):
            if isinstance(one, Plot):
                target = path.with_name(f"{path.stem}{f'-{one.name}' if number else ''}.png")
                with atomic(target) as temporary:
                    one.write(temporary)
                written.append(target)
        return written

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name} {size}" for name, size in self.dataset.sizes.items())
        rows = [f"  {name:<22}{v.attrs.get('long_name', '')}{_units(v)}" for name, v in self.dataset.data_vars.items()]
        return "\n".join([f"{self.dataset.attrs.get('answers', 'answer')} ({sizes})", *rows, *self.said])


def check_suffix(path: Path) -> Path:
    """Return the path; a UserError if its suffix is unknown, it is a folder, or pyarrow is missing."""
    if path.suffix not in SUFFIXES:
        raise SpecError(f"{path}: cannot write {path.suffix or 'a file without a suffix'}; use {', '.join(SUFFIXES)}")
    if path.is_dir():
        raise SpecError(f"{path}: this is a folder; name a file with --out")
    if path.suffix == ".parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError:
            raise DataError(f"{path}: parquet files need pyarrow; install it with: pip install 'elbowroom[parquet]'") from None
    return path


def flat(dataset: xr.Dataset) -> pd.DataFrame:
    """Return the variables over `obs_id` as columns, such as `mean[0]`.

    Variables have at most one more dimension, or two if one of them holds states or quantiles: `probability[0,1]`,
    `quantile[0,0.5]`.
    """
    import pandas as pd

    columns: dict[str, Any] = {}
    for name, value in dataset.data_vars.items():
        if value.dims == ("obs_id",):
            columns[str(name)] = value.values
        elif value.dims[:1] == ("obs_id",) and (value.ndim == 2 or (value.ndim == 3 and _is_short(value.dims[2]))):
            labels = itertools.product(*(value[dim].values for dim in value.dims[1:]))
            cells = value.values.reshape(len(value), -1)
            columns |= {f"{name}[{','.join(map(str, label))}]": cells[:, i] for i, label in enumerate(labels)}
    return pd.DataFrame(columns, index=pd.Index(dataset["obs_id"].values, name="obs_id"))


def _one_kind(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the frame with mixed columns as text, since a column of a parquet file has one type."""
    mixed = [i for i, dtype in enumerate(frame.dtypes) if dtype.kind == "O" and frame.iloc[:, i].map(type).nunique() > 1]
    text = {frame.columns[i]: frame.iloc[:, i].map(str, na_action="ignore") for i in mixed}
    return frame.assign(**text)


def _is_short(dim: Any) -> bool:
    return str(dim) == "quantile_at" or str(dim).endswith("_state")


def _plain(values: np.ndarray) -> np.ndarray:
    return values.astype(str) if values.dtype.kind == "O" else values


def _units(value: xr.DataArray) -> str:
    units = value.attrs.get("units", "")
    return f" [{units}]" if units not in ("", "1") else ""
