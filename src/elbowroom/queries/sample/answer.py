"""The answer to `sample`: draws in the format of the data, with their test, figure and conclusions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from elbowroom.queries.answer import Answer
from elbowroom.runs.rows import layout_of

if TYPE_CHECKING:
    import pandas as pd

    pass
    from elbowroom.runs.fitted import FittedModel

CLEAR = 2.0  # standard errors
LEVEL = 0.05
NEAR = 0.55  # AUC below which a difference is small, however certain

EXACT = 2**53  # whole numbers below are exact in double precision


@dataclass(frozen=True, eq=False, repr=False)
class Samples(Answer):
    """Draws: `answer["x"]`, `answer["mean"]`, `answer["z"]`, and `frame()`, a table with the columns of the data.

    Attributes:
        columns: names of the columns of a table.
        texts: column or covariate -> the texts behind its codes.
        told: names of the covariates in the user's table.
    """

    columns: tuple[str, ...] = field(kw_only=True, repr=False)
    texts: dict[str, tuple[str, ...]] = field(kw_only=True, repr=False)
    told: tuple[str, ...] = field(default=(), kw_only=True, repr=False)

    @staticmethod
    def columns_of(run: FittedModel) -> tuple[str, ...]:
        """Return the names of the columns of x; none if it is not a table with names."""
        layout = layout_of(run)
        names = () if layout is None or layout.x is None else tuple(layout.x)
        return names if run.vae.likelihood.event_shape == (len(names),) else ()

    @classmethod
    def of(
        cls,
        run: FittedModel,
        dataset: xr.Dataset,
        said: Sequence[str],
        compared: Compared | None = None,
        ends: np.ndarray | None = None,
    ) -> Samples:
        """Make the answer with its figure."""
        layout, columns = layout_of(run), cls.columns_of(run)
        told = () if layout is None or layout.x is None else tuple(layout.covariates)
        levels = {} if layout is None else layout.levels
        texts = {name: tuple(levels[name]) for name in (*columns, *told) if name in levels}
        sequence = any(getattr(network, "sequences", False) for network in (run.vae.decoder, run.vae.posterior.encoder))

        def draw() -> Any:
            from elbowroom.analysis.plots.queries import samples as plots_samples

            if ends is not None:
                return plots_samples.interpolation(dataset, ends, columns, texts, caption=said[0], sequence=sequence)
            shown = None if compared is None else compared.shown
            return plots_samples.samples(dataset, shown, columns, texts, caption=" ".join(said[1:]), sequence=sequence)

        return cls(dataset, said, drawings=[draw], columns=columns, texts=texts, told=told)

    def frame(self) -> pd.DataFrame:
        """Return one line per draw: the columns of a table with text as text, and its covariates; else x flattened."""
        import pandas as pd

        x = self.dataset["x"].values
        flat = x.reshape(len(x), -1)
        names = self.columns or [f"x[{','.join(map(str, index))}]" for index in np.ndindex(*x.shape[1:])]
        table = {name: self._column(name, flat[:, j]) for j, name in enumerate(names)}
        table |= self._told()
        return pd.DataFrame(table, index=pd.RangeIndex(len(x), name="sample"))

    def _told(self) -> dict[str, Any]:
        """Return covariates and exposure as columns, with one-hot levels as text."""
        found: dict[str, Any] = {}
        if "covariates" in self.dataset:
            c, at = self.dataset["covariates"].values, 0
            for name in self.told or [str(v) for v in self.dataset["covariate"].values]:
                width = len(self.texts.get(name, ())) or 1
                part = c[:, at : at + width]
                found[name] = self._column(name, part.argmax(1) if name in self.texts else part[:, 0])
                at += width
        if "exposure" in self.dataset:
            found["exposure"] = self.dataset["exposure"].values
        return found

    def _column(self, name: str, values: np.ndarray) -> Any:
        if name in self.texts:
            levels = np.array(self.texts[name], dtype=object)
            return levels[values.astype(int)]
        whole = (np.abs(values) < EXACT) & (values == np.floor(values))  # NaN is not, nor is what int64 cannot hold
        return values.astype(np.int64) if bool(whole.all()) else values


def conclude_test(table: xr.Dataset) -> list[str]:
    """Say what the two-sample tests show, and whether prior or decoder causes the difference."""
    auc, error, p = (dict(zip(table["source"].values.tolist(), table[n].values.tolist(), strict=True)) for n in _TEST)
    gap, gap_error, count = float(table["auc_difference"]), float(table["auc_difference_se"]), int(table["tested"])
    of = {"prior": "the prior", "aggregate": "the aggregate posterior"}
    told = "; ".join(
        f"draws of {of[s]} {auc[s]:.2f} ± {error[s]:.2f} ({'p < 0.001' if p[s] < 0.001 else f'p = {p[s]:.3f}'})" for s in of
    )
    said = [f"Told from {count:,} held-out rows by a classifier, AUC (1/2: cannot be told apart, 1: always): {told}."]
    different = [s for s in of if p[s] <= LEVEL]
    if gap > CLEAR * gap_error and "prior" in different:
        said.append(
            f"The prior's draws differ from the data more than the aggregate's, by {gap:.2f} ± {gap_error:.2f}: the prior has "
            "mass where no datum is encoded (holes). Draw with --from aggregate, or fit a prior that can follow the data, such "
            "as gaussian_mixture, flow or vamp."
        )
    elif -gap > CLEAR * gap_error and "aggregate" in different:
        said.append(
            f"The aggregate's draws differ more than the prior's, by {-gap:.2f} ± {gap_error:.2f}: the encoder puts data where "
            "the model does not; an audit says by how much it is off."
        )
    elif len(different) == len(of):
        said.append(
            "Both are off by about as much: holes of the prior are not the cause; look to p(x|z), the decoder and its noise."
        )
    elif different:
        said.append(
            f"Only draws of {of[different[0]]} show a difference, but the two differ by {abs(gap):.2f} ± {gap_error:.2f}: too "
            "little to tell them apart."
        )
    if not different:
        said.append(f"No difference was found at the level {LEVEL}; that proves none: more rows may show one.")
    elif "aggregate" in different and auc["aggregate"] > NEAR and gap > CLEAR * gap_error:
        said.append("The aggregate's draws can be told as well: that part is not the prior's but that of p(x|z).")
    return said


_TEST = ("auc", "auc_se", "p_value")


def conclude(dataset: xr.Dataset, status: str) -> list[str]:
    """Describe an interpolation."""
    steps = dataset.sizes["sample"]
    flat = dataset["mean"].values.reshape(steps, -1).astype(np.float64)
    step = np.sqrt(np.square(np.diff(flat, axis=0)).mean(1))
    most = int(step.argmax())
    jump = step[most] / step.mean() if step.mean() > 0 else 1.0
    t = dataset["t"].values
    words = (
        f"the largest change, {jump:.1f} times the average one, lies between t = {t[most]:.2f} and {t[most + 1]:.2f}"
        if jump > 1.5
        else "it changes evenly"
    )
    how = f"moves by {step.sum():.3g} in all (root mean square per entry, units of the data); {words}"
    if "column" in dataset.dims:
        how = "is shown column by column, of text the likeliest level"  # columns differ in their units
    path = str(dataset.attrs.get("path", "line between the posterior means"))
    return [
        f"{steps} points on the {path} ({status}). E[x|z] {how}. The points between are the "
        "decoder's guess: no datum vouches for them."
    ]


@dataclass(frozen=True, eq=False)
class Compared:
    """The two-sample tests, and rows for their figure.

    Attributes:
        table: auc, auc_se, p_value (source); auc_difference with its error; rows.
        shown: `data` and each source -> x, (n, *event).
    """

    table: xr.Dataset
    shown: Mapping[str, np.ndarray]
