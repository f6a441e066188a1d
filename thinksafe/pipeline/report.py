"""Pages for people to read."""

from pathlib import Path

from thinksafe.errors import UserError
from thinksafe.reporting.html import write_report
from thinksafe.reporting.review import write_review
from thinksafe.reporting.summary import summarise
from thinksafe.run.directory import RunDir


def report(run: RunDir) -> Path:
    """Write report.json and report.html from whatever stages are done; the page's path."""
    if not run.manifest["stages"]:
        raise UserError(f"{run.path}: no stage is done yet, so there is nothing to report")
    return write_report(summarise(run), run.path)


def review(run: RunDir, most: int) -> Path:
    """Write review.html with the most uncertain responses; the page's path."""
    if not run.is_done("accept"):
        raise UserError(f"{run.path}: nothing is judged yet; run `thinksafe filter` first")
    return write_review(run, most)
