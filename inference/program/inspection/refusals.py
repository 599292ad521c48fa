"""Forms of Pyro programs that per-datum inference does not apply to, refused by name and reason."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from elbowroom.errors import UnsupportedProgram
from elbowroom.inference.program.masks import entries
from elbowroom.inference.program.sites import frame_of

MISMATCH = re.compile(r"Shape mismatch inside plate\('(.*)'\) at site (\S+) dim (-\d+), (\d+) vs (\d+)")
TO_EVENT = "where they are values of one datum, say so by `.to_event(1)` on its distribution, in model and guide"


@contextlib.contextmanager
def shapes_explained() -> Iterator[None]:
    """Say Pyro's complaint about a batch shape in one line."""
    try:
        yield
    except ValueError as error:
        found = MISMATCH.search(str(error))
        if found is None:
            raise
        plate, site, dim, want, have = found.groups()
        raise UnsupportedProgram(
            f"site {site!r} has {have} entries in dimension {dim}, where plate {plate!r} has {want}; {TO_EVENT}"
        ) from error


def refuse_unplated(trace: Trace, plate: str) -> None:
    """Refuse a batch dimension that belongs to no plate: nothing says whether it is one of data or of one datum's values."""
    for name, node in trace.nodes.items():
        if node["type"] != "sample" or site_is_subsample(node) or node["infer"].get("_deterministic"):
            continue
        if frame_of(node, plate) is None:
            continue
        plated = {frame.dim for frame in node["cond_indep_stack"]}
        shape = node["fn"].batch_shape
        for dim in range(-len(shape), 0):
            if shape[dim] > 1 and dim not in plated:
                raise UnsupportedProgram(
                    f"site {name!r} has {shape[dim]} entries in dimension {dim}, which belongs to no plate; {TO_EVENT}"
                )


class GivenRows(Messenger):
    """Keeps the rows that a program gives its plates, `subsample=rows`, before a replay puts the guide's in their place."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[str, Any] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) and msg["value"] is not None:
            self.rows[msg["name"]] = msg["value"]


def refuse_other_rows(given: Mapping[str, Any], trace: Trace, guide_trace: Trace) -> None:
    """Refuse a plate whose rows differ between model and guide."""
    for name, node in trace.nodes.items():
        theirs = guide_trace.nodes.get(name)
        if node["type"] != "sample" or not site_is_subsample(node) or theirs is None or not site_is_subsample(theirs):
            continue
        if name in given and not torch.equal(torch.as_tensor(given[name]), torch.as_tensor(node["value"])):
            raise UnsupportedProgram(
                f"plate {name!r}: the model is given its rows (subsample=...) and the guide has others, which Pyro puts in "
                "their place, so that x of some rows meets the parameters of others; give the guide's plate the same rows"
            )
        if node["fn"].size != theirs["fn"].size:
            raise UnsupportedProgram(
                f"plate {name!r} has {node['fn'].size} entries in the model and {theirs['fn'].size} in the guide: open the "
                "same one in both"
            )


def refuse_sequential(*traces: Trace) -> None:
    """Refuse a plate that is a Python loop."""
    for trace in traces:
        for name, node in trace.nodes.items():
            if node["type"] != "sample" or site_is_subsample(node):
                continue
            for frame in node["cond_indep_stack"]:
                if not frame.vectorized:
                    raise UnsupportedProgram(
                        f"plate {frame.name!r} is sequential (a Python loop; site {name!r}): open it as a context, "
                        f"`with pyro.plate({frame.name!r}, ...)`"
                    )


def refuse_auxiliary(extra: Mapping[str, Any], held: frozenset[str]) -> None:
    """Refuse a site of the guide that is no latent of the model and carries none."""
    for name in extra:
        if name not in held:
            raise UnsupportedProgram(
                f"guide site {name!r} is not a latent of the model, and no site of the model is a Delta of it (an auxiliary "
                "variable): log q(z|x) would need an integral over it; draw the model's own sites from distributions with a "
                "density, or make each of them a Delta of the map from that site's entries onto its support"
            )


def factor_notes(guide_trace: Trace, model_trace: Trace) -> list[str]:
    """Say which sites are observed in the guide alone: they are factors, which no density of z has."""
    notes = []
    for name, node in guide_trace.nodes.items():
        observed = node["type"] == "sample" and node["is_observed"] and not node["infer"].get("_deterministic")
        # a messenger guide runs the model and so has its observed sites; a site observed in the guide alone is a factor
        if observed and not site_is_subsample(node) and name not in model_trace.nodes:
            notes.append(
                f"guide site {name!r} is observed (a pyro.factor or obs= in the guide) and ignored: q(z|x) is the distribution "
                "that the guide draws from, and the ELBO is that of these draws, not the one that SVI counts with the factor"
            )
    return notes


def check_masks(node: Mapping[str, Any], guide_node: Mapping[str, Any]) -> None:
    """Refuse a site that is masked differently in model and guide."""

    def full(n: Mapping[str, Any]) -> Tensor:
        found = entries(n["fn"], n["mask"], n["value"].device, n["name"])
        return torch.ones(n["fn"].batch_shape, dtype=torch.bool) if found is None else found

    mine, theirs = full(node), full(guide_node)
    if bool(mine.all()) and bool(theirs.all()):
        return
    if mine.shape != theirs.shape or not torch.equal(mine, theirs):
        raise UnsupportedProgram(
            f"site {node['name']!r} is masked differently in model and guide: open the same poutine.mask around it in both"
        )
