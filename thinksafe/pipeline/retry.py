"""Further attempts at prompts without an accepted response, up the steering ladder."""

from collections.abc import Callable, Sequence
from functools import partial

from thinksafe.data.jsonl import Mapped, Shard, read_records
from thinksafe.data.records import Prompt, Response, Verdict
from thinksafe.data.selection import choose
from thinksafe.pipeline.generate import sample
from thinksafe.pipeline.judge import judge, remember_guard
from thinksafe.pipeline.responses import Task
from thinksafe.run.attempts import Attempts
from thinksafe.run.checkpoints import Models
from thinksafe.run.directory import RunDir
from thinksafe.run.marks import read_marks
from thinksafe.text.steering import Rung


def retry(run: RunDir, models: Models) -> None:
    """Try the prompts that have no accepted response again, rung by rung up the steering ladder; then those whose last
    accepted one a person has rejected, each from its own rung on."""
    for number, rung in enumerate(run.recipe.generation.ladder, start=1):
        _retry_once(run, models, number, partial(_tasks_of_rung, run, number, rung))
    number = len(run.recipe.generation.rungs)
    while _retry_once(run, models, number, partial(_tasks_after_marks, run)):
        number += 1


def _retry_once(run: RunDir, models: Models, number: int, tasks_of: Callable[[], Sequence[Task]]) -> bool:
    """Sample and judge further attempts into the shards of this number; whether there were any."""
    beyond = number - len(run.recipe.generation.ladder)
    step = f"after_marks_{beyond}" if beyond > 0 else f"rung_{number}"
    sampling, judging, title = f"generate_{step}", f"filter_{step}", step.replace("_", " ")
    responses_file, verdicts_file = run.attempts(number)
    if not run.is_done(sampling):
        clock, tasks = run.clock(sampling), tasks_of()
        if not tasks:
            return False
        settings = run.recipe.generation.sampling
        sampled = sample(run, models, responses_file, tasks, settings, clock, title)
        run.finish_stage(sampling, [responses_file], clock, tokens=sampled, records=len(tasks))
    if not run.is_done(judging):
        remember_guard(run)
        clock, responses = run.clock(judging), Shard(responses_file, Response)
        judged = judge(run, models, responses, verdicts_file, clock, f"filter {title}")
        run.finish_stage(judging, [verdicts_file], clock, tokens=judged, records=len(responses))
    return True


def _tasks_of_rung(run: RunDir, number: int, rung: Rung) -> Sequence[Task]:
    """What a rung asks of the prompts without an accepted response, as far as `max_retries` goes."""
    accepted, next_sample = set(), {}
    for _, verdicts_file in run.rungs():
        for verdict in read_records(verdicts_file, Verdict):
            next_sample[verdict.prompt_id] = max(next_sample.get(verdict.prompt_id, 0), verdict.sample + 1)
            if verdict.decision == "safe":
                accepted.add(verdict.prompt_id)
    waiting = sorted(next_sample.keys() - accepted)
    limit = run.recipe.generation.max_retries
    if limit is not None:
        spent = run.workers.once(lambda: _retries(run))
        waiting = waiting[: (limit - spent) // rung.samples]
    first: dict[str, int] = {}
    asked, responses = set(waiting), Shard(run.attempts(0)[0], Response)
    for index, response in enumerate(responses):
        if response.prompt_id in asked:
            first.setdefault(response.prompt_id, index)

    def task(index: int) -> Task:
        prompt_id = waiting[index // rung.samples]
        response = responses[first[prompt_id]]
        prompt = Prompt(prompt_id, response.prompt, response.label)
        sample = next_sample[prompt_id] + index % rung.samples
        return Task(prompt, rung.steering_of(prompt.label), sample, number)

    return Mapped(task, range(len(waiting) * rung.samples))


def _tasks_after_marks(run: RunDir) -> Sequence[Task]:
    """The next rung of every prompt that has no accepted response because a person rejected one, as far as
    `max_retries` goes."""

    def climbing() -> list[tuple]:
        marks, rungs, limit = read_marks(run), run.recipe.generation.rungs, run.recipe.generation.max_retries
        asked, spent = [], _retries(run)
        for tried in Attempts(run, marks) if marks else ():
            last = tried[-1].response
            rejected = any(attempt.person == "reject" for attempt in tried)
            if not rejected or choose(tried) or last.rung + 1 == len(rungs):
                continue
            rung, about = rungs[last.rung + 1], (last.prompt_id, last.prompt, last.label)
            if limit is None or spent + len(asked) + rung.samples <= limit:
                samples = range(last.sample + 1, last.sample + 1 + rung.samples)
                asked += [(about, rung.steering_of(last.label), sample, last.rung + 1) for sample in samples]
        return asked

    if run.is_done("accept"):  # with all marks: whoever could climb has climbed
        return []
    return [Task(Prompt(*about), *how) for about, *how in run.workers.once(climbing)]


def _retries(run: RunDir) -> int:
    """Responses of all further attempts so far."""
    stages = run.manifest["stages"]
    return sum(
        stage["records"]
        for name, stage in stages.items()
        if name.startswith(("generate_rung_", "generate_after_marks_"))
    )
