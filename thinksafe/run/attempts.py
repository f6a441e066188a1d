"""All attempts at every prompt of a run, joined from its shards. In memory are places; texts are read one prompt at a
time."""

from collections.abc import Iterator, Mapping, Sequence

from thinksafe.data.jsonl import Shard
from thinksafe.data.records import Mark, Response, Verdict
from thinksafe.data.selection import Attempt
from thinksafe.run.directory import RunDir


class Attempts:
    """What was tried on each prompt and judged.

    Iterating gives the attempts at one prompt after the other, by id; each in the order in which they were made.
    """

    def __init__(self, run: RunDir, marks: Mapping[tuple[str, int], Sequence[Mark]]):
        self._marks, self._shards = marks, []
        self._places: dict[str, list[tuple[int, int, int, int]]] = {}
        for step, (responses_file, verdicts_file) in enumerate(run.rungs()):
            responses, verdicts = Shard(responses_file, Response), Shard(verdicts_file, Verdict)
            self._shards.append((responses, verdicts))
            where = {(response.prompt_id, response.sample): number for number, response in enumerate(responses)}
            for number, verdict in enumerate(verdicts):
                place = (step, verdict.sample, where[verdict.prompt_id, verdict.sample], number)
                self._places.setdefault(verdict.prompt_id, []).append(place)

    def __len__(self) -> int:
        """Prompts."""
        return len(self._places)

    def __iter__(self) -> Iterator[list[Attempt]]:
        for prompt_id in sorted(self._places):
            yield [self._attempt(*place) for place in sorted(self._places[prompt_id])]

    def _attempt(self, step: int, sample: int, response_number: int, verdict_number: int) -> Attempt:
        responses, verdicts = self._shards[step]
        response = responses[response_number]
        marks = self._marks.get((response.prompt_id, sample), ())
        return Attempt(response, verdicts[verdict_number], marks)
