"""Functions of tensors as graphs. Everything that a function reads is an input, so weights and data may change between calls.

A small evaluation of a Pyro program spends most of its time in Pyro's handlers. `Graph` runs the function once under `make_fx`
and keeps only the tensor operations. Tensors that the function reads besides its arguments (weights, constants) become inputs
too, by reference, and are read again at every call. A graph is replayed one operation at a time, or compiled by TorchInductor
into fused kernels, which needs a C++ compiler and some seconds. Random numbers are drawn anew at every call from torch's own
generators, in the order of the eager function.

A function that cannot be a graph raises `Untraceable` with the reason, and its caller runs it eagerly. Reasons are branches on
values, numbers taken out of tensors, operations that write to their inputs (batch normalisation in train mode), and too many
operations (loops over time steps).

`policy` sets whether graphs are used. `auto` decides from the planned work, counted in data and floating-point operations and
never in seconds: the same seed gives the same numbers on a busy machine and on an idle one.
"""

from __future__ import annotations

import functools
import logging
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from elbowroom.errors import first_line
from elbowroom.inference.randomness import undisturbed, validation_kept
from elbowroom.system.stages import stage

log = logging.getLogger("elbowroom.compiled")
"""Says what is compiled and what is not, and why; commands show it."""


Function = Callable[..., tuple[Tensor, ...]]

MAX_NODES = 3000  # operations, above which compiling takes minutes


class Untraceable(RuntimeError):
    """A function cannot be made a graph. The message is the reason, worded as the end of a sentence."""


class Graph:
    """A function of tensors, traced once; all tensors that it uses are inputs.

    Args:
        function: takes tensors and returns a tuple of tensors; it must not keep them.
        inputs: tensors to trace it with.
        varying: sizes in `inputs` that may change from call to call. They must differ from each other, from all other sizes of
            the inputs, and from 0 and 1.

    Attributes:
        constants: the tensors that the function read besides its inputs, by reference.
        captured: whether torch may overwrite the result of a call at the next call.

    Raises:
        Untraceable: the function cannot be made a graph; gives the reason.
    """

    def __init__(self, function: Function, inputs: Sequence[Tensor], *, varying: Sequence[int] = ()) -> None:
        from torch.fx.experimental.proxy_tensor import make_fx

        try:
            inputs = [t.contiguous() for t in inputs]
            with undisturbed(inputs):
                mode: Literal["fake", "symbolic"] = "symbolic" if varying else "fake"
                tracer = make_fx(function, tracing_mode=mode, _allow_non_fake_inputs=True)
                self.module = tracer(*inputs)
                # noise is drawn into empty tensors, which is harmless; writes that stay in a functional graph go to its inputs
                pure = make_fx(_functional(self.module), tracing_mode=mode, _allow_non_fake_inputs=True)
                written = _written(self.module) and _written(pure(*inputs))
        except Untraceable:
            raise
        except Exception as error:  # whatever a program raises when its tensors have no values
            raise Untraceable(f"tracing failed ({first_line(error)})") from error
        if varying and (fixed := _fixed(self.module, inputs, varying)):
            raise Untraceable(f"an operation in it fixes a size ({fixed})")
        self.constants = _lift(self.module)
        self.varying = varying
        self.shapes = [t.shape for t in inputs]
        self._kernel: Callable[..., Any] | None = None
        self.captured = False
        nodes = self.module.graph.nodes
        if written:
            raise Untraceable(f"it writes to its inputs ({written})")
        if len(nodes) > MAX_NODES:
            raise Untraceable(f"it has {len(nodes):,} operations, more than {MAX_NODES:,}")

    @property
    def compiled(self) -> bool:
        """Whether there are compiled kernels."""
        return self._kernel is not None

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run the graph (compiled, if it was compiled) without recording gradients."""
        if self._kernel is None:
            return self.replay(*inputs)
        if self.captured:  # what the last call returned may be overwritten
            torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():  # kernels take the layout of the example for granted
            return tuple(self._kernel(*[t.contiguous() for t in inputs], *self.constants))

    def replay(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run the graph operation by operation, even if it is compiled."""
        with torch.no_grad():
            return tuple(self.module(*[t.contiguous() for t in inputs], *self.constants))

    def compile(self, check: Callable[[Graph], None] | None = None, *, capture: bool = False) -> float:
        """Compile the graph into fused kernels, once; returns the seconds it took.

        Args:
            check: called with the compiled graph; if it raises, the graph is replayed as before.
            capture: on CUDA, let torch capture it as a CUDA graph; each call then overwrites the result of the previous one.

        Raises:
            Untraceable: there is no C++ compiler, TorchInductor fails, or `check` raises it.
        """
        if self.compiled:
            return 0.0
        start = time.perf_counter()
        with stage("compile"):
            self.captured = capture
            self._kernel = _inductor(self.module, self.shapes, self.varying, capture)
            try:
                if check is not None:
                    check(self)
            except BaseException:
                self._kernel, self.captured = None, False
                raise
        return time.perf_counter() - start


def _inductor(module: Any, shapes: Sequence[torch.Size], varying: Sequence[int], capture: bool) -> Callable[..., Any]:
    """Compile a traced module for the types and layouts that were traced; the result takes its tensors one by one.

    No guard compares them at each call: every input is made contiguous, and varying sizes are marked as dynamic. Constants are
    compiled as they were when they were traced: outside their scope weights may be in another precision.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    values = [node.meta["val"] for node in module.graph.nodes if node.op == "placeholder"]
    if values[0].device.type == "cpu" and not _has_compiler():
        raise Untraceable("there is no C++ compiler (g++ or clang++)")
    options: dict[str, Any] = {"fallback_random": True, "guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
    if capture:
        options["triton.cudagraphs"] = True  # what mode="reduce-overhead" is; a mode and options cannot be given together
    inputs = [torch.ones(shape, dtype=v.dtype, device=v.device) for shape, v in zip(shapes, values, strict=False)]
    for v in values[len(shapes) :]:
        inputs.append(torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=v.device).fill_(1))
    try:
        with warnings.catch_warnings(), torch.no_grad(), undisturbed(inputs), validation_kept():
            warnings.simplefilter("ignore")  # torch deprecates parts of itself
            plain = make_fx(_functional(module), FASTER, "symbolic")(*values)
            kernel = torch.compile(plain, fullgraph=True, dynamic=None if varying else False, options=options)
            for value, shape in zip(inputs, shapes, strict=False):
                for dim, size in enumerate(shape):
                    if size in varying:
                        torch._dynamo.mark_dynamic(value, dim)
            kernel(*inputs)
    except Exception as error:  # whatever a compiler raises
        raise Untraceable(f"compiling failed ({first_line(error)})") from error
    return kernel


def _tanh(x: Tensor) -> Tensor:
    return 2 * torch.sigmoid(2 * x) - 1


def _isnan(x: Tensor) -> Tensor:
    return x != x


FASTER = {torch.ops.aten.tanh.default: _tanh, torch.ops.aten.isnan.default: _isnan}
"""Operations that TorchInductor has far faster kernels for in other words: tanh by the logistic function, exact to rounding;
NaN as what does not equal itself, which C++ can ask of many numbers at once."""


@functools.cache
def _has_compiler() -> bool:
    return any(shutil.which(name) for name in ("g++", "clang++", "c++"))


def _lift(module: Any) -> list[Tensor]:
    """Turn every tensor that a module holds into an input after the other inputs; returns these tensors."""
    graph, places = module.graph, {}
    found: list[Tensor] = []
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    last, fake = inputs[-1], inputs[0].meta["val"].fake_mode
    for node in list(graph.nodes):
        if node.op != "get_attr":
            continue
        value = getattr(module, node.target)
        if not isinstance(value, Tensor):  # a torch.Generator of the program's own
            raise Untraceable(f"it reads a {type(value).__name__}, which is no tensor")
        if id(value) not in places:
            with graph.inserting_after(last):
                last = graph.placeholder(f"constant_{len(found)}")
            last.meta["val"] = fake.from_tensor(value.detach(), static_shapes=True)
            places[id(value)] = last
            found.append(value)
        node.replace_all_uses_with(places[id(value)])
        graph.erase_node(node)
    graph.eliminate_dead_code()
    module.recompile()
    return found


def _fixed(module: Any, inputs: Sequence[Tensor], varying: Sequence[int]) -> str:
    """Return the varying size that tracing made a constant, or ""."""
    places = [node.meta["val"] for node in module.graph.nodes if node.op == "placeholder"]
    for place, given in zip(places, inputs, strict=True):
        for size, example in zip(place.shape, given.shape, strict=True):
            if example in varying and (not isinstance(size, torch.SymInt) or size.node.maybe_as_int() is not None):
                return f"{example} of {tuple(given.shape)}"
    return ""


def _functional(module: Any) -> Callable[..., Any]:
    """Return a function that runs a graph without changing any tensor in place."""
    run = torch.fx.Interpreter(module).run
    return torch.func.functionalize(run, remove="mutations") if _written(module) else run


def _written(module: Any) -> str:
    """Return the name of the first operation that changes a tensor in place, or ""."""
    schemas = (
        (node.target, getattr(node.target, "_schema", None)) for node in module.graph.nodes if node.op == "call_function"
    )
    return next((str(target) for target, schema in schemas if schema is not None and schema.is_mutable), "")


class Operations(TorchDispatchMode):
    """Counts operations, the floating-point ones in matrix products and convolutions, and the output entries of all others.

    torch's own `FlopCounterMode` also watches modules, which fails for some programs.
    """

    count = 0
    flops = 0
    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and count it."""
        out = func(*args, **(kwargs or {}))
        self.count += 1
        counted = flop_registry.get(getattr(func, "overloadpacket", None))
        if counted is not None:
            self.flops += int(counted(*args, **(kwargs or {}), out_val=out))
        elif isinstance(out, Tensor) and not getattr(func, "is_view", False):
            self.elements += out.numel()
        return out
