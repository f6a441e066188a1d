"""The stages, from generate to report. Each reads records of the run directory and writes more.

Every stage can be killed at any moment and goes on where it stopped; one that is done does nothing. All workers of a
run call generate, probe, filter_responses, retry, train and evaluate together; the other stages are for the first one
alone.
"""

from thinksafe.stages.accepting import accept, examples_file
from thinksafe.stages.evaluating import evaluate
from thinksafe.stages.judging import filter_responses
from thinksafe.stages.reporting import report, review
from thinksafe.stages.retrying import retry
from thinksafe.stages.sampling import generate, probe
from thinksafe.stages.starting import check, foresee
from thinksafe.stages.training import train

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
