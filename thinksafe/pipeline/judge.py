"""Stage filter: the guard judges the student's responses."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path

from thinksafe.data.jsonl import LazyMap, RecordFile
from thinksafe.data.records import Response, Verdict
from thinksafe.distributed.workers import Workers
from thinksafe.errors import UserError
from thinksafe.guards.base import GuardResult, PromptResponse
from thinksafe.model.weights import checkpoint_fingerprint, resolve_checkpoint
from thinksafe.pipeline.checks import check_unique_samples, require_stage_output, response_problem
from thinksafe.run.checkpoints import CheckpointStore
from thinksafe.run.directory import RunDir, StageClock
from thinksafe.run.journal import Journal, write_on_leader
from thinksafe.run.progress import TokenBar


def filter_responses(run: RunDir, checkpoints: CheckpointStore) -> None:
    """Judge the responses of the first attempt and write verdicts.jsonl. All workers call this together.

    If unsteered.jsonl exists, the unsteered baseline is judged too and unsteered_verdicts.jsonl is written.

    Raises:
        UserError: there are no responses yet, or they were changed; two responses to a prompt have the same sample; the
            run directory holds imported examples; or the guard's checkpoint has changed since the run began.
    """
    if run.is_done("filter"):
        return
    clock, (responses_file, verdicts_file) = run.clock("filter"), run.attempt_paths(0)
    accepted_file = run.path / "accepted.jsonl"
    if run.workers.on_leader(lambda: accepted_file.exists() and not verdicts_file.exists()):
        raise UserError(f"{accepted_file}: was imported for training; use a new --out folder to judge responses")
    require_stage_output(run, responses_file, "generate", "`thinksafe generate` first, or use --responses FILE")
    write_on_leader(responses_file, run.workers, lambda: check_unique_samples(responses_file))
    pin_guard(run)
    responses, files = RecordFile(responses_file, Response), [verdicts_file]
    tokens = judge_to_file(run, checkpoints, responses, verdicts_file, clock, "filter")
    unsteered_file = run.path / "unsteered.jsonl"
    if run.workers.on_leader(unsteered_file.exists):
        files.append(run.path / "unsteered_verdicts.jsonl")
        tokens += judge_to_file(
            run, checkpoints, RecordFile(unsteered_file, Response), files[1], clock, "filter unsteered"
        )
    run.finish_stage("filter", files, clock, tokens=tokens, records=len(responses))


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
    run: RunDir,
    checkpoints: CheckpointStore,
    responses: Sequence[Response],
    file: Path,
    clock: StageClock,
    title: str,
    include_malformed: bool = False,
) -> int:
    """Write a verdict for every response that has none in the file's journal, and give the file its final name.

    All workers call this together and share the responses.

    Args:
        responses: all responses, in the order of the final file.
        file: the final record file of verdicts.
        clock: clock of the stage; its time is saved while verdicts arrive.
        title: title of the progress bar.
        include_malformed: if True, the guard also judges malformed responses (see `response_problem`), as an evaluation
            needs; only a response without any text is dropped. If False, every malformed response gets the decision
            `dropped` without the guard.

    Returns:
        The number of tokens in all responses that are not dropped, including those judged by earlier, killed calls.

    Raises:
        UserError: the guard's checkpoint does not exist or does not fit its format.
    """
    journal = Journal(file, Verdict, run.workers)
    finished = {verdict.key for verdict in journal.records()}
    remaining = [index for index, response in enumerate(responses) if response.key not in finished]
    if remaining:
        guard, pending, group_size = checkpoints.guard, {}, run.recipe.guard.tensor_parallel_size
        is_group_leader = run.workers.is_group_leader(group_size)
        with TokenBar(title, len(responses), "verdicts", len(finished), run.workers) as bar:

            def pairs_to_judge(batch: Iterable[Response]) -> Iterator[PromptResponse]:
                for response in batch:
                    problem = response_problem(response, checkpoints.chat)
                    if problem is None or (include_malformed and response.text):
                        pending[response.key] = response
                        yield PromptResponse(response.key, response.prompt, response.text)
                    elif is_group_leader:
                        journal.append(_make_verdict(response, guard.name, "dropped", problem))
                        bar.update(0)

            for batch in _claim_batches(run.workers, LazyMap(responses.__getitem__, remaining), group_size):
                for result in guard.judge(pairs_to_judge(batch)):
                    response = pending.pop(result.id)
                    if is_group_leader:
                        reason = result.reason or ("unsafe" if result.decision == "unsafe" else "")
                        journal.append(_make_verdict(response, guard.name, result.decision, reason, result))
                        bar.update(response.num_tokens)
                        clock.tick()
    journal.finish(response.key for response in responses)
    dropped = {verdict.key for verdict in RecordFile(file, Verdict) if verdict.decision == "dropped"}
    return sum(response.num_tokens for response in responses if response.key not in dropped)


def _claim_batches(workers: Workers, items: Sequence[Response], group_size: int) -> Iterator[Iterable[Response]]:
    """Yield this worker's share of the items in batches; each batch must be read to its end before the next one.

    A guard reads ahead, and other workers cannot claim what it has read: a batch limits how far. It holds a quarter of
    a fair share; if no other group of workers exists, there is one batch with all items.

    Args:
        group_size: number of neighboring workers that get the same items, because they share one guard.
    """
    claimed, has_other_groups = workers.claim_items(items, group_size), workers.world_size > group_size
    batch_size = -(-len(items) * group_size // (4 * workers.world_size)) if has_other_groups else len(items)
    for item in claimed:
        yield chain((item,), islice(claimed, batch_size - 1))


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
