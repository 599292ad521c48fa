"""Functions of tensors as compiled graphs, and when to make one."""

from elbowroom.inference.compiled.policies import policy

__all__ = ["policy"]
