"""Stages generate and probe: sample the student's responses, with and without steering."""

import sys
from collections import Counter
from collections.abc import Sequence
from heapq import nsmallest
from itertools import islice
from pathlib import Path

from thinksafe.data.atomic import write_records
from thinksafe.data.jsonl import LazyMap, RecordFile
from thinksafe.data.records import Prompt, Response
from thinksafe.data.sources import load_prompts
from thinksafe.errors import UserError
from thinksafe.model.weights import checkpoint_fingerprint
from thinksafe.pipeline.responses import SamplingTask, check_prompt_lengths, longest_first, sample_responses
from thinksafe.run.checkpoints import CheckpointStore
from thinksafe.run.directory import RunDir, StageClock
from thinksafe.run.journal import Journal, write_on_leader
from thinksafe.run.progress import TokenBar
from thinksafe.sampler.engine import Engine
from thinksafe.sampler.request import SamplingConfig


def generate_responses(run: RunDir, checkpoints: CheckpointStore) -> None:
    """Sample the first attempt at every prompt of the recipe, and write prompts.jsonl and responses.jsonl.

    Each prompt gets `generation.samples` responses: harmful prompts with the steering instruction, benign prompts
    without it. All workers call this together.

    Raises:
        UserError: the recipe names no prompts, they cannot be read, or one is too long; the run directory holds
            imported responses or responses to other prompts; or the checkpoint has changed since the run began.
    """
    if run.is_done("generate"):
        return
    clock, config = run.clock("generate"), run.recipe.generation
    if run.recipe.prompts is None:
        raise UserError("prompts: missing; name a file in the recipe or with --prompts FILE")
    prompts_file, (responses_file, _) = run.path / "prompts.jsonl", run.attempt_paths(0)
    if run.workers.on_leader(lambda: responses_file.exists() and not prompts_file.exists()):
        raise UserError(f"{responses_file}: was imported; continue with `thinksafe filter`, or use a new --out folder")

    def write_prompts() -> None:
        repeats: list[str] = []
        write_records(prompts_file, islice(load_prompts(run.recipe.prompts, repeats.append), run.recipe.max_prompts))
        if repeats:
            message = f"dropped {len(repeats)} with the same text and label as an earlier prompt, first {repeats[0]}"
            print(f"{'prompts':>30}: {message}", file=sys.stderr)

    write_on_leader(prompts_file, run.workers, write_prompts)
    prompts, rung = RecordFile(prompts_file, Prompt), config.rungs[0]

    def task(index: int) -> SamplingTask:
        prompt = prompts[index // rung.samples]
        return SamplingTask(prompt, rung.steering_of(prompt.label), index % rung.samples)

    tasks = LazyMap(task, range(len(prompts) * rung.samples))
    tokens = sample_to_file(run, checkpoints, responses_file, tasks, config.sampling, clock, "generate")
    run.finish_stage("generate", [prompts_file, responses_file], clock, tokens=tokens, records=len(tasks))


def sample_unsteered_baseline(run: RunDir, checkpoints: CheckpointStore) -> None:
    """Sample one response without steering to each of some harmful prompts, and write unsteered.jsonl.

    The prompts are the `generation.num_unsteered_prompts` with the smallest ids, or all if there are fewer. Ids are
    hashes, so the choice is random but reproducible. Nothing is done if that number is 0, `generation.steering` is
    null, there is no harmful prompt, or the stage `probe` is done. All workers call this together, after
    `generate_responses`.

    Raises:
        UserError: as in `sample_to_file`.
    """
    num_prompts = run.recipe.generation.num_unsteered_prompts
    if num_prompts == 0 or run.recipe.generation.steering is None or run.is_done("probe"):
        return
    harmful = (prompt for prompt in RecordFile(run.path / "prompts.jsonl", Prompt) if prompt.label == "harmful")
    tasks = [SamplingTask(prompt) for prompt in nsmallest(num_prompts, harmful, key=lambda prompt: prompt.id)]
    if not tasks:
        return
    clock, file = run.clock("probe"), run.path / "unsteered.jsonl"
    tokens = sample_to_file(run, checkpoints, file, tasks, run.recipe.generation.sampling, clock, "unsteered")
    run.finish_stage("probe", [file], clock, tokens=tokens, records=len(tasks))


def sample_to_file(
    run: RunDir,
    checkpoints: CheckpointStore,
    file: Path,
    tasks: Sequence[SamplingTask],
    sampling: SamplingConfig,
    clock: StageClock,
    title: str,
    checkpoint: Path | None = None,
    adapter: Path | None = None,
) -> int:
    """Sample a response for each task that has none in the file's journal, and give the file its final name.

    All workers call this together and share the tasks.

    Args:
        file: the final record file.
        tasks: tasks of all responses, in the order of the final file.
        sampling: how tokens are sampled.
        clock: clock of the stage; its time is saved while responses arrive.
        title: title of the progress bar.
        checkpoint: folder of a student after full fine-tuning; None for the recipe's checkpoint.
        adapter: folder of the adapter to sample with; None for no adapter.

    Returns:
        The number of response tokens in the whole file, including responses of earlier, killed calls.

    Raises:
        UserError: the journal holds a response to another task, a prompt is too long, or the recipe's checkpoint has
            changed since the run began.
    """
    journal = Journal(file, Response, run.workers)
    finished = {response.key for response in journal.records()}
    remaining = longest_first((index, task) for index, task in enumerate(tasks) if task.key not in finished)
    if len(remaining) + len(finished) > len(tasks):
        raise UserError(f"{file}: holds responses to other prompts; restore the prompts or use a new --out folder")
    if remaining:
        run.pin_input("model", checkpoint_fingerprint(checkpoints.base))
        group_size = run.recipe.sampler.tensor_parallel_size
        fair_share = -(-len(remaining) * group_size // run.workers.world_size)
        engine = Engine(checkpoints.sampled_student(checkpoint, adapter), run.recipe.sampler, fair_share)
        check_prompt_lengths(checkpoints.chat, tasks, engine.max_prompt_tokens, engine.cache_limits_context)
        claimed_tasks = run.workers.claim_items(LazyMap(tasks.__getitem__, remaining), group_size)
        shared_tokens, preemptions = run.workers.shared_counter(), run.workers.shared_counter()
        with TokenBar(title, len(tasks), "responses", len(finished), run.workers) as bar:
            for response in sample_responses(engine, checkpoints.chat, claimed_tasks, sampling, run.recipe.seed):
                if run.workers.is_group_leader(group_size):
                    journal.append(response)
                    bar.update(response.num_tokens, **bar.roofline_share(engine.roofline_seconds))
                    clock.tick()
            if run.workers.is_group_leader(group_size):
                shared_tokens(engine.scheduler.shared_tokens)
                preemptions(engine.scheduler.preemptions)
    journal.finish(task.key for task in tasks)
    tokens, finish_reasons = 0, Counter()
    for response in RecordFile(file, Response):
        tokens += response.num_tokens
        finish_reasons[response.finish_reason] += 1
    if remaining and run.workers.is_leader:
        message = f"prefix caching shared {shared_tokens(0):,} prompt tokens, {preemptions(0):,} preemptions"
        print(f"{title:>30}: {message}", file=sys.stderr)
        _print_unfinished(title, finish_reasons)
    return tokens


_UNFINISHED = {
    "length": "at the token limit",
    "repetition": "stopped because of repetition",
    "nan": "stopped because of NaN logits",
}
"""Finish reasons of responses that training cannot use, with the description that the terminal shows."""


def _print_unfinished(title: str, counts: Counter[str]) -> None:
    """Print to stderr how many responses training cannot use, before the user waits for the next stage.

    If there are none, nothing is printed.

    Args:
        title: name of the step, in front of the message.
        counts: number of responses by finish reason.
    """
    unfinished = [f"{counts[reason]} {text}" for reason, text in _UNFINISHED.items() if counts[reason]]
    if unfinished:
        num_unfinished = counts.total() - counts["stop"]
        message = f"{num_unfinished} of {counts.total()} responses are unfinished: {', '.join(unfinished)}"
        print(f"{title:>30}: {message}", file=sys.stderr)
