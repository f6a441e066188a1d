"""The stages of a run, from generate to report. Each stage reads records of the run directory and writes more records.

A stage can be killed at any moment; the next call resumes it. A call of a finished stage only checks that the stage's
files are unchanged, and raises a UserError otherwise; report and review page are written again. All workers of a run
call generate_responses, sample_unsteered_baseline, filter_responses, retry_rejected, require_accepted_examples,
train_student and evaluate_student together; only the leader calls the other functions.
"""

from thinksafe.pipeline.accept import accept_responses, require_accepted_examples
from thinksafe.pipeline.evaluate import evaluate_student
from thinksafe.pipeline.generate import generate_responses, sample_unsteered_baseline
from thinksafe.pipeline.judge import filter_responses
from thinksafe.pipeline.preflight import check_run, write_estimate
from thinksafe.pipeline.report import make_report, make_review_page
from thinksafe.pipeline.retry import retry_rejected
from thinksafe.pipeline.train import train_student

__all__ = [
    "accept_responses",
    "check_run",
    "evaluate_student",
    "filter_responses",
    "generate_responses",
    "make_report",
    "make_review_page",
    "require_accepted_examples",
    "retry_rejected",
    "sample_unsteered_baseline",
    "train_student",
    "write_estimate",
]
