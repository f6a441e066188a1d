"""All judged attempts at every prompt of a run, joined from its record files.

Memory holds the position of each record; the texts are read one prompt at a time.
"""

from collections.abc import Iterator, Mapping, Sequence

from thinksafe.data.jsonl import RecordFile
from thinksafe.data.records import Mark, Response, Verdict
from thinksafe.data.selection import Attempt
from thinksafe.run.directory import RunDir


class Attempts:
    """The attempts of a run that have a verdict, by prompt; the stage accept and the review page go through them.

    Iterating gives a list of attempts for each prompt, in order of prompt id; each list has at least one attempt and is
    in the order in which they were sampled.
    """

    def __init__(self, run: RunDir, marks: Mapping[tuple[str, int], Sequence[Mark]]):
        """Read the record files once, and keep the position of each record.

        Args:
            run: the run; its files of responses and verdicts must be finished.
            marks: (prompt id, sample) -> marks on this response in the order in which they were made.

        Raises:
            UserError: a record is not valid.
        """
        self._marks, self._files = marks, []
        self._positions: dict[str, list[tuple[int, int, int, int]]] = {}
        for number, (responses_file, verdicts_file) in enumerate(run.attempt_files()):
            responses, verdicts = RecordFile(responses_file, Response), RecordFile(verdicts_file, Verdict)
            self._files.append((responses, verdicts))
            response_indices = {(response.prompt_id, response.sample): i for i, response in enumerate(responses)}
            for verdict_index, verdict in enumerate(verdicts):
                response_index = response_indices[verdict.prompt_id, verdict.sample]
                position = (number, verdict.sample, response_index, verdict_index)
                self._positions.setdefault(verdict.prompt_id, []).append(position)

    def __len__(self) -> int:
        """Return the number of prompts."""
        return len(self._positions)

    def __iter__(self) -> Iterator[list[Attempt]]:
        for prompt_id in sorted(self._positions):
            yield [self._attempt(*position) for position in sorted(self._positions[prompt_id])]

    def _attempt(self, number: int, sample: int, response_index: int, verdict_index: int) -> Attempt:
        """Return an attempt, read from record file `number` at these two indices."""
        responses, verdicts = self._files[number]
        response = responses[response_index]
        marks = self._marks.get((response.prompt_id, sample), ())
        return Attempt(response, verdicts[verdict_index], marks)
