"""The densities of a pair of programs as graphs over rows: one graph for any number of draws and any of the data.

A graph is traced for ONE datum, with its arguments as inputs, under `vmap` over the data and over draws of each:

    z (S, N, d), x (N, ...)  ->  log p(x_n, z_sn) (S, N), its gradient (S, N, d), or a whole leapfrog of a trajectory

S and N may vary, so a subset of the data, a bucket of chains and a block of a million rows share one graph. Before use, a
graph is compared with plain evaluation of every datum. It is shared with other data of the same program (`_shared`) and
compared again with those. Values other than tensors, such as a number in a global variable, are constants of the graph: a
shared graph that agrees much worse than at first is traced again.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from elbowroom.errors import first_line
from elbowroom.inference.compiled.graph import MAX_NODES, Function, Graph, Operations, Untraceable, log
from elbowroom.inference.compiled.policies import Compile, current_policy, data_ahead, evaluations_ahead
from elbowroom.inference.mcmc.leapfrog import leap
from elbowroom.inference.target.plain import PlainLogJoint
from elbowroom.inference.target.tracing import Kind, OneDatum, by_graph, leapfrog_arguments

EVALUATIONS: dict[Kind, float] = {"joint": 1e4, "terms": 1e4, "guide": 1e4, "grad": 1e4, "parts": 3e4, "leap": 3e4}
"""Evaluations per datum that an audit makes, roughly, a gradient counted as three."""
SMALL = 1e4  # output entries per datum, other than of products, that are not counted
REUSED = 100  # largest number of uses of a weight for one datum (convolutions)
CHECKED = 2  # number of draws in the comparison
FLOPS, ELEMENT = 8e10, 1.3e-9  # products: operations per second; others: seconds per output entry (double precision, two cores)
TRACE, COMPILE = 5.0, 20.0  # predicted seconds of work above which a trace (about 1 s) and a compilation (2 to 10 s) pay off
TRACED = 1.3  # operations of a graph for each of a plain evaluation: a deep Markov model's 3,481 took 70 s to trace, to 4,534
CLOSE = {torch.float64: 1e-7, torch.float32: 1e-3}
WORSE, ROUNDING = 10, 1e-2  # a shared graph is traced again above WORSE x (its first difference) and ROUNDING x CLOSE


@dataclass
class _Entry:
    """One kind of graph of one pair of programs, for any data.

    Attributes:
        graphs: by the outcomes of branches: the graph, or the reason why there is none.
        differences: first difference from plain evaluation, as a share of the tolerance; infinite if the graph was refused.
        slow: why graphs are not compiled; "" if they may be.
    """

    graphs: dict[tuple[bool, ...], Graph | str] = field(default_factory=dict)
    differences: dict[tuple[bool, ...], float] = field(default_factory=dict)
    slow: str = ""


_shared: weakref.WeakKeyDictionary[Any, dict[Any, _Entry]] = weakref.WeakKeyDictionary()


class Graphs:
    """The graphs of one `LogJoint` and of its parts.

    Traces and kernels are shared with other data of the same programs; the choice among them depends on these data alone.

    Attributes:
        used: the function that evaluates each kind; None for Pyro's handlers.
        reasons: why Pyro's handlers are used, by kind.
    """

    def __init__(self) -> None:
        self.used: dict[Kind, Function | None] = {}
        self.reasons: dict[Kind, str] = {}
        self._decided: dict[tuple[Kind, Compile, int, float], Function | None] = {}

    def ready(self, joint: PlainLogJoint, kind: Kind) -> Function | None:
        """Return the function to evaluate data with; None if plain evaluation is better, or the only way."""
        wanted, data = current_policy(), data_ahead(joint.root.n_obs)
        if wanted == "never":
            return None
        key = (kind, wanted, data, evaluations_ahead(EVALUATIONS[kind]))
        if key not in self._decided:
            self._decided[key] = self.used[kind] = self._decide(joint.root, kind, wanted, data)
        return self._decided[key]

    def _decide(self, root: PlainLogJoint, kind: Kind, wanted: Compile, data: int) -> Function | None:
        ahead = work_ahead(root, kind, data)
        if wanted == "auto" and ahead < TRACE:
            return None
        entry = _entries_of(root.model).setdefault((kind, _signature(root)), _Entry())
        try:
            if not entry.graphs:
                _refuse_long(root, kind)
            graph = self._agreeing(root, kind, entry)
        except Untraceable as error:
            if self.reasons.get(kind) != str(error):
                log.info(f"{WORDS[kind]}: evaluated by Pyro's handlers, not by a graph: {error}")
            self.reasons[kind] = str(error)
            return None
        if wanted == "auto" and ahead < COMPILE:
            return graph.replay
        try:
            if entry.slow:
                raise Untraceable(entry.slow)
            if not graph.compiled:
                seconds = graph.compile()
                log.info(f"{WORDS[kind]}: compiled in {seconds:.1f} s, for {data:,} data, about {ahead:.0f} s of work without")
        except Untraceable as error:
            if not entry.slow:
                log.info(f"{WORDS[kind]}: traced, not compiled: {error}")
            entry.slow = str(error)
            return graph.replay
        try:
            _check(root, kind, graph)
        except Untraceable as error:
            log.info(f"{WORDS[kind]}: its kernels are not used: {error}")
            return graph.replay
        return graph

    def _agreeing(self, root: PlainLogJoint, kind: Kind, entry: _Entry) -> Graph:
        """Return a graph that agrees with plain evaluation on these data: a shared one, or a new one.

        Raises:
            Untraceable: there is none.
        """
        graph, outcomes = self._trace(root, kind, entry)
        if (before := entry.differences.get(outcomes)) is not None:
            try:
                if _check(root, kind, graph.replay) <= max(WORSE * before, ROUNDING):
                    return graph
            except Untraceable:
                if math.isinf(before):
                    raise
            del entry.graphs[outcomes]
            graph, outcomes = self._trace(root, kind, entry)
        entry.differences[outcomes] = math.inf
        entry.differences[outcomes] = _check(root, kind, graph.replay)
        return graph

    def _trace(self, root: PlainLogJoint, kind: Kind, entry: _Entry) -> tuple[Graph, tuple[bool, ...]]:
        """Return the graph for the outcomes of branches on these data, traced if there is none yet, and the outcomes."""
        if root.program.index:
            raise Untraceable("the plate is sub-sampled")
        if not root.separable() and (kind == "guide" or root.model_separates != [True]):
            raise Untraceable("its arguments cannot be taken apart by datum")
        rows = OneDatum(root)
        with root.frozen_weights():
            outcomes = rows.record(kind)
            if outcomes not in entry.graphs:
                try:
                    entry.graphs[outcomes] = rows.graph(kind, outcomes)
                except Untraceable as error:
                    entry.graphs[outcomes] = str(error)
        found = entry.graphs[outcomes]
        if isinstance(found, str):
            raise Untraceable(found)
        return found, outcomes


def _refuse_long(root: PlainLogJoint, kind: Kind) -> None:
    """Refuse to trace what would have too many operations, as sequences with a site at every step have.

    Raises:
        Untraceable: says how many operations there are.
    """
    with torch.no_grad(), Operations() as one:
        _plainly(root, kind, root.probe_points[:1])
    if one.count * TRACED > MAX_NODES:
        raise Untraceable(f"it has {one.count:,} operations, and a graph more than {MAX_NODES:,}")


def _check(root: PlainLogJoint, kind: Kind, graph: Function) -> float:
    """Compare a graph with plain evaluation at tested points of every datum; return the difference as a share of `CLOSE`.

    Raises:
        Untraceable: a value differs, or is finite in only one of them, or no value is finite.
    """
    z = root.probe_points[:CHECKED]
    with root.frozen_weights():
        plain = _plainly(root, kind, z)
        try:
            found = by_graph(root, graph, z, *leapfrog_arguments(kind, z))
        except (RuntimeError, ValueError, IndexError) as error:
            raise Untraceable(f"the graph fails with other sizes ({first_line(error)})") from error
    share = 0.0
    for ours, theirs in zip(found, plain, strict=True):
        finite = theirs.isfinite()
        if not finite.any() or not torch.equal(ours.isfinite(), finite):
            raise Untraceable(f"{WORDS[kind]} by the graph is finite elsewhere than plain evaluation, or nowhere")
        close = max(CLOSE.get(t.dtype, 1e-3) for t in (z, theirs))  # a double computed from singles has their rounding
        difference, expected = (ours[finite] - theirs[finite]).abs(), theirs[finite].abs()
        share = max(share, float((difference / (close + close * expected)).max()))
        if not share <= 1:
            worst = float(difference.max())
            raise Untraceable(f"{WORDS[kind]} by the graph differs by {worst:.1e} from plain evaluation")
    return share


WORDS: dict[Kind, str] = {
    "joint": "log p(x, z)",
    "terms": "log p(z) and log p(x|z)",
    "guide": "log q(z|x)",
    "grad": "log p(x, z) and its gradient",
    "parts": "log p(z), log p(x|z) and their gradients",
    "leap": "a leapfrog of log p(x, z)",
}


def _plainly(joint: PlainLogJoint, kind: Kind, z: Tensor) -> tuple[Tensor, ...]:
    """Evaluate by Pyro's handlers, even if there is a graph."""
    if kind == "joint":
        return (PlainLogJoint.__call__(joint, z),)
    if kind == "guide":
        return (PlainLogJoint.log_guide(joint, z),)
    if kind == "leap":
        momentum, size, root, kick = leapfrog_arguments(kind, z)
        return leap(partial(PlainLogJoint.grad, joint), z, momentum, size, root[0], kick)
    if kind == "grad":
        return PlainLogJoint.grad(joint, z)
    return PlainLogJoint.terms(joint, z) if kind == "terms" else PlainLogJoint.parts(joint, z)


def work_ahead(root: PlainLogJoint, kind: Kind, data: int) -> float:
    """Predict the seconds of plain evaluation for `data` data, from the operations of one more draw."""
    each = data * evaluations_ahead(EVALUATIONS[kind]) / root.n_obs
    if each * root.n_obs * (2 * REUSED * root.snapshot.size() / FLOPS + SMALL * ELEMENT) < TRACE:  # not worth counting
        return 0.0
    evaluate = PlainLogJoint.log_guide if kind == "guide" else PlainLogJoint.__call__
    with torch.no_grad():
        with Operations() as one:
            evaluate(root, root.probe_points[:1])
        with Operations() as two:
            evaluate(root, root.probe_points[:2])
    return each * ((two.flops - one.flops) / FLOPS + (two.elements - one.elements) * ELEMENT)


def _signature(root: PlainLogJoint) -> Any:
    """Return everything that a graph depends on, other than the values of its inputs."""
    leaves = [_kind_of(t, dim) for t, dim in zip(root.leaves(), root.data_dims, strict=True)]
    tables = [(site.name, None if site.values is None else str(site.values.tolist())) for site in root.program.discrete]
    facts = (
        *tables,
        root.dim,
        root.program.active is None,
        str(root.program.gated),
        tuple(root.program.pinned),
        root.probe_points.dtype,
        str(root.device),
    )
    return tuple(leaves), facts, root.snapshot.identity(), _identity(root.model), _identity(root.guide)


def _kind_of(leaf: Any, dim: int | None) -> Any:
    if isinstance(leaf, Tensor):
        return dim, leaf.dtype, tuple(size for i, size in enumerate(leaf.shape) if i != dim)
    return leaf if isinstance(leaf, int | float | str | None) else id(leaf)


def _identity(program: Any) -> Any:
    """Return a key of a program that does not keep it alive."""
    inner = getattr(program, "program", None)  # if it is `Promoted`
    if inner is not None and not isinstance(program, torch.nn.Module):
        return type(program), _identity(inner)
    owner = getattr(program, "__self__", program)
    try:
        reference = weakref.ref(owner)
        hash(reference)  # that of the owner, which e.g. a dataclass has not
        return reference, getattr(program, "__func__", None)
    except TypeError:
        return id(owner), getattr(program, "__func__", None)


def _entries_of(model: Any) -> dict[Any, _Entry]:
    """Return the entries shared by all data of a program; new ones if the program cannot be a key."""
    inner = getattr(model, "program", model)
    try:
        return _shared.setdefault(getattr(inner, "__self__", inner), {})
    except TypeError:
        return {}
