"""A finished run, written for two readers: report.json for programs, one self-contained report.html for people."""

from thinksafe.reporting.html import write_report

__all__ = ["write_report"]
