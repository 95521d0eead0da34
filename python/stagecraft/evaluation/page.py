"""report.html: one file that holds all of the evaluation and asks the network for nothing."""

from __future__ import annotations

import html

from stagecraft.evaluation.markdown import written as markdown
from stagecraft.evaluation.results import Outcome


def written(outcome: Outcome) -> str:
    """The text of report.html."""
    return f"<!doctype html><meta charset=utf-8><pre>{html.escape(markdown(outcome))}</pre>\n"
