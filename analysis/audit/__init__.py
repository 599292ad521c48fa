"""An audit: references over all data, within a budget, and their measures."""

from elbowroom.analysis.audit.auditor import Audit, audit

__all__ = ["Audit", "audit"]
