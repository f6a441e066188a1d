"""Stages generate and probe: sample the student's responses, with and without steering."""

from collections import Counter
from collections.abc import Callable, Sequence
from heapq import nsmallest
from itertools import islice
from pathlib import Path

from thinksafe.data.atomic import write_records
from thinksafe.data.jsonl import LazyMap, RecordFile
from thinksafe.data.records import Prompt, Response
from thinksafe.data.sources import load_prompts
from thinksafe.errors import UserError
from thinksafe.model.decoder import Decoder
from thinksafe.model.weights import checkpoint_fingerprint, resolve_checkpoint
from thinksafe.pipeline.responses import SamplingTask, check_prompt_lengths, longest_first, sample_responses
from thinksafe.run.checkpoints import CheckpointStore
from thinksafe.run.directory import RunDir
from thinksafe.run.journal import write_on_leader
from thinksafe.run.progress import print_note
from thinksafe.run.stage import Stage, run_stage
from thinksafe.sampler.config import SamplingConfig
from thinksafe.sampler.engine import Engine
from thinksafe.text.chat import Chat


def generate_responses(run: RunDir, checkpoints: CheckpointStore) -> None:
    """Sample the first attempt at every prompt of the recipe, and write prompts.jsonl and responses.jsonl. All workers
    call this together.

    The method's responder answers: the student, or a teacher. Each prompt gets `generation.samples` responses: harmful
    prompts with the steering instruction, benign ones without.

    Raises:
        UserError: the recipe names no prompts, they cannot be read, or one is too long; the run directory holds
            imported responses or responses to other prompts; or the checkpoint has changed since the run began.
    """
    if "generate" not in run.recipe.method.stages:
        raise UserError(
            f"method {run.recipe.method.type} samples no responses; use `thinksafe run` or `thinksafe train`"
        )
    if run.is_done("generate"):
        return
    with run_stage(run, "generate") as stage:
        if responder := run.recipe.method.responder:
            folder = resolve_checkpoint(responder, "method.model")
            run.pin_input("teacher", checkpoint_fingerprint(folder))
        prompts, (responses_file, _) = _write_prompts(stage), run.attempt_paths(0)
        rung = run.recipe.generation.rungs[0]

        def task(index: int) -> SamplingTask:
            prompt = prompts[index // rung.samples]
            return SamplingTask(prompt, rung.steering_of(prompt.label), index % rung.samples)

        tasks = LazyMap(task, range(len(prompts) * rung.samples))
        sampling = run.recipe.generation.sampling
        sample_to_file(stage, checkpoints, responses_file, tasks, sampling, "generate", checkpoints.responder)


def _write_prompts(stage: Stage) -> RecordFile[Prompt]:
    """Write the recipe's prompts to prompts.jsonl unless it exists, and return them."""
    run = stage.run
    if run.recipe.prompts is None:
        raise UserError("prompts: missing; name a file in the recipe or with --prompts FILE")
    prompts_file, (responses_file, _) = run.path / "prompts.jsonl", run.attempt_paths(0)
    if run.workers.on_leader(lambda: responses_file.exists() and not prompts_file.exists()):
        raise UserError(f"{responses_file}: was imported; continue with `thinksafe filter`, or use a new --out folder")

    def write() -> None:
        repeats: list[str] = []
        write_records(prompts_file, islice(load_prompts(run.recipe.prompts, repeats.append), run.recipe.max_prompts))
        if repeats:
            print_note(
                "prompts",
                f"dropped {len(repeats)} with the same text and label as an earlier prompt, first {repeats[0]}",
            )

    write_on_leader(prompts_file, run.workers, write)
    stage.files.append(prompts_file)
    return RecordFile(prompts_file, Prompt)


def sample_unsteered_baseline(run: RunDir, checkpoints: CheckpointStore) -> None:
    """Sample one response without steering to each of some harmful prompts, and write unsteered.jsonl. All workers call
    this together, after `generate_responses`.

    The prompts are the `generation.num_unsteered_prompts` with the smallest ids, or all if it is null. Ids are hashes,
    so the choice is random but reproducible. Nothing is done if nothing is steered.
    """
    config = run.recipe.generation
    if config.num_unsteered_prompts == 0 or config.steering is None or run.is_done("probe"):
        return
    harmful = (prompt for prompt in RecordFile(run.path / "prompts.jsonl", Prompt) if prompt.label == "harmful")
    if (count := config.num_unsteered_prompts) is not None:
        harmful = nsmallest(count, harmful, key=lambda prompt: prompt.id)
    tasks = list(map(SamplingTask, sorted(harmful, key=lambda prompt: prompt.id)))
    if tasks:
        with run_stage(run, "probe") as stage:
            file = run.path / "unsteered.jsonl"
            sample_to_file(stage, checkpoints, file, tasks, config.sampling, "unsteered", checkpoints.responder)


def sample_to_file(
    stage: Stage,
    checkpoints: CheckpointStore,
    file: Path,
    tasks: Sequence[SamplingTask],
    sampling: SamplingConfig,
    title: str,
    load_model: Callable[[], tuple[Decoder, Chat]],
) -> None:
    """Sample a response for each task that has none in the file's journal, and give the file its final name. All
    workers call this together and share the tasks. The tokens and records of the whole file count for the stage.

    Args:
        tasks: tasks of all responses, in the order of the final file.
        title: title of the progress bar.
        load_model: returns the model to sample from, and its chat template; called only if a response is missing.

    Raises:
        UserError: the journal holds a response to another task, a prompt is too long, or the recipe's checkpoint has
            changed since the run began.
    """
    run, workers, config = stage.run, stage.run.workers, stage.run.recipe.sampler
    work = stage.open_records(file, Response, tasks, config.tensor_parallel_size)
    if work.pending:
        run.pin_input("model", checkpoint_fingerprint(checkpoints.base))
        decoder, chat = load_model()
        engine = Engine(decoder, config, work.fair_share)
        check_prompt_lengths(chat, tasks, engine.max_prompt_tokens, engine.cache_limits_context)
        claimed = work.claim(longest_first(work.pending, tasks))
        shared_tokens, preemptions = workers.shared_counter(), workers.shared_counter()
        with work.progress(title, "responses"):
            for response, _ in sample_responses(engine, chat, claimed, sampling, run.recipe.seed):
                work.write(response, response.num_tokens, engine.roofline_seconds)
            if work.is_writer:
                shared_tokens(engine.scheduler.shared_tokens)
                preemptions(engine.scheduler.preemptions)
    work.finish()
    finish_reasons: Counter[str] = Counter()
    for response in RecordFile(file, Response):
        stage.tokens += response.num_tokens
        finish_reasons[response.finish_reason] += 1
    stage.records += len(tasks)
    if work.pending and workers.is_leader:
        counts = f"{shared_tokens(0):,} prompt tokens, {preemptions(0):,} preemptions"
        print_note(title, f"prefix caching shared {counts}")
        _print_unfinished(title, finish_reasons)


_UNFINISHED = {
    "length": "at the token limit",
    "repetition": "stopped because of repetition",
    "nan": "stopped because of NaN logits",
}
"""Finish reasons of responses that training cannot use, with the description that the terminal shows."""


def _print_unfinished(title: str, counts: Counter[str]) -> None:
    """Print how many responses training cannot use, if any, before the user waits for the next stage."""
    unfinished = [f"{counts[reason]} {text}" for reason, text in _UNFINISHED.items() if counts[reason]]
    if unfinished:
        num_unfinished = sum(counts[reason] for reason in _UNFINISHED)
        print_note(title, f"{num_unfinished} of {counts.total()} responses are unfinished: {', '.join(unfinished)}")
