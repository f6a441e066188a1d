"""The student answers."""

import sys
from collections import Counter
from collections.abc import Sequence
from heapq import nsmallest
from itertools import islice
from pathlib import Path

from thinksafe.data.atomic import write_shard
from thinksafe.data.jsonl import Mapped, Shard
from thinksafe.data.records import Prompt, Response
from thinksafe.data.sources import load_prompts
from thinksafe.errors import UserError
from thinksafe.model.weights import fingerprint
from thinksafe.pipeline.responses import Task, longest_first, refuse_too_long, respond
from thinksafe.run.checkpoints import Models
from thinksafe.run.directory import RunDir, StageClock
from thinksafe.run.journal import Journal, write_for_all
from thinksafe.run.progress import TokenBar
from thinksafe.sampler.engine import Engine
from thinksafe.sampler.request import SamplingConfig


def generate(run: RunDir, models: Models) -> None:
    """Sample the student's own responses: harmful prompts with the steering instruction, benign ones without."""
    if run.is_done("generate"):
        return
    clock, config = run.clock("generate"), run.recipe.generation
    if run.recipe.prompts is None:
        raise UserError("prompts: missing; name a file in the recipe or with --prompts FILE")
    prompts_file, (shard, _) = run.path / "prompts.jsonl", run.attempts(0)
    if run.workers.once(lambda: shard.exists() and not prompts_file.exists()):
        raise UserError(f"{shard}: came from elsewhere, so go on with `thinksafe filter`, or give a new --out folder")

    def take_in() -> None:
        repeats: list[str] = []
        write_shard(prompts_file, islice(load_prompts(run.recipe.prompts, repeats.append), run.recipe.limit))
        if repeats:
            said = f"left out {len(repeats)} with the text and label of an earlier one, first {repeats[0]}"
            print(f"{'prompts':>30}: {said}", file=sys.stderr)

    write_for_all(prompts_file, run.workers, take_in)
    prompts, first = Shard(prompts_file, Prompt), config.rungs[0]

    def task(number: int) -> Task:
        prompt = prompts[number // first.samples]
        return Task(prompt, first.steering_of(prompt.label), number % first.samples)

    tasks = Mapped(task, range(len(prompts) * first.samples))
    tokens = sample(run, models, shard, tasks, config.sampling, clock, "generate")
    run.finish_stage("generate", [prompts_file, shard], clock, tokens=tokens, records=len(tasks))


def probe(run: RunDir, models: Models) -> None:
    """Sample some harmful prompts without steering, to know what steering gains."""
    count = run.recipe.generation.unsteered_probe
    if count == 0 or run.recipe.generation.steering is None or run.is_done("probe"):
        return
    harmful = (prompt for prompt in Shard(run.path / "prompts.jsonl", Prompt) if prompt.label == "harmful")
    tasks = [Task(prompt) for prompt in nsmallest(count, harmful, key=lambda prompt: prompt.id)]
    if not tasks:
        return
    clock, shard = run.clock("probe"), run.path / "unsteered.jsonl"
    tokens = sample(run, models, shard, tasks, run.recipe.generation.sampling, clock, "probe")
    run.finish_stage("probe", [shard], clock, tokens=tokens, records=len(tasks))


def sample(
    run: RunDir,
    models: Models,
    shard: Path,
    tasks: Sequence[Task],
    sampling: SamplingConfig,
    clock: StageClock,
    title: str,
    checkpoint: Path | None = None,
    adapter: Path | None = None,
) -> int:
    """Answer the tasks that a shard does not hold yet and finish it; response tokens in the whole shard."""
    journal = Journal(shard, Response, run.workers)
    done = {response.key for response in journal.records()}
    todo = longest_first((number, task) for number, task in enumerate(tasks) if task.key not in done)
    if len(todo) + len(done) > len(tasks):
        raise UserError(
            f"{shard}: answers prompts that are not asked any more; restore them or give a new --out folder"
        )
    if todo:
        run.remember_input("model", fingerprint(models.base))
        together = run.recipe.sampler.tensor_parallel
        fair = -(-len(todo) * together // run.workers.count)
        engine = Engine(models.sampled_student(checkpoint, adapter), run.recipe.sampler, fair)
        refuse_too_long(models.chat, tasks, engine.max_prompt_tokens, engine.cache_is_shorter)
        asked = run.workers.share(Mapped(tasks.__getitem__, todo), together)
        shared_tokens, preemptions = run.workers.total(), run.workers.total()
        with TokenBar(title, len(tasks), "responses", len(done), run.workers) as bar:
            for response in respond(engine, models.chat, asked, sampling, run.recipe.seed):
                if run.workers.speaks(together):
                    journal.append(response)
                    bar.update(response.num_tokens, **bar.share_of_limit(engine.limit_seconds))
                    clock.tick()
            if run.workers.speaks(together):
                shared_tokens(engine.scheduler.shared_tokens)
                preemptions(engine.scheduler.preemptions)
    journal.finish(task.key for task in tasks)
    tokens, ends = 0, Counter()
    for response in Shard(shard, Response):
        tokens += response.num_tokens
        ends[response.finish_reason] += 1
    if todo and run.workers.leads:
        spared = f"prefix caching shared {shared_tokens(0):,} prompt tokens, {preemptions(0):,} preemptions"
        print(f"{title:>30}: {spared}", file=sys.stderr)
        _say_unfinished(title, ends)
    return tokens


_UNFINISHED = {"length": "at the token limit", "loop": "in a loop", "nan": "with logits that broke (NaN)"}


def _say_unfinished(title: str, ends: Counter[str]) -> None:
    """What is of no use, before anybody waits for what comes next."""
    unfinished = [f"{ends[reason]} {words}" for reason, words in _UNFINISHED.items() if ends[reason]]
    if unfinished:
        count = ends.total() - ends["stop"]
        shown = f"{count} of {ends.total()} responses did not end by themselves: {', '.join(unfinished)}"
        print(f"{title:>30}: {shown}", file=sys.stderr)
