"""Run generate, filter, retry and accept with a sampler and a guard that take no time, and print what memory they took.

python tests/support/instant_run.py OUT PROMPTS CHARACTERS_A_RESPONSE
"""

import resource
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

from thinksafe import pipeline as stages
from thinksafe.data.records import Response
from thinksafe.guards.base import Judgement
from thinksafe.pipeline.imports import take_in_marks
from thinksafe.recipe.loading import check_recipe
from thinksafe.run.directory import RunDir


class InstantGuard:
    """Accepts what `accepts(exchange)` says, and judges as it reads."""

    name = "instant"

    def __init__(self, accepts):
        self._accepts = accepts

    def judge(self, exchanges):
        for exchange in exchanges:
            unsafe = 0.0 if self._accepts(exchange) else 1.0
            yield Judgement(exchange.id, "unsafe" if unsafe else "safe", 1 - unsafe, unsafe, not unsafe)


def instant_models(accepts):
    """In the place of `Models`; needs `instantly` around what samples."""
    chat = SimpleNamespace(has_control_token=lambda text: False)
    return SimpleNamespace(base="", chat=chat, guard=InstantGuard(accepts), sampled_student=lambda *_: None)


@contextmanager
def instantly(say=lambda task: f"{task.steering}"):
    """Sampling becomes `say(task)`, which goes into the answer."""

    def respond(engine, chat, tasks, sampling, seed):
        for task in tasks:
            text = f"<think>\nHm.\n</think>\n\n{say(task)}"
            about = {"prompt_id": task.prompt.id, "steering": task.steering, "sample": task.sample, "rung": task.rung}
            yield Response(task.prompt.text, task.prompt.label, text, num_tokens=7, **about)

    scheduler = SimpleNamespace(shared_tokens=0, preemptions=0)
    engine = SimpleNamespace(max_prompt_tokens=10**6, cache_is_shorter=False, limit_seconds=0.0, scheduler=scheduler)
    stand_ins = {
        "sampling.respond": respond,
        "sampling.Engine": lambda *_: engine,
        "sampling.fingerprint": lambda _: "",
        "sampling.refuse_too_long": lambda *_: None,
        "judging.fingerprint": lambda _: "",
        "judging.resolve": lambda *_: "",
    }
    with ExitStack() as stack:
        for name, stand_in in stand_ins.items():
            stack.enter_context(patch(f"thinksafe.pipeline.{name}", stand_in))
        yield


def run_stages(run, models, marks=None):
    """Everything between prompts and accepted.jsonl; with people's marks as the command line takes them in."""
    stages.generate(run, models)
    stages.filter_responses(run, models)
    stages.retry(run, models)
    if marks is not None:
        take_in_marks(run, marks)
        stages.retry(run, models)
    stages.accept(run)


def main(out: Path, prompts: int, characters: int) -> None:
    """Every third prompt is rejected once, and accepted on the next rung."""
    out.mkdir()
    with (out / "in.jsonl").open("w") as file:
        file.writelines(
            f'{{"text": "prompt {n}", "label": "{"harmful" if n % 2 else "benign"}"}}\n' for n in range(prompts)
        )
    generation = {"ladder": [{"steering": "risk"}], "unsteered_probe": 0}
    raw = {"name": "n", "model": "m", "prompts": str(out / "in.jsonl"), "generation": generation}
    models = instant_models(lambda exchange: exchange.id.endswith("/1") or int(exchange.prompt[7:]) % 3)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with (
        RunDir.open(out / "run", check_recipe(raw, "")) as run,
        instantly(lambda task: task.prompt.id * (characters // 16)),
    ):
        run_stages(run, models)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
