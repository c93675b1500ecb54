"""The report of a run: statistics, claims, figures and a page, made from results only (never from a model)."""

from jsublim.report.html import write_report
from jsublim.report.terminal import print_summary

__all__ = ["print_summary", "write_report"]
