"""Families of guides q(z|x), one class each; `base` defines the interface of a family."""

from elbowroom.models.guides.base import AmortizedGuide, Family, positive_scale

__all__ = ["AmortizedGuide", "Family", "positive_scale"]
