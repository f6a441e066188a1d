"""Stage filter: the guard judges the student's responses."""

from collections.abc import Sequence
from pathlib import Path

from thinksafe.data.jsonl import RecordFile
from thinksafe.data.records import Response, Verdict
from thinksafe.errors import UserError
from thinksafe.guards.base import GuardResult, PromptResponse
from thinksafe.model.weights import checkpoint_fingerprint, resolve_checkpoint
from thinksafe.pipeline.checks import check_unique_samples, require_stage_output, response_problem
from thinksafe.run.checkpoints import CheckpointStore
from thinksafe.run.directory import RunDir
from thinksafe.run.journal import write_on_leader
from thinksafe.run.stage import Stage, run_stage

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
        write_on_leader(responses_file, run.workers, lambda: check_unique_samples(responses_file))
        responses = RecordFile(responses_file, Response)
        stage.tokens, stage.records = judge_to_file(stage, checkpoints, responses, verdicts_file, "filter"), len(responses)
        if run.workers.on_leader(unsteered_file.exists):
            responses, file = RecordFile(unsteered_file, Response), run.path / "unsteered_verdicts.jsonl"
            stage.tokens += judge_to_file(stage, checkpoints, responses, file, "filter unsteered")


def pin_guard(run: RunDir) -> None:
    """Record the hashes of the guard's checkpoints in the manifest; if they are recorded, check that they are the same.

    The guard must not change within a run, and the card of an exported data set shows the hashes. A guard without a
    checkpoint (`oracle`) has nothing to record. All workers call this together.

    Raises:
        UserError: a checkpoint is missing, has changed since the run began, or differs between machines.
    """
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
    """Write a verdict for every response that has none in the file's journal, and give the file its final name.

    All workers call this together and share the responses.

    Args:
        responses: all responses, in the order of the final file.
        file: the final record file of verdicts.
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
        guard, chat = checkpoints.guard, checkpoints.chat
        with work.progress(title, "verdicts"):
            for batch in work.claim_batches(_BATCH_SIZE):
                well_formed = []
                for response in batch:
                    problem = response_problem(response, chat)
                    if problem is None or (include_malformed and response.text):
                        well_formed.append(response)
                    else:
                        work.write(_make_verdict(response, guard.name, "dropped", problem))
                pairs = (PromptResponse(response.key, response.prompt, response.text) for response in well_formed)
                by_key = {response.key: response for response in well_formed}
                for result in guard.judge(pairs):
                    response = by_key[result.id]
                    reason = result.reason or ("unsafe" if result.decision == "unsafe" else "")
                    verdict = _make_verdict(response, guard.name, result.decision, reason, result)
                    work.write(verdict, response.num_tokens)
    work.finish()
    dropped = {verdict.key for verdict in RecordFile(file, Verdict) if verdict.decision == "dropped"}
    return sum(response.num_tokens for response in responses if response.key not in dropped)


def _make_verdict(
    response: Response, guard: str, decision: str, reason: str, result: GuardResult | None = None
) -> Verdict:
    return Verdict(
        prompt_id=response.prompt_id,
        sample=response.sample,
        label=response.label,
        steering=response.steering,
        decision=decision,
        reason=reason,
        p_safe=result.p_safe if result else None,
        p_unsafe=result.p_unsafe if result else None,
        refusal=result.refusal if result else None,
        guard=guard,
        category=result.category if result else "",
        windows=result.windows if result else 0,
        labels=dict(result.labels) if result else {},
        rung=response.rung,
    )
