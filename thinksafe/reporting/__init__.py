"""The report of a run: report.json for programs, and one self-contained report.html for people."""

from thinksafe.reporting.html import write_report

__all__ = ["write_report"]
