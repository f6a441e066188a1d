"""From prompts to responses: steer, tokenize, sample, decode. It yields records and knows nothing of files."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from thinksafe.data.records import Prompt, Response
from thinksafe.errors import UserError
from thinksafe.sampler.config import SamplingConfig
from thinksafe.sampler.engine import Engine
from thinksafe.sampler.request import Completion, Request
from thinksafe.text.chat import Chat
from thinksafe.text.steering import steer, template


@dataclass(frozen=True)
class SamplingTask:
    """One response to sample.

    Attributes:
        prompt: the prompt without steering.
        steering: instruction around the prompt, as a name or text for `steering.template`; None for no instruction.
        sample: index of the response among all responses to this prompt, over all rungs.
        rung: rung of the ladder; 0 is the first attempt.
    """

    prompt: Prompt
    steering: str | None = None
    sample: int = 0
    rung: int = 0

    @property
    def key(self) -> str:
        """Key `PROMPT_ID/SAMPLE` of the task and of its response, unique within a record file."""
        return f"{self.prompt.id}/{self.sample}"


def request_seed(seed: int, task: SamplingTask) -> int:
    """Return the seed of a task's request, in [0, 2^63), from the run's seed, the prompt id, the index of the sample
    and the steering. So a response does not change with the order of the tasks or with a restart."""
    digest = hashlib.sha256(f"{seed}/{task.key}/{task.steering}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def longest_first(indices: Iterable[int], tasks: Sequence[SamplingTask]) -> list[int]:
    """Return the indices of tasks in the order in which to start them: unsteered tasks first, steered tasks last.

    Within each of the two groups the given order stays.

    Refusals are half as long as other responses (442 against 866 tokens), and a response that starts late ends late.
    For 2,500 prompts at the paper's lengths and 256 sequences at once, this order saves 1% of the time with Qwen3-0.6B
    and 5% with Qwen3-8B against a mixed order; the reverse order costs the same amounts. If all lengths were known, an
    order by length would save 4% and 15%.
    """
    return sorted(indices, key=lambda index: bool(tasks[index].steering))


def check_prompt_lengths(
    chat: Chat, tasks: Iterable[SamplingTask], max_prompt_tokens: int, cache_limits_context: bool
) -> None:
    """Raise a UserError that names a prompt which leaves no room for a response token.

    Args:
        max_prompt_tokens: maximum number of tokens of a prompt, with template and steering.
        cache_limits_context: whether this limit comes from the size of the page pool, or else from the model's context.
    """
    limit_name, remedy = "context", "shorten or remove it"
    if cache_limits_context:
        limit_name, remedy = "page cache", "raise sampler.kv_cache_gib"
    template_bytes = len("".join(chat.user_turn).encode())
    for task in tasks:
        # A token has at least one byte, and normalization of text at most triples the number of bytes.
        if 3 * (template_bytes + len(_user_turn(task).encode())) <= max_prompt_tokens:
            continue
        if (num_tokens := len(chat.prompt_ids(_user_turn(task)))) > max_prompt_tokens:
            raise UserError(
                f"prompt {task.prompt.id} ({task.prompt.text[:40]!r}...) is longer than the {limit_name}: {num_tokens} "
                f"tokens with template and steering, {max_prompt_tokens} fit; {remedy}"
            )


def sample_responses(
    engine: Engine, chat: Chat, tasks: Iterable[SamplingTask], sampling: SamplingConfig, seed: int
) -> Iterator[tuple[Response, Completion]]:
    """Yield one response for each task, with its tokens, in the order in which they are finished.

    Args:
        chat: tokenizer and chat template of the sampled student.
        tasks: read one by one, when the engine has room for another request.
        seed: seed of the run, see `request_seed`.
    """
    pending: dict[str, tuple[SamplingTask, Request]] = {}

    def requests() -> Iterator[Request]:
        for task in tasks:
            ids = tuple(chat.prompt_ids(_user_turn(task)))
            request = Request(task.key, ids, sampling, request_seed(seed, task), chat.stop_ids)
            pending[task.key] = (task, request)
            yield request

    for completion in engine.generate(requests()):
        task, request = pending.pop(completion.request_id)
        is_broken = completion.finish_reason == "stop" and chat.tokenizer.has_broken_character(completion.tokens)
        response = Response(
            prompt=task.prompt.text,
            label=task.prompt.label,
            text=chat.decode(completion.tokens),
            prompt_id=task.prompt.id,
            steering=task.steering,
            sample=task.sample,
            rung=task.rung,
            num_prompt_tokens=len(request.prompt),
            num_tokens=len(completion.tokens),
            finish_reason="invalid_utf8" if is_broken else completion.finish_reason,
            seed=request.seed,
        )
        yield response, completion


def _user_turn(task: SamplingTask) -> str:
    """Return the text of the user turn: the prompt inside its steering instruction, or alone if there is none."""
    return steer(template(task.steering), task.prompt.text) if task.steering else task.prompt.text
