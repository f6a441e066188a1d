"""The stages: generate, probe, filter, train, evaluate, report. Each reads records of the run directory, writes more.

Every stage can be killed at any moment and goes on where it stopped; one that is done does nothing.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from thinksafe.errors import UserError
from thinksafe.evaluation.metrics import measure
from thinksafe.generation import Task, respond
from thinksafe.guards.interface import Exchange, Judgement
from thinksafe.intake import (
    evaluation_prompts,
    refuse_other_student,
    refuse_repeated,
    required,
    response_problem,
    training_sequences,
)
from thinksafe.model.decoder import Decoder
from thinksafe.model.lora import attach, check_targets, save_adapter
from thinksafe.model.weights import fingerprint, load_config, resolve, save_decoder
from thinksafe.models import Models
from thinksafe.paths import expand
from thinksafe.progress import TokenBar
from thinksafe.prompts import load_prompts
from thinksafe.records import Example, Response, Verdict, content_id, read_prompts, read_records, to_json
from thinksafe.reporting.html import write_report
from thinksafe.reporting.summary import summarise
from thinksafe.rundir import Journal, RunDir, StageClock, write_atomically, write_shard
from thinksafe.sampler.engine import Engine
from thinksafe.sampler.request import SamplingConfig
from thinksafe.training.engine import NonFiniteStep, SingleEngine
from thinksafe.training.loop import train as run_training

Moment = Literal["before", "after"]


def check(run: RunDir, models: Models) -> None:
    """Find before the first hour of work what would stop the run after it; a run that has begun is past this."""
    if run.manifest["stages"]:
        return
    for entry in run.recipe.evaluation.sets:
        evaluation_prompts(entry)
    if run.recipe.training.method == "lora":
        check_targets(load_config(models.base)[0], run.recipe.lora)
    for name in run.recipe.guard.checkpoints:
        resolve(name, "guard.model")


def generate(run: RunDir, models: Models) -> None:
    """Sample the student's own responses: harmful prompts with the steering instruction, benign ones without."""
    if run.is_done("generate"):
        return
    clock, config = run.clock("generate"), run.recipe.generation
    if run.recipe.prompts is None:
        raise UserError("prompts: missing; name a file in the recipe or with --prompts FILE")
    prompts = load_prompts(run.recipe.prompts)[: run.recipe.limit]
    write_shard(run.path / "prompts.jsonl", prompts)
    steering = {"harmful": config.steering, "benign": None}
    tasks = [Task(prompt, steering[prompt.label], sample) for prompt in prompts for sample in range(config.samples)]
    shard = run.path / "responses.jsonl"
    tokens = _sample(run, models, shard, tasks, config.sampling, clock, "generate")
    run.finish_stage("generate", [run.path / "prompts.jsonl", shard], clock, tokens=tokens, records=len(tasks))


def probe(run: RunDir, models: Models) -> None:
    """Sample some harmful prompts without steering, to know what steering gains."""
    count = run.recipe.generation.unsteered_probe
    if count == 0 or run.recipe.generation.steering is None or run.is_done("probe"):
        return
    harmful = [prompt for prompt in read_prompts(run.path / "prompts.jsonl") if prompt.label == "harmful"]
    tasks = [Task(prompt) for prompt in sorted(harmful, key=lambda prompt: prompt.id)[:count]]
    if not tasks:
        return
    clock, shard = run.clock("probe"), run.path / "unsteered.jsonl"
    tokens = _sample(run, models, shard, tasks, run.recipe.generation.sampling, clock, "probe")
    run.finish_stage("probe", [shard], clock, tokens=tokens, records=len(tasks))


def filter_responses(run: RunDir, models: Models) -> None:
    """Judge every response and keep the safe ones as training examples."""
    if run.is_done("filter"):
        return
    clock = run.clock("filter")
    remedy = "`thinksafe generate` first, or give --responses FILE"
    responses_file = required(run, run.path / "responses.jsonl", "generate", remedy)
    responses = list(read_records(responses_file, Response))
    refuse_repeated(responses, responses_file)
    verdict_files = [run.path / "verdicts.jsonl"]
    tokens = _judge(models, responses, verdict_files[0], clock, "filter")
    if (run.path / "unsteered.jsonl").exists():
        unsteered = list(read_records(run.path / "unsteered.jsonl", Response))
        verdict_files.append(run.path / "unsteered_verdicts.jsonl")
        tokens += _judge(models, unsteered, verdict_files[1], clock, "filter probe")
    verdicts = list(read_records(verdict_files[0], Verdict))
    safe = {(verdict.prompt_id, verdict.sample) for verdict in verdicts if verdict.decision == "safe"}
    accepted = [
        Example(response.prompt, response.text, response.label, response.prompt_id)
        for response in sorted(responses, key=lambda response: (response.prompt_id, response.sample))
        if (response.prompt_id, response.sample) in safe
    ]
    shard = run.path / "accepted.jsonl"
    write_shard(shard, accepted)
    run.finish_stage("filter", [*verdict_files, shard], clock, tokens=tokens, records=len(verdicts))


def train(run: RunDir, models: Models) -> None:
    """Fine-tune the student on the accepted examples, prompts without steering."""
    checkpoints = run.path / "training" / "checkpoints"
    if run.is_done("train"):
        shutil.rmtree(checkpoints, ignore_errors=True)
        return
    recipe, clock = run.recipe, run.clock("train")
    config = recipe.training
    accepted = required(run, run.path / "accepted.jsonl", "filter", "`thinksafe filter` first, or give --data FILE")
    if accepted.stat().st_size == 0:
        raise UserError(f"{accepted}: no response was accepted, so there is nothing to train on; see verdicts.jsonl")
    sequences, dropped = training_sequences(accepted, recipe, models)
    if not sequences:
        raise UserError(f"{accepted}: no example is fit for training: {_counted(dropped)}")
    decoder = models.student()
    decoder.activation_checkpointing = config.activation_checkpointing
    if config.method == "lora":
        attach(decoder, recipe.lora, recipe.seed)
    else:
        decoder.requires_grad_(True)
    run.remember_input("model", fingerprint(models.base))
    engine = SingleEngine(decoder, config.max_grad_norm, config.weight_decay)
    steps = config.epochs * -(-len(sequences) // config.batch_size)
    with TokenBar("train", steps, "steps") as bar:

        def on_step(metrics):
            clock.tick()
            bar.update(metrics.tokens, loss=f"{metrics.loss:.3f}", step=str(metrics.step))

        try:
            run_training(engine, sequences, config, recipe.seed, run.path / "training", on_step)
        except NonFiniteStep as error:
            remedy = "lower training.learning_rate or look at those examples"
            raise UserError(f"training stopped, {error}; {remedy}") from None
    folder = _save_student(run, models, decoder)
    run.finish_stage(
        "train",
        [*sorted(folder.iterdir()), run.path / "training" / "metrics.jsonl"],
        clock,
        tokens=config.epochs * sum(map(len, sequences)),
        records=len(sequences),
        dropped=dict(dropped),
        steps=steps,
    )
    shutil.rmtree(checkpoints)  # only now: until the manifest knows the adapter, they are what a restart goes on from
    models.forget_student()


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
        checkpoint, adapter = (full, None) if full.exists() else (None, run.path / "adapter")
    if moment == "after":
        refuse_other_student(run.path / "evaluation" / moment, checkpoint or adapter)
    if run.is_done(stage):
        return
    clock, tokens, results, files = run.clock(stage), 0, [], []
    prompts = {entry.name: evaluation_prompts(entry) for entry in sets}
    for entry in sets:
        run.remember_input(f"evaluation set {entry.name}", content_id(*map(to_json, prompts[entry.name])))
        responses_file = run.path / "evaluation" / moment / f"{entry.name}.responses.jsonl"
        verdicts_file = run.path / "evaluation" / moment / f"{entry.name}.verdicts.jsonl"
        tasks = [Task(prompt, entry.instruction, s) for prompt in prompts[entry.name] for s in range(entry.samples)]
        title = f"{moment} {entry.name}"
        sampling = run.recipe.evaluation.sampling
        tokens += _sample(run, models, responses_file, tasks, sampling, clock, title, checkpoint, adapter)
        responses = list(read_records(responses_file, Response))
        files.append(responses_file)
        verdicts: list[Verdict] = []
        if entry.kind != "reasoning":
            _judge(models, responses, verdicts_file, clock, f"judge {entry.name}", every_response=True)
            verdicts = list(read_records(verdicts_file, Verdict))
            files.append(verdicts_file)
        results.append(measure(entry, prompts[entry.name], responses, verdicts))
    files.append(run.path / "evaluation" / f"{moment}.json")
    write_atomically(files[-1], json.dumps(results, indent=1) + "\n")
    run.finish_stage(stage, files, clock, tokens=tokens, records=sum(result["responses"] for result in results))


def report(run: RunDir) -> Path:
    """Write report.json and report.html from whatever stages are done; the page's path."""
    if not run.manifest["stages"]:
        raise UserError(f"{run.path}: no stage is done yet, so there is nothing to report")
    return write_report(summarise(run), run.path)


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
    journal = Journal(shard, Response)
    done = {f"{response.prompt_id}/{response.sample}" for response in journal.existing}
    if not done <= {task.key for task in tasks}:
        raise UserError(
            f"{shard}: answers prompts that are not asked any more; restore them or give a new --out folder"
        )
    tokens = sum(response.num_tokens for response in journal.existing)
    todo = [task for task in tasks if task.key not in done]
    if todo:
        run.remember_input("model", fingerprint(models.base))
        engine = Engine(models.student(checkpoint, adapter), run.recipe.sampler)
        with TokenBar(title, len(tasks), "responses", len(done)) as bar:
            for response in respond(engine, models.chat, todo, sampling, run.recipe.seed):
                journal.append(response)
                tokens += response.num_tokens
                bar.update(response.num_tokens, **bar.share_of_limit(engine.limit_seconds))
                clock.tick()
    journal.finish()
    return tokens


def _judge(
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
    journal = Journal(shard, Verdict)
    done = {(verdict.prompt_id, verdict.sample) for verdict in journal.existing}
    todo = {f"{r.prompt_id}/{r.sample}": r for r in responses if (r.prompt_id, r.sample) not in done}
    if todo:
        guard, readable = models.guard, []
        with TokenBar(title, len(responses), "verdicts", len(done)) as bar:
            for key, response in todo.items():
                problem = response_problem(response, models.chat)
                if problem is None or (every_response and response.text):
                    readable.append(Exchange(key, response.prompt, response.text))
                else:
                    journal.append(_verdict(response, guard.name, "dropped", problem))
                    bar.update(0)
            for judgement in guard.judge(readable):
                response = todo[judgement.id]
                reason = judgement.reason or ("unsafe" if judgement.decision == "unsafe" else "")
                journal.append(_verdict(response, guard.name, judgement.decision, reason, judgement))
                bar.update(response.num_tokens)
                clock.tick()
    journal.finish()
    dropped = {(v.prompt_id, v.sample) for v in read_records(shard, Verdict) if v.decision == "dropped"}
    return sum(r.num_tokens for r in responses if (r.prompt_id, r.sample) not in dropped)


def _save_student(run: RunDir, models: Models, decoder: Decoder) -> Path:
    """Write the adapter, or the whole model after full fine-tuning, under a temporary name and rename it."""
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
    return folder


def _counted(reasons: Counter[str]) -> str:
    return ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common())


def _verdict(response: Response, guard: str, decision: str, reason: str, judgement: Judgement | None = None) -> Verdict:
    about = (response.prompt_id, response.sample, response.label, response.steering, decision, reason)
    if judgement is None:
        return Verdict(*about, None, None, None, guard, windows=0)
    measured = (judgement.p_safe, judgement.p_unsafe, judgement.refusal)
    return Verdict(*about, *measured, guard, judgement.category, judgement.windows, dict(judgement.labels))
