"""Human marks of a run."""

import shlex
from collections import defaultdict
from pathlib import Path

from thinksafe.data.jsonl import read_records
from thinksafe.data.records import Mark
from thinksafe.run.directory import RunDir


def refilter_command(run: RunDir, marks: Path | str) -> str:
    """Return the command that filters a run's responses again in a new folder, for a run that has been trained."""
    recipe, responses, marks = (shlex.quote(str(path)) for path in (run.path / "recipe.yaml", run.path, marks))
    return f"thinksafe filter --recipe {recipe} --responses {responses} --marks {marks} --out NEW"


def read_marks(run: RunDir) -> dict[tuple[str, int], list[Mark]]:
    """Return the marks by prompt and sample, in the order in which they were made."""
    file, marks = run.path / "marks.jsonl", defaultdict(list)
    for mark in read_records(file, Mark) if file.exists() else ():
        marks[mark.prompt_id, mark.sample].append(mark)
    return marks
