"""From prompts to responses: steer, tokenise, sample, decode. It yields records and touches no file."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from thinksafe.chat import Chat
from thinksafe.errors import UserError
from thinksafe.records import Prompt, Response
from thinksafe.sampler.engine import Engine
from thinksafe.sampler.request import Request, SamplingConfig
from thinksafe.steering import steer, template


@dataclass(frozen=True)
class Task:
    """One response wanted: a prompt, the steering around it (a name or text of `steering.template`), which sample."""

    prompt: Prompt
    steering: str | None = None
    sample: int = 0

    @property
    def key(self) -> str:
        """Unique among the tasks of one shard."""
        return f"{self.prompt.id}/{self.sample}"


def request_seed(seed: int, task: Task) -> int:
    """63 bits from the run's seed and the task alone, so a response survives any reordering or restart."""
    digest = hashlib.sha256(f"{seed}/{task.key}/{task.steering}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def respond(
    engine: Engine, chat: Chat, tasks: Iterable[Task], sampling: SamplingConfig, seed: int
) -> Iterator[Response]:
    """Sample one response a task, each yielded as soon as it is finished.

    Raises:
        UserError: a prompt that leaves no room for a response, before anything is sampled.
    """
    waiting: dict[str, tuple[Task, Request]] = {}
    for task in tasks:
        text = steer(template(task.steering), task.prompt.text) if task.steering else task.prompt.text
        ids = tuple(chat.prompt_ids(text))
        request = Request(task.key, ids, sampling, request_seed(seed, task), chat.stop_ids)
        if len(ids) > engine.max_prompt_tokens:
            raise UserError(
                f"prompt {task.prompt.id} ({task.prompt.text[:40]!r}...) is longer than the context: {len(ids)} tokens "
                f"with template and steering, {engine.max_prompt_tokens} fit; shorten or remove it"
            )
        waiting[task.key] = (task, request)
    for completion in engine.generate([request for _, request in waiting.values()]):
        task, request = waiting.pop(completion.request_id)
        yield Response(
            prompt=task.prompt.text,
            label=task.prompt.label,
            text=chat.decode(completion.tokens),
            prompt_id=task.prompt.id,
            steering=task.steering,
            sample=task.sample,
            num_prompt_tokens=len(request.prompt),
            num_tokens=len(completion.tokens),
            finish_reason=completion.finish_reason,
            seed=request.seed,
        )
