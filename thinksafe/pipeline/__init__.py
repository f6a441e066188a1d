"""The stages, from generate to report. Each reads records of the run directory and writes more.

Every stage can be killed at any moment and goes on where it stopped; one that is done does nothing. All workers of a
run call generate, probe, filter_responses, retry, train and evaluate together; the other stages are for the first one
alone.
"""

from thinksafe.pipeline.accept import accept, examples_file
from thinksafe.pipeline.evaluate import evaluate
from thinksafe.pipeline.generate import generate, probe
from thinksafe.pipeline.judge import filter_responses
from thinksafe.pipeline.preflight import check, foresee
from thinksafe.pipeline.report import report, review
from thinksafe.pipeline.retry import retry
from thinksafe.pipeline.train import train

__all__ = [
    "accept",
    "check",
    "evaluate",
    "examples_file",
    "filter_responses",
    "foresee",
    "generate",
    "probe",
    "report",
    "retry",
    "review",
    "train",
]
