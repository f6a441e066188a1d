"""The stages of a run, from generate to report. Each stage reads records of the run directory and writes more records.

A stage can be killed at any moment; the next call resumes it. A call of a finished stage only checks that the stage's
files are unchanged, and raises a UserError otherwise; report and review page are written again. Only the leader calls
make_report and make_review_page; all workers of a run call each other function together.
"""

from thinksafe.pipeline.accept import accept_responses, require_accepted_examples
from thinksafe.pipeline.evaluate import evaluate_student
from thinksafe.pipeline.generate import generate_responses, sample_unsteered_baseline
from thinksafe.pipeline.judge import filter_responses
from thinksafe.pipeline.load import load_examples
from thinksafe.pipeline.preflight import check_run, write_estimate
from thinksafe.pipeline.report import make_report, make_review_page
from thinksafe.pipeline.retry import retry_rejected
from thinksafe.pipeline.train import train_student
from thinksafe.run.checkpoints import CheckpointStore
from thinksafe.run.directory import RunDir

STAGES = {
    "generate": generate_responses,
    "probe": sample_unsteered_baseline,
    "filter": filter_responses,
    "retry": retry_rejected,
    "accept": lambda run, checkpoints: accept_responses(run),
    "load": lambda run, checkpoints: load_examples(run),
}
"""Stages that make training examples, by the names that `Method.stages` has."""


def make_examples(run: RunDir, checkpoints: CheckpointStore) -> None:
    """Run the stages of the recipe's method that make the training examples. All workers call this together."""
    for name in run.recipe.method.stages:
        STAGES[name](run, checkpoints)


__all__ = [
    "STAGES",
    "accept_responses",
    "check_run",
    "evaluate_student",
    "filter_responses",
    "generate_responses",
    "load_examples",
    "make_examples",
    "make_report",
    "make_review_page",
    "require_accepted_examples",
    "retry_rejected",
    "sample_unsteered_baseline",
    "train_student",
    "write_estimate",
]
