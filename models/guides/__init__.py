"""Families of guides q(z|x), one class each; `base` says what a family is."""

from elbowroom.models.guides.base import AmortizedGuide, Family, positive_scale

__all__ = ["AmortizedGuide", "Family", "positive_scale"]
