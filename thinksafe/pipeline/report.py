"""Stages report and review: the pages for people."""

from pathlib import Path

from thinksafe.errors import UserError
from thinksafe.reporting.html import write_report
from thinksafe.reporting.review import write_review
from thinksafe.reporting.summary import summarize
from thinksafe.run.directory import RunDir


def make_report(run: RunDir) -> Path:
    """Write report.json and report.html from all finished stages, and return the path of report.html.

    Raises:
        UserError: no stage is finished.
    """
    if not run.manifest["stages"]:
        raise UserError(f"{run.path}: no stage is finished yet, so there is nothing to report")
    return write_report(summarize(run), run.path)


def make_review_page(run: RunDir, max_responses: int) -> Path:
    """Write review.html with the most uncertain responses, and return its path.

    Args:
        max_responses: maximum number of responses on the page.

    Raises:
        UserError: stage `accept` is not finished, or its files were changed.
    """
    if not run.is_done("accept"):
        raise UserError(f"{run.path}: no responses are judged yet; run `thinksafe filter` first")
    return write_review(run, max_responses)
