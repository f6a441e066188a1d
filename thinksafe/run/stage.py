"""A stage at work: its clock, its record files, its progress bar and its share of the tasks.

A stage reads as its loop::

    with run_stage(run, "generate") as stage:
        work = stage.open_records(file, Response, tasks)
        if work.pending:
            with work.progress("generate", "responses"):
                for task in work.claim():
                    work.write(sample(task))
        work.finish()

After a kill at any moment, the same code continues with the tasks that have no record yet.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from thinksafe.data.jsonl import LazyMap
from thinksafe.data.records import Record
from thinksafe.errors import UserError
from thinksafe.run.directory import RunDir
from thinksafe.run.journal import Journal
from thinksafe.run.progress import TokenBar


class Keyed(Protocol):
    """A task; it has the key of the record that it gives."""

    @property
    def key(self) -> str: ...


Task = TypeVar("Task", bound=Keyed)


class Stage:
    """A stage at work in all workers of a run.

    Attributes:
        run: the run directory.
        clock: wall time of the stage, over all processes that worked on it.
        files: files that the stage has written, for the manifest.
        tokens, records: number of tokens and of records in these files, for the manifest.
        figures: further figures for the manifest, JSON values by name.
    """

    def __init__(self, run: RunDir, name: str):
        self.run, self.clock = run, run.clock(name)
        self.files: list[Path] = []
        self.tokens, self.records = 0, 0
        self.figures: dict[str, Any] = {}

    def open_records(
        self, file: Path, kind: type[Record], tasks: Sequence[Task], group_size: int = 1
    ) -> "SharedWork[Task]":
        """Return the work on a record file; all workers call this together.

        Args:
            file: final name of the record file.
            tasks: the tasks of all its records in the order of the final file, the same on every worker.
            group_size: number of neighboring workers that take the same tasks, because they share one model.

        Raises:
            UserError: the file's journal holds a record of another task.
        """
        return SharedWork(self, file, kind, tasks, group_size)


@contextmanager
def run_stage(run: RunDir, name: str) -> Iterator[Stage]:
    """Yield a stage, and enter it in the manifest as done after the body; all workers call this together."""
    stage = Stage(run, name)
    yield stage
    figures = {"tokens": stage.tokens, "records": stage.records, **stage.figures}
    run.finish_stage(name, stage.files, stage.clock, **figures)


class SharedWork(Generic[Task]):
    """The tasks of a record file, which all workers of a run share. Each task gives one record.

    Attributes:
        pending: indices of the tasks that have no record yet, the same on every worker.
        fair_share: number of pending tasks of each group of workers, rounded up.
        is_writer: whether this worker writes the records of its group.
    """

    def __init__(self, stage: Stage, file: Path, kind: type[Record], tasks: Sequence[Task], group_size: int):
        self._stage, self._file, self._tasks, self._workers = stage, file, tasks, stage.run.workers
        self._journal, self._group_size = Journal(file, kind, self._workers), group_size
        finished = {record.key for record in self._journal.records()}
        self._num_finished = len(finished)
        self.pending = [index for index, task in enumerate(tasks) if task.key not in finished]
        if len(self.pending) + len(finished) > len(tasks):
            raise UserError(f"{file}: holds responses to other prompts; restore the prompts or use a new --out folder")
        self.fair_share = -(-len(self.pending) * group_size // self._workers.world_size)
        self.is_writer = self._workers.is_group_leader(group_size)
        self._bar: TokenBar | None = None

    @contextmanager
    def progress(self, title: str, unit: str) -> Iterator[None]:
        """Show a progress bar over all tasks during the body; its rates count from here.

        Args:
            unit: name of the records, such as `responses`.
        """
        with TokenBar(title, len(self._tasks), unit, self._num_finished, self._workers) as self._bar:
            yield

    def claim(self, order: Sequence[int] | None = None) -> Iterator[Task]:
        """Yield the tasks that this worker's group claims, one at a time; each pending task goes to one group.

        Args:
            order: `pending` in the order in which to claim the tasks; None for the order of the file.
        """
        indices = self.pending if order is None else order
        return self._workers.claim_items(LazyMap(self._tasks.__getitem__, indices), self._group_size)

    def claim_batches(self, max_size: int) -> Iterator[list[Task]]:
        """Yield the claimed tasks in batches of at most `max_size`.

        Other workers cannot claim what is in a batch, so with other groups of workers a batch has at most a quarter of
        a fair share.
        """
        has_other_groups = self._workers.world_size > self._group_size
        batch_size = min(max_size, -(-self.fair_share // 4)) if has_other_groups else max_size
        claimed = self.claim()
        while batch := list(islice(claimed, batch_size)):
            yield batch

    def write(self, record: Record, num_tokens: int = 0, roofline_seconds: float = 0.0) -> None:
        """Append a record to the journal and advance the bar; does nothing on workers that do not write.

        Args:
            num_tokens: tokens of the record that the bar counts.
            roofline_seconds: see `TokenBar.update`.
        """
        if self.is_writer:
            self._journal.append(record)
            self._bar.update(num_tokens, roofline_seconds=roofline_seconds)
            self._stage.clock.tick()

    def finish(self) -> None:
        """Wait for the other workers, and give the file its final name, with one record for each task.

        All workers call this together.
        """
        self._journal.finish(task.key for task in self._tasks)
        self._stage.files.append(self._file)
