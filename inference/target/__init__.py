"""The log joint log p(x_n, z) of each datum, its gradient, and the guide's draws."""

from elbowroom.inference.target.log_joint import LogJoint

__all__ = ["LogJoint"]
