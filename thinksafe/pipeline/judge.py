"""A guard reads what the student has answered."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path

from thinksafe.data.jsonl import Mapped, Shard
from thinksafe.data.records import Response, Verdict
from thinksafe.distributed.workers import Workers
from thinksafe.errors import UserError
from thinksafe.guards.base import Exchange, Judgement
from thinksafe.model.weights import fingerprint, resolve
from thinksafe.pipeline.checks import refuse_repeated, required, response_problem
from thinksafe.run.checkpoints import Models
from thinksafe.run.directory import RunDir, StageClock
from thinksafe.run.journal import Journal, write_for_all
from thinksafe.run.progress import TokenBar


def filter_responses(run: RunDir, models: Models) -> None:
    """Judge every response."""
    if run.is_done("filter"):
        return
    clock, (responses_file, verdicts_file) = run.clock("filter"), run.attempts(0)
    examples_file = run.path / "accepted.jsonl"
    if run.workers.once(lambda: examples_file.exists() and not verdicts_file.exists()):
        raise UserError(f"{examples_file}: came from elsewhere, to be trained on; give a new --out folder to judge in")
    required(run, responses_file, "generate", "`thinksafe generate` first, or give --responses FILE")
    write_for_all(responses_file, run.workers, lambda: refuse_repeated(responses_file))
    remember_guard(run)
    responses, files = Shard(responses_file, Response), [verdicts_file]
    tokens = judge(run, models, responses, verdicts_file, clock, "filter")
    unsteered_file = run.path / "unsteered.jsonl"
    if run.workers.once(unsteered_file.exists):
        files.append(run.path / "unsteered_verdicts.jsonl")
        tokens += judge(run, models, Shard(unsteered_file, Response), files[1], clock, "filter probe")
    run.finish_stage("filter", files, clock, tokens=tokens, records=len(responses))


def remember_guard(run: RunDir) -> None:
    """A guard's weights are not changed in the middle of a run, and an exported set names them."""
    for name in run.recipe.guard.checkpoints:
        run.remember_input(f"guard {name}", fingerprint(resolve(name, "guard.model")))


def judge(
    run: RunDir,
    models: Models,
    responses: Sequence[Response],
    shard: Path,
    clock: StageClock,
    title: str,
    every_response: bool = False,
) -> int:
    """Give every response a verdict and finish the shard; response tokens that were judged.

    Args:
        every_response: also ask the guard about malformed ones, as an evaluation must; a filter drops them unread.
    """
    journal = Journal(shard, Verdict, run.workers)
    done = {verdict.key for verdict in journal.records()}
    todo = [number for number, response in enumerate(responses) if response.key not in done]
    if todo:
        guard, asked, together = models.guard, {}, run.recipe.guard.tensor_parallel
        speaks = run.workers.speaks(together)
        with TokenBar(title, len(responses), "verdicts", len(done), run.workers) as bar:

            def readable(some: Iterable[Response]) -> Iterator[Exchange]:
                for response in some:
                    problem = response_problem(response, models.chat)
                    if problem is None or (every_response and response.text):
                        asked[response.key] = response
                        yield Exchange(response.key, response.prompt, response.text)
                    elif speaks:
                        journal.append(_verdict(response, guard.name, "dropped", problem))
                        bar.update(0)

            for turn in _turns(run.workers, Mapped(responses.__getitem__, todo), together):
                for judgement in guard.judge(readable(turn)):
                    response = asked.pop(judgement.id)
                    if speaks:
                        reason = judgement.reason or ("unsafe" if judgement.decision == "unsafe" else "")
                        journal.append(_verdict(response, guard.name, judgement.decision, reason, judgement))
                        bar.update(response.num_tokens)
                        clock.tick()
    journal.finish(response.key for response in responses)
    dropped = {verdict.key for verdict in Shard(shard, Verdict) if verdict.decision == "dropped"}
    return sum(response.num_tokens for response in responses if response.key not in dropped)


def _turns(workers: Workers, items: Sequence[Response], together: int) -> Iterator[Iterable[Response]]:
    """This worker's share, some at a time: a guard reads ahead, and what it holds no other worker can take."""
    asked, others = workers.share(items, together), workers.count > together
    most = -(-len(items) * together // (4 * workers.count)) if others else len(items)
    for first in asked:
        yield chain((first,), islice(asked, most - 1))


def _verdict(response: Response, guard: str, decision: str, reason: str, judgement: Judgement | None = None) -> Verdict:
    about = (response.prompt_id, response.sample, response.label, response.steering, decision, reason)
    if judgement is None:
        return Verdict(*about, None, None, None, guard, windows=0, rung=response.rung)
    measured = (judgement.p_safe, judgement.p_unsafe, judgement.refusal)
    found = (judgement.category, judgement.windows, dict(judgement.labels))
    return Verdict(*about, *measured, guard, *found, response.rung)
