"""Run generate, filter, retry and accept with a fake sampler and a fake guard, and print their memory in MiB.

python tests/support/instant_run.py OUT PROMPTS CHARACTERS_PER_RESPONSE
"""

import resource
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

from thinksafe import pipeline
from thinksafe.data.records import Response, Verdict
from thinksafe.pipeline.imports import import_marks
from thinksafe.recipe.loading import check_recipe
from thinksafe.run.directory import RunDir


class InstantGuard:
    """A guard that calls a Response safe if `accepts(response)` is true, else unsafe, and judges one at a time."""

    name = "instant"

    def __init__(self, accepts):
        self._accepts = accepts

    def judge(self, responses):
        for response in responses:
            p_unsafe = 0.0 if self._accepts(response) else 1.0
            fields = {"p_safe": 1 - p_unsafe, "p_unsafe": p_unsafe, "refusal": not p_unsafe}
            yield Verdict.of(response, self.name, "unsafe" if p_unsafe else "safe", **fields)


def instant_checkpoints(accepts):
    """Return a fake CheckpointStore with an InstantGuard; stages that sample must run within `instant_sampling`."""
    chat = SimpleNamespace(has_control_token=lambda text: False)
    guard = InstantGuard(accepts)
    return SimpleNamespace(base="", chat=chat, chats=[chat], guard=guard, responder=lambda: (None, chat))


@contextmanager
def instant_sampling(answer=lambda task: f"{task.steering}"):
    """Replace sampling inside the block: each task gets a well-formed response of 7 tokens with `answer(task)`."""

    def sample_responses(engine, chat, tasks, sampling, seed):
        for task in tasks:
            text = f"<think>\nHm.\n</think>\n\n{answer(task)}"
            response = Response(
                prompt=task.prompt.text,
                label=task.prompt.label,
                text=text,
                prompt_id=task.prompt.id,
                steering=task.steering,
                sample=task.sample,
                rung=task.rung,
                num_tokens=7,
            )
            yield response, None

    scheduler = SimpleNamespace(shared_tokens=0, preemptions=0)
    engine = SimpleNamespace(
        max_prompt_tokens=10**6, cache_limits_context=False, roofline_seconds=0.0, scheduler=scheduler
    )
    stand_ins = {
        "generate.sample_responses": sample_responses,
        "generate.Engine": lambda *_: engine,
        "generate.checkpoint_fingerprint": lambda _: "",
        "generate.check_prompt_lengths": lambda *_: None,
        "judge.checkpoint_fingerprint": lambda _: "",
        "judge.resolve_checkpoint": lambda *_: "",
    }
    with ExitStack() as stack:
        for name, stand_in in stand_ins.items():
            stack.enter_context(patch(f"thinksafe.pipeline.{name}", stand_in))
        yield


def run_stages(run, checkpoints, marks=None):
    """Run all stages from prompts to accepted.jsonl.

    Args:
        marks: file of marks to import before the last stage, as `thinksafe filter --marks` does; None for no marks.
    """
    pipeline.generate_responses(run, checkpoints)
    pipeline.filter_responses(run, checkpoints)
    pipeline.retry_rejected(run, checkpoints)
    if marks is not None:
        import_marks(run, marks)
        pipeline.retry_rejected(run, checkpoints)
    pipeline.accept_responses(run)


def main(out: Path, prompts: int, characters: int) -> None:
    """Run all stages, and print by how many MiB they raise the peak memory of this process.

    Every third prompt is rejected once, and accepted on the next rung.

    Args:
        out: a new folder.
        prompts: number of prompts.
        characters: number of characters in each answer, rounded down to a multiple of 16.
    """
    out.mkdir()
    with (out / "in.jsonl").open("w") as file:
        file.writelines(
            f'{{"text": "prompt {n}", "label": "{"harmful" if n % 2 else "benign"}"}}\n' for n in range(prompts)
        )
    generation = {"ladder": [{"steering": "risk"}], "num_unsteered_prompts": 0}
    raw = {"name": "n", "model": "m", "prompts": str(out / "in.jsonl"), "generation": generation}
    checkpoints = instant_checkpoints(lambda response: response.sample == 1 or int(response.prompt[7:]) % 3)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with (
        RunDir.open(out / "run", check_recipe(raw, "")) as run,
        instant_sampling(lambda task: task.prompt.id * (characters // 16)),
    ):
        run_stages(run, checkpoints)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
