"""From prompts to responses: steer, tokenise, sample, decode. It yields records and touches no file."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from thinksafe.data.records import Prompt, Response
from thinksafe.errors import UserError
from thinksafe.sampler.engine import Engine
from thinksafe.sampler.request import Request, SamplingConfig
from thinksafe.text.chat import Chat
from thinksafe.text.steering import steer, template


@dataclass(frozen=True)
class Task:
    """One response wanted: a prompt, the steering around it (a name or text of `steering.template`), which sample, and
    the rung of the ladder that asks for it."""

    prompt: Prompt
    steering: str | None = None
    sample: int = 0
    rung: int = 0

    @property
    def key(self) -> str:
        """Unique among the tasks of one shard."""
        return f"{self.prompt.id}/{self.sample}"


def request_seed(seed: int, task: Task) -> int:
    """63 bits from the run's seed and the task alone, so a response survives any reordering or restart."""
    digest = hashlib.sha256(f"{seed}/{task.key}/{task.steering}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def longest_first(tasks: Iterable[tuple[int, Task]]) -> list[int]:
    """The tasks' numbers in the order in which they are best begun: steered ones last, since refusals are half as long
    as other responses (442 tokens against 866) and whoever begins late ends late.

    Of 2,500 prompts at the paper's lengths, 256 at once, this saves 1% of the time with Qwen3-0.6B and 5% with Qwen3-8B
    against a mixed order; begun last, long ones cost as much. To know every length would save 4% and 15%.
    """
    unsteered, steered = [], []
    for number, task in tasks:
        (steered if task.steering else unsteered).append(number)
    return unsteered + steered


def refuse_too_long(chat: Chat, tasks: Iterable[Task], limit: int, cache_is_shorter: bool) -> None:
    """Find a prompt that leaves no room for a response before anything is sampled.

    Args:
        limit: tokens of a prompt, template and steering included.
        cache_is_shorter: it is the page pool's limit, not the model's.

    Raises:
        UserError: naming the prompt.
    """
    room, way_out = "context", "shorten or remove it"
    if cache_is_shorter:
        room, way_out = "page cache", "raise sampler.kv_cache_gib"
    around = len("".join(chat.user_turn).encode())
    for task in tasks:
        # A token is a byte at least, and no normalisation of text makes more than three out of one.
        if 3 * (around + len(_text(task).encode())) <= limit:
            continue
        if (count := len(chat.prompt_ids(_text(task)))) > limit:
            raise UserError(
                f"prompt {task.prompt.id} ({task.prompt.text[:40]!r}...) is longer than the {room}: {count} tokens "
                f"with template and steering, {limit} fit; {way_out}"
            )


def respond(
    engine: Engine, chat: Chat, tasks: Iterable[Task], sampling: SamplingConfig, seed: int
) -> Iterator[Response]:
    """Sample one response a task, each yielded as soon as it is finished. Tasks are taken as there is room for them."""
    asked: dict[str, tuple[Task, Request]] = {}

    def requests() -> Iterator[Request]:
        for task in tasks:
            ids = tuple(chat.prompt_ids(_text(task)))
            request = Request(task.key, ids, sampling, request_seed(seed, task), chat.stop_ids)
            asked[task.key] = (task, request)
            yield request

    for completion in engine.generate(requests()):
        task, request = asked.pop(completion.request_id)
        yield Response(
            prompt=task.prompt.text,
            label=task.prompt.label,
            text=chat.decode(completion.tokens),
            prompt_id=task.prompt.id,
            steering=task.steering,
            sample=task.sample,
            rung=task.rung,
            num_prompt_tokens=len(request.prompt),
            num_tokens=len(completion.tokens),
            finish_reason=completion.finish_reason,
            seed=request.seed,
        )


def _text(task: Task) -> str:
    """The user turn that is sampled from."""
    return steer(template(task.steering), task.prompt.text) if task.steering else task.prompt.text
