"""Products of large float32 matrices on a CPU, as they are multiplied in compiled graphs.

`by_onednn`: oneDNN, which torch comes with, in place of its BLAS. For X W and X W^T with the rows of X together in memory, from
about 3e7 floating-point operations on, it takes up to a sixth less time than MKL on an AMD EPYC with AVX-512, the only kind of
processor on which it was measured and is used: 2 to 6 % of a training step. Below that size its call costs more than it saves;
products with X^T, the gradients of weights, it would have to rearrange first.

`by_halves`: where an optimizer updates weights between calls, each of two cores multiplies by one half of their rows, which it
updates. What both have read has to leave the other's cache before it is written: with the cores far apart Adam takes 1.42 ms
for two matrices of 784 x 400 that were multiplied by in any other way, 0.31 ms so, and a step on 128 data is a fifth shorter;
with the cores near it is about as long. From some hundred rows of X on, halves cost more than that.

All round in an order of their own.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

LARGE = 3e7  # floating-point operations
ROWS = 256  # of X, above which halves do not pay


def by_halves(graph: Graph, updated: Collection[Node]) -> int:
    """Let each of two cores read one half of the rows of weights that are updated; returns how many products are so.

    X W^T = [X W_1^T, X W_2^T] and X W = X_1 W_1 + X_2 W_2, with W_1 above W_2: two products at once, each core's its own.

    Args:
        graph: of sizes that are known.
        updated: the inputs that are.
    """
    if torch.get_num_threads() != 2 or not torch.backends.mkl.is_available():
        return 0
    aten, found = torch.ops.aten, 0
    call = functools.partial(_call, graph)
    for node in list(graph.nodes):
        if (parts := _parts(node)) is None:
            continue
        bias, x, right = parts
        weights, turned = _origin(right)
        (m, k), (_, n) = x.meta["val"].shape, right.meta["val"].shape
        if weights not in updated or (n if turned else k) % 2 or m > ROWS or not weights.meta["val"].is_contiguous():
            continue
        with graph.inserting_before(node):
            if turned:
                halves = call(aten.permute.default, call(aten.view.default, weights, [2, n // 2, k]), [0, 2, 1])
                both = call(aten.bmm.default, call(aten.expand.default, x, [2, m, k]), halves)
                product = call(aten.cat.default, [call(aten.select.int, both, 0, half) for half in range(2)], 1)
            else:
                halves = call(aten.view.default, weights, [2, k // 2, n])
                left = call(aten.permute.default, call(aten.view.default, x, [m, 2, k // 2]), [1, 0, 2])
                product = call(aten.sum.dim_IntList, call(aten.bmm.default, left, halves), [0])
            if bias is not None:
                product = call(aten.add.Tensor, product, bias)
        node.replace_all_uses_with(product)
        graph.erase_node(node)
        found += 1
    return found


def by_onednn(graph: Graph) -> int:
    """Let oneDNN multiply what is large in a graph of sizes that are known; returns how many products it got."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return 0
    found = 0
    for node in list(graph.nodes):
        if (parts := _parts(node)) is None or not _together(*parts):
            continue
        bias, x, weights = parts
        with graph.inserting_before(node):
            product = _call(graph, _product(), x, _call(graph, torch.ops.aten.permute.default, weights, [1, 0]), bias)
        node.replace_all_uses_with(product)
        graph.erase_node(node)
        found += 1
    return found


def _parts(node: Node) -> tuple[Any, Any, Any] | None:
    """Return bias, X and W of a large product bias + X W."""
    aten = torch.ops.aten
    args: tuple[Any, ...] = node.args
    if node.target is aten.mm.default:
        args = (None, *args)
    elif node.target is not aten.addmm.default:
        return None
    if node.kwargs or len(args) != 3:  # alpha, beta, another type of the result
        return None
    tensors = [arg.meta["val"] for arg in args if arg is not None]
    left, right = tensors[-2:]
    sizes = (*left.shape, right.shape[1])
    if not all(isinstance(size, int) for size in sizes) or 2 * sizes[0] * sizes[1] * sizes[2] < LARGE:
        return None
    return args if all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors) else None


def _together(bias: Any, x: Any, weights: Any) -> bool:
    """Whether the numbers stand as oneDNN reads them: so many in a row, whatever the strides."""
    if bias is not None:
        value = bias.meta["val"]
        if value.shape != (weights.meta["val"].shape[1],) or not value.is_contiguous():
            return False
    return bool(x.meta["val"].is_contiguous())


def _origin(node: Node) -> tuple[Node, bool]:
    """Return the matrix that a node is, and whether it is its transpose."""
    aten, turned = torch.ops.aten, False
    args: tuple[Any, ...] = node.args
    while node.target in (aten.alias.default, aten.permute.default):
        turned ^= node.target is aten.permute.default and list(args[1]) == [1, 0]
        node = args[0]
        args = node.args
    return node, turned


def _call(graph: Graph, target: Any, *args: Any) -> Node:
    """Add a call, and what it would put out."""
    node = graph.call_function(target, args)
    values: Any = torch.fx.node.map_arg(args, lambda arg: arg.meta["val"])
    node.meta["val"] = target(*values)
    return node


_library = torch.library.Library("elbowroom", "FRAGMENT")


@functools.cache
def _product() -> Any:
    """Return the operation X W^T + bias, which TorchInductor calls as it is: its own for oneDNN wants constant weights."""
    linear = torch.ops.mkldnn._linear_pointwise.default

    def product(x: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
        return linear(x, weights, bias, "none", [], "")

    def shape(x: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
        return x.new_empty(x.shape[0], weights.shape[0])

    _library.define("product(Tensor x, Tensor weights, Tensor? bias) -> Tensor", tags=[torch.Tag.needs_exact_strides])
    _library.impl("product", product, "CPU")
    torch.library.register_fake("elbowroom::product", shape, lib=_library)
    return torch.ops.elbowroom.product.default
