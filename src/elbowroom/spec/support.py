"""Checks before a fit: are the data in the likelihood's support and in the precision, and do the networks fit into memory?"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import torch

from elbowroom.data.chunks import rows_of
from elbowroom.data.dataset import Dataset
from elbowroom.errors import DataError, SpecError
from elbowroom.models.vae import VAE
from elbowroom.system.archive import SHARE, amount, memory
from elbowroom.system.rounding import coarse


def check_support(vae: VAE, data: Dataset, *, likelihood: str, label: str) -> None:
    """Check all data against the support of the VAE's likelihood, a few million entries at a time.

    `likelihood` is its name in the spec, `label` the name of the spec in messages.

    Raises:
        DataError: names the first place and the remedy.
        SpecError: there are exposures, and the likelihood has no rate.
    """
    if data.categories and likelihood not in ("mixed", "categorical"):
        raise DataError(
            f"{label}: data: column {min(data.categories)!r} holds text, which {likelihood} cannot "
            "model; use model.likelihood = mixed, or leave it out of data.x"
        )
    if data.exposure is not None and not vae.likelihood.takes_exposure:
        raise SpecError(
            f"{label}: data.exposure: {likelihood} has no rate to multiply; use "
            "model.likelihood = poisson or negative_binomial, or leave the exposure out"
        )
    for start, part in rows_of(data.x):
        try:
            vae.likelihood.check(torch.from_numpy(np.array(part, dtype=np.float64)))
        except DataError as error:
            raise DataError(f"{label}: {_shift_row(str(error), start)}") from None


def check_rounding(data: Dataset, dtype: str, *, label: str) -> None:
    """Refuse columns of x and covariates whose values the precision of the fit does not keep apart.

    Raises:
        DataError: names the column, its size and spread, and the cure.
    """
    for what, array in (("", data.x), ("covariate ", data.covariates)):
        if array is None or (array.dtype.kind in "bui" and array.dtype.itemsize == 1):
            continue
        found = coarse((part for _, part in rows_of(array)), dtype)
        if found is None:
            continue
        if what:
            name = repr(data.covariate_names[found.index[0]]) if data.covariate_names else str(found.index[0])
        else:
            name = f"column {data.column(found.index[0])}" if len(found.index) == 1 else f"position {found.index}"
        centre = f"subtract {found.size:.3g} or so from it"
        cure = f"use fit.dtype = float64, or {centre}" if dtype == "float32" else f"{centre} before it is stored"
        raise DataError(
            f"{label}: {data.name}: {what}{name}: {found}, where numbers of {dtype} are {found.step:.3g} apart; {cure}"
        )


def check_size(assemble: Callable[[], VAE]) -> None:
    """Refuse networks that are too large for this machine: training needs weights, gradient and Adam's two moments at once."""
    try:
        with torch.device("meta"):  # shapes only, without memory
            needed = 4.0 * sum(p.numel() * p.element_size() for p in assemble().parameters())
    except (RuntimeError, OverflowError, TypeError) as error:
        if not re.search("overflow|too large|too big|invalid combination|out of range", str(error), re.IGNORECASE):
            return  # this component cannot be built on the meta device, so its size is not checked
        needed = float("inf")
    if needed > SHARE * memory():
        size = f"{amount(needed)} to train" if needed < 1e18 else "more memory than there is"
        raise SpecError(
            f"model: these networks need {size}, and this machine has {amount(memory())} of memory; "
            "choose smaller hidden layers or fewer latents"
        )


def _shift_row(message: str, start: int) -> str:
    """Shift the row number in a message from a part of the data to all data."""
    return re.sub(r"\brow (\d+)", lambda match: f"row {int(match[1]) + start}", message)
