"""All judged attempts at every prompt of a run, joined from its record files.

Memory holds the position of each record; the texts are read one prompt at a time.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from thinksafe.data.jsonl import RecordFile
from thinksafe.data.records import Mark, Response, Verdict
from thinksafe.data.selection import Attempt
from thinksafe.run.directory import RunDir


class Attempts:
    """The attempts of a run that have a verdict, by prompt; the stage accept and the review page go through them.

    Iterating gives the attempts at each prompt, at least one, in the order in which they were sampled; prompts are in
    order of their ids, and `len` is their number.
    """

    def __init__(self, run: RunDir, marks: Mapping[tuple[str, int], Sequence[Mark]]):
        """Read the finished record files of a run once, and keep the position of each record.

        Args:
            marks: (prompt id, sample) -> marks on this response in the order in which they were made.

        Raises:
            UserError: a record is not valid.
        """
        self._marks, self._files = marks, []
        self._positions: dict[str, list[tuple[int, int, int, int]]] = defaultdict(list)
        for round_number, (responses_file, verdicts_file) in enumerate(run.attempt_files()):
            responses, verdicts = RecordFile(responses_file, Response), RecordFile(verdicts_file, Verdict)
            self._files.append((responses, verdicts))
            response_indices = {response.key: index for index, response in enumerate(responses)}
            for index, verdict in enumerate(verdicts):
                position = (round_number, verdict.sample, response_indices[verdict.key], index)
                self._positions[verdict.prompt_id].append(position)

    def __len__(self) -> int:
        return len(self._positions)

    def __iter__(self) -> Iterator[list[Attempt]]:
        for prompt_id, positions in sorted(self._positions.items()):
            attempts = []
            for round_number, sample, response_index, verdict_index in sorted(positions):
                responses, verdicts = self._files[round_number]
                marks = self._marks.get((prompt_id, sample), ())
                attempts.append(Attempt(responses[response_index], verdicts[verdict_index], marks))
            yield attempts
