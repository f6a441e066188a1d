"""Stage filter: the guard judges the student's responses."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from thinksafe.data.jsonl import RecordFile
from thinksafe.data.records import Response, Verdict
from thinksafe.errors import UserError
from thinksafe.guards.base import Guard
from thinksafe.model.weights import checkpoint_fingerprint, resolve_checkpoint
from thinksafe.pipeline.checks import check_unique_samples, require_stage_output, response_problem
from thinksafe.run.checkpoints import CheckpointStore
from thinksafe.run.directory import RunDir
from thinksafe.run.journal import write_on_leader
from thinksafe.run.stage import Stage, run_stage
from thinksafe.text.chat import Chat

_BATCH_SIZE = 1024
"""Largest number of responses that a guard gets at once: all their texts are in memory."""


def filter_responses(run: RunDir, checkpoints: CheckpointStore) -> None:
    """Judge the responses of the first attempt and write verdicts.jsonl. All workers call this together.

    If unsteered.jsonl exists, the unsteered baseline is judged too and unsteered_verdicts.jsonl is written.

    Raises:
        UserError: there are no responses yet, or they were changed; two responses to a prompt have the same sample; the
            run directory holds imported examples; or the guard's checkpoint has changed since the run began.
    """
    if run.is_done("filter"):
        return
    responses_file, verdicts_file = run.attempt_paths(0)
    accepted_file, unsteered_file = run.path / "accepted.jsonl", run.path / "unsteered.jsonl"
    if run.workers.on_leader(lambda: accepted_file.exists() and not verdicts_file.exists()):
        raise UserError(f"{accepted_file}: was imported for training; use a new --out folder to judge responses")
    require_stage_output(run, responses_file, "generate", "`thinksafe generate` first, or use --responses FILE")
    with run_stage(run, "filter") as stage:
        write_on_leader(responses_file, run.workers, lambda: check_unique_samples(responses_file, responses_file))
        responses = RecordFile(responses_file, Response)
        stage.tokens, stage.records = (
            judge_to_file(stage, checkpoints, responses, verdicts_file, "filter"),
            len(responses),
        )
        if run.workers.on_leader(unsteered_file.exists):
            responses, file = RecordFile(unsteered_file, Response), run.path / "unsteered_verdicts.jsonl"
            stage.tokens += judge_to_file(stage, checkpoints, responses, file, "filter unsteered")


def pin_guard(run: RunDir) -> None:
    """Record the hashes of the guard's checkpoints, which must not change within a run; see `RunDir.pin_input`."""
    for name in run.recipe.guard.checkpoints:
        run.pin_input(f"guard {name}", checkpoint_fingerprint(resolve_checkpoint(name, "guard.model")))


def judge_to_file(
    stage: Stage,
    checkpoints: CheckpointStore,
    responses: Sequence[Response],
    file: Path,
    title: str,
    include_malformed: bool = False,
) -> int:
    """Write a verdict for every response that has none in the file's journal, and give the file its final name. All
    workers call this together and share the responses.

    Args:
        responses: all responses, in the order of the final file.
        title: title of the progress bar.
        include_malformed: if True, the guard also judges malformed responses (see `response_problem`), as an evaluation
            needs; only a response without any text is dropped. If False, every malformed response gets the decision
            `dropped` without the guard.

    Returns:
        The number of tokens in all responses that are not dropped, including those judged by earlier, killed calls.

    Raises:
        UserError: a checkpoint of the guard does not exist, has changed since the run began or does not fit its format.
    """
    run = stage.run
    pin_guard(run)
    work = stage.open_records(file, Verdict, responses, run.recipe.guard.tensor_parallel_size)
    if work.pending:
        guard, chats = checkpoints.guard, checkpoints.chats  # every worker loads the guard, even without a batch
        with work.progress(title, "verdicts"):
            for batch in work.claim_batches(_BATCH_SIZE):
                for response, verdict in judge_batch(guard, chats, batch, include_malformed):
                    work.write(verdict, response.num_tokens if verdict.decision != "dropped" else 0)
    work.finish()
    dropped = {verdict.key for verdict in RecordFile(file, Verdict) if verdict.decision == "dropped"}
    return sum(response.num_tokens for response in responses if response.key not in dropped)


def judge_batch(
    guard: Guard, chats: Sequence[Chat], responses: Sequence[Response], include_malformed: bool = False
) -> Iterator[tuple[Response, Verdict]]:
    """Yield each response with its verdict: first the dropped responses, then the others as the guard judges them.

    Args:
        chats: tokenizers and chat templates whose control tokens a response must not contain.
        include_malformed: see `judge_to_file`.
    """
    well_formed = []
    for response in responses:
        problem = response_problem(response, chats)
        if problem is None or (include_malformed and response.text):
            well_formed.append(response)
        else:
            yield response, Verdict.of(response, guard.name, "dropped", problem, windows=0)
    yield from zip(well_formed, guard.judge(well_formed), strict=True)
