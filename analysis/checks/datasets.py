"""Results of the model criticism as Datasets (statistics, PIT, draws), and their summary in a sentence."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import xarray as xr
from torch import Tensor

from elbowroom.analysis.checks.residuals import Residuals
from elbowroom.analysis.checks.statistics import EffectKind, Judged
from elbowroom.analysis.idata import file_names
from elbowroom.analysis.measures.table import LEVEL
from elbowroom.analysis.verdict.thresholds import effect_in_words

NATS = ("log_likelihood", "log_prior")  # statistics whose differences are in nats


def dataset(values: Mapping[str, Tensor], rows: Tensor, *, draws: bool, like: Mapping[str, Tensor] | None = None) -> xr.Dataset:
    """Arrange values (S, n, ...) or (n, ...) over chain, draw, obs_id and the site's own dimensions."""
    variables = {}
    names = file_names({name: t.shape[2 if draws else 1 :] for name, t in values.items()})
    for name, t in values.items():
        if like is not None:
            t = t.reshape(*t.shape[:2], *like[name].shape[1:])
        array = (t[None] if draws else t).cpu().numpy()
        array = array.astype(np.float32) if array.dtype == np.float64 else array
        lead = ("chain", "draw", "obs_id") if draws else ("obs_id",)
        name = names[name]
        variables[name] = ((*lead, *(f"{name}_dim_{i}" for i in range(array.ndim - len(lead)))), array)
    coords = {"obs_id": rows.cpu().numpy()}
    if draws:
        coords |= {"chain": np.arange(1), "draw": np.arange(max((v[1].shape[1] for v in variables.values()), default=0))}
    return xr.Dataset(variables, coords=coords)


def pit(found: Residuals) -> xr.Dataset:
    """Arrange the PIT over columns and u."""
    size = len(found.difference)
    found_pit = xr.Dataset(
        {
            "effect": ("column", found.effect.cpu().numpy(), {"long_name": "largest |ECDF - u| of the column's PIT"}),
            "p_value": ("column", found.p_value.cpu().numpy(), {"long_name": "of the column alone, not adjusted"}),
            "difference": ("u", found.difference.cpu().numpy(), {"long_name": "ECDF - u of the PIT of all entries"}),
        },
        coords={"column": found.columns.cpu().numpy(), "u": np.arange(1, size + 1) / size},
    )
    found_pit["band"] = ((), found.band, {"long_name": "holds all of |difference| with 95 % probability if the model is right"})
    return found_pit


def statistics(judged: Mapping[str, tuple[str, Judged, str, EffectKind]]) -> xr.Dataset:
    """Arrange statistics, name -> (group, judgement, words, kind of the effect), as a table."""
    families = len({group for group, *_ in judged.values()})
    most = max((len(one.null) for _, one, _, _ in judged.values()), default=0)
    null = np.full((len(judged), most), np.nan)
    for row, (_, one, _, _) in zip(null, judged.values(), strict=True):
        row[: len(one.null)] = one.null.cpu().numpy()
    every = [one for _, one, _, _ in judged.values()]
    numbers: dict[str, list[float]] = {
        "value": [one.value for one in every],
        "null_mean": [one.null.mean().item() for one in every],
        "null_sd": [one.null.std().item() for one in every],
        "p_value": [one.p_value for one in every],
        "p_adjusted": [min(1.0, families * one.p_family) for one in every],
        "effect": [one.effect for one in every],
    }
    words = {
        "group": [group for group, *_ in judged.values()],
        "words": [text for *_, text, _ in judged.values()],
        "effect_kind": [kind for *_, kind in judged.values()],
    }
    return xr.Dataset(
        {
            **{name: ("statistic", np.asarray(value, dtype=float)) for name, value in numbers.items()},
            **{name: ("statistic", np.asarray(value, dtype=str)) for name, value in words.items()},
            "null": (("statistic", "replicate"), null),
        },
        coords={"statistic": np.asarray(list(judged), dtype=str)},
    )


def sentence(found: xr.Dataset, attrs: Mapping[str, str]) -> str:
    """Name the statistics that contradict the model, with their effects."""
    if not found.sizes["statistic"]:
        return attrs["joint"] or attrs["residual"]
    least = float(found["p_adjusted"].min())
    if least > LEVEL:
        return f"no statistic speaks against the model (smallest adjusted p-value {least:.2g})"
    odd = found.isel(statistic=(found["p_adjusted"].values <= LEVEL))
    said = []
    for name, effect, kind in zip(odd["statistic"].values, odd["effect"].values, odd["effect_kind"].values, strict=True):
        said.append(f"{name} ({effect_in_words(float(effect), str(kind))})")
    return f"the data differ from those of the model in {', '.join(said)} (adjusted p-values at most {LEVEL})"
