"""The entries of a datum, and which of them are missing or to be hidden."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from elbowroom.analysis.latents.entries import EntryKind, entry_kinds
from elbowroom.errors import DataError, SpecError, UserError, nearest
from elbowroom.models.likelihoods.categorical import Ordinal
from elbowroom.models.likelihoods.mixed import Mixed
from elbowroom.models.likelihoods.multinomial import Multinomial
from elbowroom.runs.rows import QueryRows
from elbowroom.system.memory import slices

if TYPE_CHECKING:
    from elbowroom.data.dataset import Dataset
    from elbowroom.runs.fitted import FittedModel

MOST_LEVELS = 5_000  # largest total number of levels whose probabilities are kept
HALVES = ("left", "right", "top", "bottom")


@dataclass(frozen=True)
class Entries:
    """Names and kinds of the entries of one datum, flattened.

    Attributes:
        shape: shape of one datum.
        names: names of a table's columns, else positions such as `3` or `3,7`.
        kinds: kinds of values.
        texts: position -> the texts behind codes.
        coded: position -> number of levels, for entries whose probabilities are kept.
        table: whether the entries are columns with names.
    """

    shape: tuple[int, ...]
    names: tuple[str, ...]
    kinds: tuple[EntryKind, ...]
    texts: Mapping[int, tuple[str, ...]]
    coded: Mapping[int, int]
    table: bool

    @classmethod
    def of(cls, run: FittedModel, rows: QueryRows) -> Entries:
        """Return the entries of a run's model; a UserError if they are not independent given z."""
        likelihood, shape = run.vae.likelihood, run.vae.likelihood.event_shape
        if isinstance(likelihood, Multinomial):
            raise UserError(
                "impute: under multinomial the entries of a row share their total, which is not known where some are missing; "
                "use model.likelihood = poisson or negative_binomial"
            )
        facts = run.experiment.facts
        dataset = rows.dataset
        columns = facts.columns if isinstance(likelihood, Mixed) else None
        few = {name: value[:1] for name, value in rows.experiment.batch(rows.index[:1]).items() if name != "x"}
        with torch.no_grad():
            z = torch.zeros(1, 1, run.vae.prior.latent_dim, dtype=run.experiment.dtype)
            place = next(run.vae.parameters()).device
            p = run.vae.decode(z.to(place), **{name: value.to(place) for name, value in few.items()})
        kinds = entry_kinds(p, columns, ordered=isinstance(likelihood, Ordinal))
        names = dataset.columns if dataset.columns is not None and len(shape) == 1 else None
        texts = (
            {} if names is None else {j: tuple(dataset.categories[n]) for j, n in enumerate(names) if n in dataset.categories}
        )
        coded = {}
        for j, kind in enumerate(kinds):
            if kind in ("categorical", "ordinal"):
                coded[j] = columns[j].levels if columns is not None else int(getattr(likelihood, "categories", 0))
            elif j in texts:
                coded[j] = len(texts[j])
        if sum(coded.values()) > MOST_LEVELS:
            coded = {}
        index = np.ndindex(*shape)
        return cls(
            shape=tuple(shape),
            names=tuple(names) if names is not None else tuple(",".join(map(str, i)) for i in index),
            kinds=tuple(kinds),
            texts=texts,
            coded=coded,
            table=names is not None,
        )

    @property
    def dims(self) -> tuple[str, ...]:
        """Names of the dimensions of one datum."""
        return ("column",) if len(self.shape) == 1 else tuple(f"x_dim_{i}" for i in range(len(self.shape)))

    def text(self, j: int, code: float) -> str:
        """Return the text of a code."""
        return self.texts[j][int(code)] if int(code) < len(self.texts.get(j, ())) else str(int(code))

    def labels(self) -> list[str]:
        """Return the levels whose probabilities are kept, such as `education=Bachelors`."""
        return [f"{self.names[j]}={self.text(j, k)}" for j, n in self.coded.items() for k in range(n)]

    def starts(self) -> dict[int, int]:
        """Return the position in `labels` of the first level of each coded entry."""
        ends = np.cumsum([0, *self.coded.values()]).tolist()
        return dict(zip(self.coded, ends, strict=False))


def sequential(run: FittedModel) -> bool:
    """Say whether a datum is a sequence, which may end with padding."""
    return any(getattr(network, "sequences", False) for network in (run.vae.decoder, run.vae.posterior.encoder))


def holes(x: Any, *, padded: bool) -> Any:
    """Return which cells of x (n, *event), a tensor or an array, are missing; the type of the result is that of x.

    In padded sequences (n, T, F), steps after the last observed one are padding and do not count.
    """
    given = isinstance(x, Tensor)
    values = x if given else torch.from_numpy(np.asarray(x, dtype=np.float64))
    missing = values.isnan()
    if padded and values.ndim == 3:
        seen = (~missing).any(-1)
        missing = missing & seen.flip(1).cummax(1).values.flip(1)[..., None]
    return missing if given else missing.numpy()


def hide(what: Any, rows: QueryRows, entries: Entries, seed: int) -> np.ndarray:
    """Return which observed cells (n, *event) of the selected rows are to be hidden.

    Args:
        what: names of columns (a text with commas, or a list), a share of all cells such as `20%`, for images `left`, `right`,
            `top` or `bottom`; or a boolean array, (*event) or (n, *event).
        rows: the data.
        entries: entries of a datum.
        seed: seed for a share.

    Raises:
        UserError: there is no such column, or there are no observed cells to hide.
    """
    x = np.asarray(rows.dataset.x[rows.index], dtype=np.float64)
    mask = np.zeros(x.shape, dtype=bool)
    if isinstance(what, np.ndarray) or torch.is_tensor(what) or hasattr(what, "to_numpy"):
        given = np.asarray(what)
        if given.shape not in (x.shape, x.shape[1:]) or given.dtype != bool:
            raise DataError(
                f"hide: truth values of shape {x.shape[1:]} or {x.shape} are needed, got {given.dtype} of shape {given.shape}"
            )
        mask |= given
    else:
        words = what.split(",") if isinstance(what, str) else list(what)
        for word in words:
            mask |= _named(str(word).strip(), entries, x.shape, seed)
    mask &= ~np.isnan(x)
    if not mask.any():
        raise DataError("hide: none of these cells is observed; hide others")
    return mask


def _named(word: str, entries: Entries, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Return the cells that one word selects."""
    mask = np.zeros(shape, dtype=bool)
    if word in entries.names:
        mask.reshape(len(mask), -1)[:, entries.names.index(word)] = True
        return mask
    if word.endswith("%"):
        try:
            percent = float(word[:-1])
        except ValueError:
            percent = -1.0
        if not 0 < percent < 100:
            raise SpecError(f"hide: {word!r} is no share of the cells; write one between 0% and 100%, such as 20%")
        return np.asarray(np.random.default_rng(seed).random(shape) < percent / 100)
    if word in HALVES:
        from elbowroom.models.columns import image_shape

        size = image_shape(entries.shape)
        if size is None:
            raise SpecError(f"hide: {word!r} is for images, and a datum of shape {entries.shape} is none; name columns, or 20%")
        row, column = np.indices(size)
        half = {"left": column < size[1] // 2, "right": column >= size[1] // 2}
        half |= {"top": row < size[0] // 2, "bottom": row >= size[0] // 2}
        return mask | half[word].reshape(entries.shape)
    raise SpecError(f"hide: there is no column {word!r}{nearest(word, [*entries.names, *(() if entries.table else HALVES)])}")


def asked_holes(
    rows: QueryRows, run: FittedModel, hidden: Any, wanted: np.ndarray | None, seed: int, entries: Entries
) -> tuple[QueryRows, np.ndarray | None, np.ndarray]:
    """Return the rows with cells to impute, the hidden values in them, and their numbers in the data.

    Args:
        rows: rows of the query.
        run: the run.
        hidden: as `what` of `hide`; None for nothing.
        wanted: (*event), entries to impute; all by default.
        seed: seed for a share to be hidden.
        entries: entries of a datum.

    Raises:
        UserError: nothing is missing.
    """
    padded = sequential(run)
    among = np.ones(entries.shape, dtype=bool) if wanted is None else wanted
    some = np.zeros(len(rows), dtype=bool)
    if hidden is None:
        for part in slices(len(rows), 10_000):
            found = holes(rows.dataset.x[rows.index[part]], padded=padded) & among
            some[part] = found.reshape(len(found), -1).any(1)
        if not some.any():
            raise DataError(
                f"{rows.dataset.name}: no {'such ' if wanted is not None else ''}cell is missing, there is nothing to impute; "
                "to see how well cells would be imputed, hide some that are known: --hide COLUMN or --hide 20%"
            )
        return replace(rows, index=rows.index[some]), None, rows.index[some]
    mask = hide(hidden, rows, entries, seed)
    taken = rows.dataset.take(rows.index)
    x = np.asarray(taken.x, dtype=np.float64)
    dataset: Dataset = replace(taken, x=np.where(mask, np.nan, x), name=f"{taken.name} with hidden cells")
    some = (mask & among).reshape(len(mask), -1).any(1)
    holed = QueryRows(dataset, np.flatnonzero(some), rows.experiment.on(dataset))
    return holed, np.where(mask & among, x, np.nan), rows.index[some]


def named_entries(of: Sequence[str], entries: Entries) -> np.ndarray:
    """Return which entries have these names, (*event)."""
    names = [of] if isinstance(of, str) else [str(name) for name in of]
    for name in names:
        if name not in entries.names:
            raise DataError(f"of: there is no column {name!r}{nearest(name, entries.names)}")
    return np.isin(np.array(entries.names), names).reshape(entries.shape)
