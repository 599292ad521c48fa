"""A program computed in one floating-point precision, whatever the precision of its own tensors.

A snapshot converts arguments, modules and parameters. It cannot reach a tensor in a program's closure, nor one that the program
makes with `dtype=torch.float32` or `.float()`; next to float64 latents, these raise errors deep inside a matrix product. Here
every torch function that the program calls is intercepted (`torch.overrides.TorchFunctionMode`,
https://pytorch.org/docs/stable/torch.overrides.html), and its floating-point arguments and dtypes are replaced. The user's
objects stay unchanged. This costs a few microseconds per call, so it is used only for programs that need it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

CASTS = {"float": torch.float32, "double": torch.float64, "half": torch.float16, "bfloat16": torch.bfloat16}
LEFT = frozenset({"__get__", "__set__", "__setitem__", "grad", "backward"})  # these read or change their own argument


class Promotion(TorchFunctionMode):
    """Carry out torch functions in one floating-point type.

    Args:
        dtype: the type.

    Attributes:
        needed: whether any function has used another floating-point type so far.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.needed = False

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call `func` with floating-point arguments and results of the one type."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        in_place = "out" in kwargs or name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))
        if in_place or name in LEFT:
            return func(*args, **kwargs)
        given = [self._one(value) for value in args]
        if name in CASTS:
            self.needed |= CASTS[name] != self.dtype
            return given[0].to(self.dtype)
        return self._one(func(*given, **{key: self._one(value) for key, value in kwargs.items()}))

    def _one(self, value: Any) -> Any:
        """Return a tensor, a dtype, or a list or tuple of them, in the one precision."""
        if isinstance(value, Tensor):
            if value.is_floating_point() and value.dtype != self.dtype:
                self.needed = True
                return value.to(self.dtype)
        elif isinstance(value, torch.dtype):
            if value.is_floating_point and value != self.dtype:
                self.needed = True
                return self.dtype
        elif type(value) in (list, tuple):
            return type(value)(self._one(part) for part in value)
        return value


class Promoted:
    """A program (any callable) run in one floating-point type; its attributes are the program's."""

    def __init__(self, program: Callable[..., Any], dtype: torch.dtype) -> None:
        self.program, self.dtype = program, dtype

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program."""
        with Promotion(self.dtype):
            return self.program(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Return attributes of the wrapped program, e.g. `__self__` of a method."""
        if name in ("program", "dtype"):
            raise AttributeError(name)
        return getattr(self.program, name)


def mixed(error: BaseException | None) -> bool:
    """Say whether an error is torch's complaint about operands of different types."""
    return isinstance(error, RuntimeError) and any(word in str(error) for word in ("dtype", "scalar type"))


def mixes(run: Callable[[], Any], dtype: torch.dtype) -> bool:
    """Say whether `run` uses a floating-point type other than `dtype`."""
    with Promotion(dtype) as promotion:
        run()
    return promotion.needed
