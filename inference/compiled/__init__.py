"""Functions of tensors as compiled graphs, and the rules for when to compile."""

from elbowroom.inference.compiled.policies import policy

__all__ = ["policy"]
