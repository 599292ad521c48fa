"""The audit: references for all data within a budget, and the measures taken against them."""

from elbowroom.analysis.audit.auditor import Audit, audit

__all__ = ["Audit", "audit"]
