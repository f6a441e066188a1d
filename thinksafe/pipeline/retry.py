"""Retries: prompts without an accepted response are tried again on the next rung of the steering ladder."""

from collections.abc import Callable, Sequence
from functools import partial

from thinksafe.data.jsonl import LazyMap, RecordFile, read_records
from thinksafe.data.records import Prompt, Response, Verdict
from thinksafe.pipeline.generate import sample_to_file
from thinksafe.pipeline.judge import judge_to_file
from thinksafe.pipeline.responses import SamplingTask
from thinksafe.run.attempts import Attempts
from thinksafe.run.checkpoints import CheckpointStore
from thinksafe.run.directory import RunDir
from thinksafe.run.marks import read_marks
from thinksafe.run.stage import run_stage
from thinksafe.text.steering import Rung


def retry_rejected(run: RunDir, checkpoints: CheckpointStore) -> None:
    """Sample and judge further attempts at prompts without an accepted response. All workers call this together.

    First, each rung of the ladder tries the prompts that have no response with the verdict `safe`. Then each prompt
    that lost its accepted response to a human mark continues on the rung after its last attempt. Each round has its
    record files and two stages. `generation.max_retry_responses` limits the responses of all rounds together.
    """
    for round_number, rung in enumerate(run.recipe.generation.ladder, start=1):
        _run_round(run, checkpoints, round_number, partial(_rung_tasks, run, round_number, rung))
    round_number = len(run.recipe.generation.rungs)
    while _run_round(run, checkpoints, round_number, partial(_tasks_after_marks, run)):
        round_number += 1


def _run_round(
    run: RunDir, checkpoints: CheckpointStore, round_number: int, make_tasks: Callable[[], Sequence[SamplingTask]]
) -> bool:
    """Sample and judge one round of attempts, and return whether it has a task, also if it was finished before.

    Args:
        round_number: number of the record files, see `RunDir.attempt_paths`.
        make_tasks: returns the tasks of the round; called only if sampling is not finished.
    """
    round_after_marks = round_number - len(run.recipe.generation.ladder)
    round_name = f"after_marks_{round_after_marks}" if round_after_marks > 0 else f"rung_{round_number}"
    sampling_stage, judging_stage = f"generate_{round_name}", f"filter_{round_name}"
    title = round_name.replace("_", " ")
    responses_file, verdicts_file = run.attempt_paths(round_number)
    if not run.is_done(sampling_stage):
        if not (tasks := make_tasks()):
            return False
        with run_stage(run, sampling_stage) as stage:
            sampling = run.recipe.generation.sampling
            sample_to_file(stage, checkpoints, responses_file, tasks, sampling, title, checkpoints.responder)
    if not run.is_done(judging_stage):
        with run_stage(run, judging_stage) as stage:
            responses = RecordFile(responses_file, Response)
            stage.tokens = judge_to_file(stage, checkpoints, responses, verdicts_file, f"filter {title}")
            stage.records = len(responses)
    return True


def _rung_tasks(run: RunDir, round_number: int, rung: Rung) -> Sequence[SamplingTask]:
    """Return a rung's tasks for the prompts that have no response with the verdict `safe`, in order of prompt id; those
    at the end that exceed the budget `max_retry_responses` get no task."""
    accepted, next_sample = set(), {}
    for _, verdicts_file in run.attempt_files():
        for verdict in read_records(verdicts_file, Verdict):
            next_sample[verdict.prompt_id] = max(next_sample.get(verdict.prompt_id, 0), verdict.sample + 1)
            if verdict.decision == "safe":
                accepted.add(verdict.prompt_id)
    prompt_ids = sorted(next_sample.keys() - accepted)
    limit = run.recipe.generation.max_retry_responses
    if limit is not None:
        num_responses = run.workers.on_leader(lambda: _count_retry_responses(run))
        prompt_ids = prompt_ids[: (limit - num_responses) // rung.samples]
    response_index: dict[str, int] = {}
    retried, responses = set(prompt_ids), RecordFile(run.attempt_paths(0)[0], Response)
    for index, response in enumerate(responses):
        if response.prompt_id in retried:
            response_index.setdefault(response.prompt_id, index)

    def task(index: int) -> SamplingTask:
        prompt_id = prompt_ids[index // rung.samples]
        response = responses[response_index[prompt_id]]
        prompt = Prompt(prompt_id, response.prompt, response.label)
        sample = next_sample[prompt_id] + index % rung.samples
        return SamplingTask(prompt, rung.steering_of(prompt.label), sample, round_number)

    return LazyMap(task, range(len(prompt_ids) * rung.samples))


def _tasks_after_marks(run: RunDir) -> Sequence[SamplingTask]:
    """Return tasks for the prompts that have no accepted response, but a response that a person rejected.

    Each prompt continues on the rung after its last attempt, if the ladder has one and the budget
    `max_retry_responses` allows all samples of that rung.
    """

    def find_task_fields() -> list[tuple]:
        marks, rungs, limit = read_marks(run), run.recipe.generation.rungs, run.recipe.generation.max_retry_responses
        task_fields, num_responses = [], _count_retry_responses(run)
        for attempts in Attempts(run, marks) if marks else ():
            last = attempts[-1].response
            rejected = any(attempt.human_decision == "reject" for attempt in attempts)
            if not rejected or run.recipe.method.choose(attempts, run.recipe.seed) or last.rung + 1 == len(rungs):
                continue
            rung, prompt = rungs[last.rung + 1], (last.prompt_id, last.prompt, last.label)
            if limit is None or num_responses + len(task_fields) + rung.samples <= limit:
                samples = range(last.sample + 1, last.sample + 1 + rung.samples)
                task_fields += [(prompt, rung.steering_of(last.label), sample, last.rung + 1) for sample in samples]
        return task_fields

    if run.is_done("accept"):  # it considered all marks, so no prompt has a rung left
        return []
    return [SamplingTask(Prompt(*prompt), *fields) for prompt, *fields in run.workers.on_leader(find_task_fields)]


def _count_retry_responses(run: RunDir) -> int:
    """Return the number of responses in all finished sampling stages of retries."""
    stages = run.manifest["stages"]
    return sum(
        stage["records"]
        for name, stage in stages.items()
        if name.startswith(("generate_rung_", "generate_after_marks_"))
    )
