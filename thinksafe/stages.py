"""The stages, from generate to report. Each reads records of the run directory and writes more.

Every stage can be killed at any moment and goes on where it stopped; one that is done does nothing. All workers of a
run call generate, probe, filter_responses, retry, train and evaluate together; the other stages are for the first one
alone.
"""

import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from heapq import nsmallest
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from thinksafe.attempts import Attempts
from thinksafe.errors import UserError, is_out_of_memory
from thinksafe.estimate import estimate
from thinksafe.evaluation.metrics import measure
from thinksafe.generation import Task, longest_first, refuse_too_long, respond
from thinksafe.guards.interface import Exchange, Judgement
from thinksafe.hardware import hardware_of
from thinksafe.intake import (
    evaluation_prompts,
    read_marks,
    refuse_other_student,
    refuse_repeated,
    required,
    response_problem,
    training_sequences,
)
from thinksafe.kernels.packed_attention import keeps_grouped_heads
from thinksafe.model.decoder import Decoder
from thinksafe.model.lora import attach, check_targets, save_adapter
from thinksafe.model.weights import fingerprint, load_config, resolve, save_decoder
from thinksafe.models import Models
from thinksafe.paths import expand
from thinksafe.progress import TokenBar, in_figures
from thinksafe.prompts import load_prompts
from thinksafe.records import Mapped, Prompt, Response, Shard, Verdict, content_hash, read_records, to_json
from thinksafe.reporting.html import write_report
from thinksafe.reporting.review import write_review
from thinksafe.reporting.summary import summarise
from thinksafe.rundir import Journal, RunDir, StageClock, replacing, write_atomically, write_for_all, write_shard
from thinksafe.sampler.engine import Engine
from thinksafe.sampler.request import SamplingConfig
from thinksafe.selection import choose, story
from thinksafe.steering import Rung
from thinksafe.training.costs import (
    TrainingCosts,
    average_pack,
    described,
    keeping_on,
    largest_pack,
    recorded_on,
    sharding_on,
)
from thinksafe.training.distributed import ZeroConfig, join, require_deepspeed
from thinksafe.training.engine import NonFiniteStep, SingleEngine
from thinksafe.training.loop import TrainingConfig, plan_steps
from thinksafe.training.loop import train as run_training
from thinksafe.training.packing import TrainingSequence
from thinksafe.training.trackers import require, tracking
from thinksafe.workers import Workers

if TYPE_CHECKING:
    from thinksafe.training.zero import ZeroEngine

Moment = Literal["before", "after"]


def foresee(run: RunDir, models: Models) -> None:
    """Write down at the start what the run is expected to take on this GPU, for the report to compare."""
    hardware = hardware_of(models.device)
    if hardware is None or run.manifest["stages"]:
        return
    try:
        found = estimate(run.recipe, hardware, run.workers.count)
    except UserError as error:
        print(f"no estimate: {error}", file=sys.stderr)
        return
    write_atomically(run.path / "estimate.json", json.dumps(found.to_json(), indent=2) + "\n")


def check(run: RunDir, models: Models) -> None:
    """Find before the first hour of work what would stop the run after it; a run that has begun is past this."""
    if run.manifest["stages"]:
        return
    for entry in run.recipe.evaluation.sets:
        evaluation_prompts(entry)
    if run.recipe.training.method == "lora":
        check_targets(load_config(models.base)[0], run.recipe.lora)
    if run.recipe.zero.is_needed(run.workers.count):
        require_deepspeed()
    models.check_guard()
    require(run.recipe.trackers)


def generate(run: RunDir, models: Models) -> None:
    """Sample the student's own responses: harmful prompts with the steering instruction, benign ones without."""
    if run.is_done("generate"):
        return
    clock, config = run.clock("generate"), run.recipe.generation
    if run.recipe.prompts is None:
        raise UserError("prompts: missing; name a file in the recipe or with --prompts FILE")
    prompts_file, (shard, _) = run.path / "prompts.jsonl", run.attempts(0)

    def take_in() -> None:
        write_shard(prompts_file, islice(load_prompts(run.recipe.prompts), run.recipe.limit))

    write_for_all(prompts_file, run.workers, take_in)
    prompts, first = Shard(prompts_file, Prompt), config.rungs[0]

    def task(number: int) -> Task:
        prompt = prompts[number // first.samples]
        return Task(prompt, first.steering_of(prompt.label), number % first.samples)

    tasks = Mapped(task, range(len(prompts) * first.samples))
    tokens = _sample(run, models, shard, tasks, config.sampling, clock, "generate")
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
    tokens = _sample(run, models, shard, tasks, run.recipe.generation.sampling, clock, "probe")
    run.finish_stage("probe", [shard], clock, tokens=tokens, records=len(tasks))


def filter_responses(run: RunDir, models: Models) -> None:
    """Judge every response."""
    if run.is_done("filter"):
        return
    clock, (responses_file, verdicts_file) = run.clock("filter"), run.attempts(0)
    required(run, responses_file, "generate", "`thinksafe generate` first, or give --responses FILE")
    write_for_all(responses_file, run.workers, lambda: refuse_repeated(responses_file))
    _remember_guard(run)
    responses, files = Shard(responses_file, Response), [verdicts_file]
    tokens = _judge(run, models, responses, verdicts_file, clock, "filter")
    unsteered_file = run.path / "unsteered.jsonl"
    if run.workers.once(unsteered_file.exists):
        files.append(run.path / "unsteered_verdicts.jsonl")
        tokens += _judge(run, models, Shard(unsteered_file, Response), files[1], clock, "filter probe")
    run.finish_stage("filter", files, clock, tokens=tokens, records=len(responses))


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
        sampled = _sample(run, models, responses_file, tasks, settings, clock, title)
        run.finish_stage(sampling, [responses_file], clock, tokens=sampled, records=len(tasks))
    if not run.is_done(judging):
        _remember_guard(run)
        clock, responses = run.clock(judging), Shard(responses_file, Response)
        judged = _judge(run, models, responses, verdicts_file, clock, f"filter {title}")
        run.finish_stage(judging, [verdicts_file], clock, tokens=judged, records=len(responses))
    return True


def accept(run: RunDir) -> None:
    """Keep one accepted response of every prompt as a training example, and write down every prompt's story."""
    if run.is_done("accept"):
        return
    clock, marks = run.clock("accept"), read_marks(run)
    attempts = Attempts(run, marks)
    files = [run.path / "accepted.jsonl", run.path / "audit.jsonl"]
    with replacing(files[0]) as accepted, replacing(files[1]) as audit:
        for tried in attempts:
            if kept := choose(tried):
                accepted.write(to_json(kept.example) + "\n")
            audit.write(json.dumps(story(tried), ensure_ascii=False) + "\n")
    run.finish_stage("accept", files + [run.path / "marks.jsonl"] * bool(marks), clock, tokens=0, records=len(attempts))


def examples_file(run: RunDir) -> Path:
    """Where the accepted examples are. All workers ask together.

    Raises:
        UserError: nothing was judged yet, or nothing accepted.
    """
    accepted = required(run, run.path / "accepted.jsonl", "accept", "`thinksafe filter` first, or give --data FILE")
    write_for_all(accepted, run.workers)
    if accepted.stat().st_size == 0:
        raise UserError(f"{accepted}: no response was accepted, so there is nothing to train on; see verdicts.jsonl")
    return accepted


def train(run: RunDir, models: Models) -> None:
    """Fine-tune the student on the accepted examples, prompts without steering."""
    checkpoints = run.path / "training" / "checkpoints"
    if run.is_done("train"):
        if run.workers.leads:
            shutil.rmtree(checkpoints, ignore_errors=True)
        return
    recipe, clock, ranks = run.recipe, run.clock("train"), run.workers.count
    config = recipe.training
    accepted = examples_file(run)
    sequences, dropped = training_sequences(accepted, recipe, models)
    if not sequences:
        raise UserError(f"{accepted}: no example is fit for training: {_counted(dropped)}")
    models.forget_guard()
    shape, lora = load_config(models.base)[0], recipe.lora if config.method == "lora" else None
    if lora is not None:
        check_targets(shape, lora)
    run.remember_input("model", fingerprint(models.base))
    lengths = [len(sequence) for sequence in sequences]
    with_reference = any(sequence.keeps_to_reference for sequence in sequences)
    fp8 = config.frozen_weights == "fp8"
    grouped_heads = keeps_grouped_heads(models.dtype)
    costs = TrainingCosts(shape, lora, models.dtype.itemsize, with_reference, fp8, grouped_heads)
    largest = largest_pack(lengths, config.batch_size, config.batch_tokens, config.max_tokens_per_pack)
    sharding = _sharding(run, models, costs, largest)
    with _explaining_memory(costs, sharding, ranks, largest):
        decoder = models.student(sharding is not None and sharding.stage == 3, config.frozen_weights)
        if config.method == "lora":
            attach(decoder, recipe.lora, recipe.seed)
            decoder.pass_gradients()
        else:
            decoder.requires_grad_(True)
        setting = config.activation_checkpointing
        decoder.keeping = keeping_on(models.device, setting, costs, largest, sharding, ranks)
        if run.workers.leads and set(decoder.keeping) != {"none"}:
            again = f"{described(decoder.keeping)}, for packs of {largest:,} tokens"
            print(f"{'computed again':>30}: {again}", file=sys.stderr)
        recorded = 0
        if sharding is None and config.cuda_graphs == "auto":
            average = average_pack(lengths, config.batch_size, config.batch_tokens, config.max_tokens_per_pack)
            recorded = recorded_on(models.device, costs, decoder.keeping, largest, average)
        if recorded:
            print(f"{'CUDA graphs':>30}: for packs of up to {recorded:,} tokens", file=sys.stderr)
        engine = _training_engine(decoder, config, sharding, with_reference, models.device, recorded)
        _run_training(run, engine, sequences, clock)
    files = run.workers.once(lambda: [str(file) for file in _save_student(run, models, decoder)])
    engine.close()  # an evaluation may follow, which wants the device's memory
    run.finish_stage(
        "train",
        [*map(Path, files), run.path / "training" / "metrics.jsonl"],
        clock,
        tokens=config.epochs * sum(map(len, sequences)),
        records=len(sequences),
        dropped=dict(dropped),
        steps=len(plan_steps(lengths, config, recipe.seed)),
    )
    if run.workers.leads:
        shutil.rmtree(checkpoints)  # only now: until the manifest knows them, they are what a restart goes on from
    models.forget_student()


def _sharding(run: RunDir, models: Models, costs: TrainingCosts, largest: int) -> ZeroConfig | None:
    """How the workers share the training out, said aloud; None for one process without DeepSpeed."""
    zero, ranks = run.recipe.zero, run.workers.count
    if not zero.is_needed(ranks):
        return None
    require_deepspeed()
    join(models.device, run.workers)
    sharding = sharding_on(models.device, zero, costs, largest, ranks)
    if run.workers.leads:
        print(f"{'sharded':>30}: ZeRO stage {sharding.stage} over {ranks} processes", file=sys.stderr)
    return sharding


def _training_engine(
    decoder: Decoder,
    config: TrainingConfig,
    sharding: ZeroConfig | None,
    with_reference: bool,
    device: torch.device,
    recorded: int,
) -> "SingleEngine | ZeroEngine":
    if sharding is None:
        return SingleEngine(decoder, config.max_grad_norm, config.weight_decay, with_reference, recorded)
    from thinksafe.training.zero import ZeroEngine  # DeepSpeed takes seconds to import, and need not be installed

    return ZeroEngine(decoder, config.max_grad_norm, config.weight_decay, sharding, with_reference, device)


def _run_training(
    run: RunDir, engine: "SingleEngine | ZeroEngine", sequences: Sequence[TrainingSequence], clock: StageClock
) -> None:
    """The loop, watched: a bar and the recipe's trackers."""
    recipe, folder = run.recipe, run.path / "training"
    steps = len(plan_steps([len(sequence) for sequence in sequences], recipe.training, recipe.seed))
    watched = tracking(recipe.trackers if run.workers.leads else (), folder, recipe.name, asdict(recipe))
    with watched as trackers, TokenBar("train", steps, "steps", workers=run.workers) as bar:

        def on_step(metrics):
            clock.tick()
            for tracker in trackers:
                tracker.log(metrics)
            if run.workers.leads:  # a step is the work of all
                if metrics.note:
                    bar.say(f"step {metrics.step} {metrics.note}")
                bar.update(metrics.tokens, step=str(metrics.step), **in_figures(metrics))

        try:
            run_training(engine, sequences, recipe.training, recipe.seed, folder, on_step)
        except NonFiniteStep as error:
            remedy = "lower training.learning_rate, or look at those examples in accepted.jsonl"
            raise UserError(f"training stopped, {error}; {remedy}") from None


@contextmanager
def _explaining_memory(costs: TrainingCosts, sharding: ZeroConfig | None, ranks: int, largest: int) -> Iterator[None]:
    """Raises: UserError: in place of running out of memory; it says what is needed and which settings need less."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        said = (str(error).splitlines() or ["the host has no more"])[0]
        state = costs.state_bytes(sharding, ranks) / 2**30
        layers = costs.model.num_layers
        least, most = (costs.step_bytes((kept,) * layers, largest, largest) / 2**30 for kept in ("full", "none"))
        raise UserError(
            f"out of memory in training: {said}; weights and optimiser were counted as {state:.1f} GiB, a pack of "
            f"{largest:,} tokens as {least:.1f} to {most:.1f}; lower training.max_tokens_per_pack, set "
            "training.activation_checkpointing=full, zero.offload_optimizer=true or, with more GPUs, zero.stage=3; "
            "the run goes on from its last checkpoint"
        ) from None


def evaluate(run: RunDir, models: Models, moment: Moment, adapter: Path | None = None) -> None:
    """Measure harm, over-refusal and reasoning of the student before or after training.

    Args:
        adapter: an adapter folder for `after`; by default what `train` left in the run directory.
    """
    stage = f"evaluate_{moment}"
    sets = run.recipe.evaluation.sets
    if not sets:
        return
    checkpoint = None
    if moment == "after" and adapter is None:
        full = run.path / "model"
        checkpoint, adapter = (full, None) if run.workers.once(full.exists) else (None, run.path / "adapter")
    if moment == "after":
        student = checkpoint or adapter
        run.workers.once(lambda: refuse_other_student(run.path / "evaluation" / moment, student))
        for name in run.workers.once(lambda: sorted(file.name for file in student.glob("*.safetensors"))):
            write_for_all(student / name, run.workers)
    if run.is_done(stage):
        return
    clock, tokens, results, files = run.clock(stage), 0, [], []
    prompts = {entry.name: evaluation_prompts(entry) for entry in sets}
    for entry in sets:
        run.remember_input(f"evaluation set {entry.name}", content_hash(map(to_json, prompts[entry.name])))
        responses_file = run.path / "evaluation" / moment / f"{entry.name}.responses.jsonl"
        verdicts_file = run.path / "evaluation" / moment / f"{entry.name}.verdicts.jsonl"
        tasks = [Task(prompt, entry.instruction, s) for prompt in prompts[entry.name] for s in range(entry.samples)]
        title = f"{moment} {entry.name}"
        sampling = run.recipe.evaluation.sampling
        tokens += _sample(run, models, responses_file, tasks, sampling, clock, title, checkpoint, adapter)
        responses, verdicts = Shard(responses_file, Response), ()
        files.append(responses_file)
        if entry.kind != "reasoning":
            _judge(run, models, responses, verdicts_file, clock, f"judge {entry.name}", every_response=True)
            verdicts = Shard(verdicts_file, Verdict)
            files.append(verdicts_file)
        results.append(measure(entry, prompts[entry.name], list(responses), list(verdicts)))
    files.append(run.path / "evaluation" / f"{moment}.json")
    run.workers.once(lambda: write_atomically(files[-1], json.dumps(results, indent=1) + "\n"))
    run.finish_stage(stage, files, clock, tokens=tokens, records=sum(result["responses"] for result in results))


def report(run: RunDir) -> Path:
    """Write report.json and report.html from whatever stages are done; the page's path."""
    if not run.manifest["stages"]:
        raise UserError(f"{run.path}: no stage is done yet, so there is nothing to report")
    return write_report(summarise(run), run.path)


def _remember_guard(run: RunDir) -> None:
    """A guard's weights are not changed in the middle of a run, and an exported set names them."""
    for name in run.recipe.guard.checkpoints:
        run.remember_input(f"guard {name}", fingerprint(resolve(name, "guard.model")))


def review(run: RunDir, most: int) -> Path:
    """Write review.html with the most uncertain responses; the page's path."""
    if not run.is_done("accept"):
        raise UserError(f"{run.path}: nothing is judged yet; run `thinksafe filter` first")
    return write_review(run, most)


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


def _sample(
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
        with TokenBar(title, len(tasks), "responses", len(done), run.workers) as bar:
            for response in respond(engine, models.chat, asked, sampling, run.recipe.seed):
                if run.workers.speaks(together):
                    journal.append(response)
                    bar.update(response.num_tokens, **bar.share_of_limit(engine.limit_seconds))
                    clock.tick()
    journal.finish(task.key for task in tasks)
    tokens, ends = 0, Counter()
    for response in Shard(shard, Response):
        tokens += response.num_tokens
        ends[response.finish_reason] += 1
    if todo and run.workers.leads:
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


def _judge(
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


def _save_student(run: RunDir, models: Models, decoder: Decoder) -> list[Path]:
    """Write the adapter, or the whole model after full fine-tuning, under a temporary name and rename it; its files."""
    lora = run.recipe.training.method == "lora"
    folder = run.path / ("adapter" if lora else "model")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    if lora:
        here = expand(run.recipe.model)
        save_adapter(decoder, run.recipe.lora, partial, str(here) if here.is_dir() else run.recipe.model)
    else:
        save_decoder(decoder, load_config(models.base)[1], partial)
        models.chat.tokenizer.save(partial)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    return sorted(folder.iterdir())


def _counted(reasons: Counter[str]) -> str:
    return ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common())


def _verdict(response: Response, guard: str, decision: str, reason: str, judgement: Judgement | None = None) -> Verdict:
    about = (response.prompt_id, response.sample, response.label, response.steering, decision, reason)
    if judgement is None:
        return Verdict(*about, None, None, None, guard, windows=0, rung=response.rung)
    measured = (judgement.p_safe, judgement.p_unsafe, judgement.refusal)
    found = (judgement.category, judgement.windows, dict(judgement.labels))
    return Verdict(*about, *measured, guard, *found, response.rung)
