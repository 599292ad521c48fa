"""Products of large float32 matrices on a CPU by oneDNN, which torch comes with, in place of its BLAS.

For X W and X W^T with the rows of X together in memory, from about 3e7 floating-point operations on, oneDNN takes up to a sixth
less time than MKL on an AMD EPYC with AVX-512, the only kind of processor on which it was measured and is used: 2 to 6 % of a
training step. Below that size its call costs more than it saves; products with X^T, the gradients of weights, it would have to
rearrange first. Each library rounds in its own order.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

LARGE = 3e7  # floating-point operations


def by_onednn(graph: torch.fx.Graph) -> int:
    """Let oneDNN multiply what is large in a graph of sizes that are known; returns how many products it got."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return 0
    found = 0
    for node in list(graph.nodes):
        if (parts := _parts(node)) is None:
            continue
        bias, x, weights = parts
        with graph.inserting_before(node):
            turned = graph.call_function(torch.ops.aten.permute.default, (weights, [1, 0]))
            turned.meta["val"] = weights.meta["val"].permute(1, 0)
            product = graph.call_function(_product(), (x, turned, bias))
            product.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(product)
        graph.erase_node(node)
        found += 1
    return found


def _parts(node: torch.fx.Node) -> tuple[Any, Any, Any] | None:
    """Return bias, X and W of bias + X W where it is one for oneDNN."""
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
    plain = all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)
    if args[0] is not None:  # oneDNN reads as many numbers in a row, whatever the strides
        bias = tensors[0]
        plain = plain and bias.shape == (right.shape[1],) and bias.is_contiguous()
    return args if plain and left.is_contiguous() else None


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
