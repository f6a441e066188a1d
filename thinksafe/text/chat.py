"""Prompts and responses in the format of a model's chat template.

The canonical text of a response is `<think>\\n...\\n</think>\\n\\n...`, both for models that write the opening tag
(Qwen3) and for models whose template supplies it (R1-Distill). Training ids are assembled from prompt, response and end
of turn; an assistant turn is never rendered through the template, because templates drop parts of past thoughts.
"""

import hashlib
import inspect
import json
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, meta

from thinksafe.errors import UserError
from thinksafe.text.tokenizer import THINK_CLOSE, THINK_OPEN, SafeTokenizer

_THINKING_SWITCHES = ("enable_thinking", "thinking")
"""Arguments with which chat templates turn thinking on or off."""

FormatProblem = Literal["no_think_block", "nested_think", "empty_answer"]
"""Why a response is not one closed think block followed by an answer; see `parse_response`."""


@dataclass(frozen=True)
class ParsedResponse:
    """Thought, which may be empty, and answer of a response, both without tags and outer white space."""

    think: str
    answer: str


def parse_response(text: str) -> ParsedResponse | FormatProblem:
    """Return thought and answer of a response, or the reason why it is not one closed think block and an answer:
    `no_think_block` if `<think>` or `</think>` is missing; `nested_think` if one of them occurs twice or text other
    than white space precedes `<think>`; `empty_answer` if only white space follows `</think>`."""
    num_open, num_close = text.count(THINK_OPEN), text.count(THINK_CLOSE)
    if num_open == 0 or num_close == 0:
        return "no_think_block"
    if num_open > 1 or num_close > 1 or not text.lstrip().startswith(THINK_OPEN):
        return "nested_think"
    think, answer = text.split(THINK_OPEN, 1)[1].split(THINK_CLOSE, 1)
    return ParsedResponse(think.strip(), answer.strip()) if answer.strip() else "empty_answer"


class Chat:
    """The tokenizer and chat template of one model: text to token ids and back.

    Attributes:
        stop_ids: sorted ids of the tokens that end a sampled response: the EOS tokens of the tokenizer and of
            generation_config.json, and the first control token that the template puts after an assistant's message.
        user_turn: template text before a user's message, and after it up to the start of the model's turn.
        supplies_think: whether the prompt already ends with an open think block.
    """

    def __init__(self, checkpoint: Path | SafeTokenizer, arguments: Mapping[str, Any] | None = None):
        """Read the tokenizer and template of a checkpoint.

        Args:
            checkpoint: folder of the checkpoint, or its tokenizer, whose `date` the template writes.
            arguments: values of the template's own variables, such as `enable_thinking`.

        Raises:
            UserError: the folder has no fast tokenizer, no chat template or no stop id; the template fails, does not
                show the user's message exactly once or has no such argument; or generation_config.json is damaged.
        """
        self.tokenizer = checkpoint if isinstance(checkpoint, SafeTokenizer) else SafeTokenizer(checkpoint)
        self.folder = self.tokenizer.folder
        self._arguments, self._template = dict(arguments or {}), self._read_template()
        self._check_arguments()
        head, tail = self._text_around(["user"], "the chat template does not show a user's message exactly once")
        if "<｜Assistant｜>" in tail and THINK_OPEN not in tail and THINK_CLOSE not in tail:
            tail += f"{THINK_OPEN}\n"  # early R1-Distill templates omit the tag that the model expects
        self.user_turn = head, tail
        self.supplies_think = tail.rstrip().endswith(THINK_OPEN)
        self.tokenizer = self.tokenizer.reserving(head, tail, self._text_after_response)
        self.stop_ids = self._stop_ids()
        self.tokenizer = self.tokenizer.reserving(*(self.tokenizer.decode([id_]) for id_ in self.stop_ids))

    def prompt_ids(self, user_text: str) -> list[int]:
        """Return the token ids of a user turn and of the opening of the model's turn, after which the model writes.
        A control token in `user_text` is encoded as ordinary characters."""
        return self.tokenizer.encode(self._prompt_parts(user_text))

    def two_turns(self) -> list[str]:
        """Return three pieces of template text: before a user's message, between it and the assistant's, and after
        both, where the model's next turn opens. A guard whose chat template holds its policy reads this form.

        Raises:
            UserError: the template does not show both messages in order, each once.
        """
        problem = "the chat template does not show a user turn and then an assistant turn"
        return self._text_around(["user", "assistant"], problem)

    def response_ids(self, text: str) -> list[int]:
        """Return the token ids of a canonical response as the model would write them after `prompt_ids`: without
        `<think>` if the prompt supplies it, and with the end of turn.

        Raises:
            ValueError: the text is not one think block and an answer; the message is the `FormatProblem`.
        """
        return self.tokenizer.encode(self._response_parts(text))

    def encode_ahead(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Encode (prompt, response) pairs on all cores, so that `prompt_ids` and `response_ids` take no time for them;
        see `SafeTokenizer.encode_ahead`. A response that is not canonical is left out."""

        def parts() -> Iterator[list[tuple[str, bool]]]:
            for prompt, text in pairs:
                yield self._prompt_parts(prompt)
                if isinstance(parse_response(text), ParsedResponse):
                    yield self._response_parts(text)

        self.tokenizer.encode_ahead(parts())

    def without_turn_end(self, text: str) -> str:
        """Return a response without the stop tokens, and white space around them, in which its text ends."""
        while (stripped := text.rstrip()).endswith(self._stop_texts):
            text = stripped.removesuffix(next(filter(stripped.endswith, self._stop_texts)))
        return text

    def decode(self, ids: list[int] | tuple[int, ...]) -> str:
        """Return the text of sampled ids in canonical form, with `<think>` and with control tokens spelled out."""
        text = self.tokenizer.decode(ids)
        return f"{THINK_OPEN}\n{text}" if self.supplies_think else text

    def has_control_token(self, text: str) -> bool:
        """Return whether a text spells out a control token of the model, other than `<think>` and `</think>`."""
        return any(token not in (THINK_OPEN, THINK_CLOSE) for token in self.tokenizer.control_tokens_in(text))

    def save(self, folder: Path) -> None:
        """Copy tokenizer, chat template and generation_config.json into an existing folder, load the copy, and compare
        it with the original. Raise a UserError if they differ."""
        self.tokenizer.save(folder)
        if Chat(SafeTokenizer(folder, self.tokenizer.date), self._arguments).fingerprint != self.fingerprint:
            raise UserError(
                f"{folder}: the copied tokenizer gives other token ids than that of {self.folder}; write the latter "
                "anew with save_pretrained of transformers"
            )

    @cached_property
    def fingerprint(self) -> str:
        """Hex hash of all that determines token ids: tokenizer, rendered template and stop ids."""
        rendered = [self._template, *self.user_turn, self._turn_end, self.template_strips, self.stop_ids]
        parts = [json.dumps(rendered), json.dumps(self.tokenizer.control_ids)]
        parts.append(self.tokenizer.hugging_face.backend_tokenizer.to_str())
        return hashlib.sha256("\x00".join(parts).encode()).hexdigest()

    @cached_property
    def thinking_note(self) -> str:
        """Why the model will not think, in one line, or empty: the prompt closes the think block, or the template
        thinks only if an argument that is not set says so."""
        closes = THINK_CLOSE in self.user_turn[1]
        problem = "closes the think block in the prompt" if closes else "leaves thinking off"
        switches = [name for name in _THINKING_SWITCHES if name in self._variables and name not in self._arguments]
        for name in switches:
            with suppress(UserError):  # the template need not accept the value
                if Chat(self.tokenizer, self._arguments | {name: True}).user_turn != self.user_turn:
                    return f"{self.folder}: the chat template {problem}; set template_arguments.{name}=true to think"
        return f"{self.folder}: the chat template {problem}, so responses have no thought" if closes else ""

    @cached_property
    def template_strips(self) -> bool:
        """Whether the template strips outer white space from a user's message."""
        marker = secrets.token_hex(8)
        return f" {marker} " not in self._render([{"role": "user", "content": f" {marker} "}], True)

    def _prompt_parts(self, user_text: str) -> list[tuple[str, bool]]:
        head, tail = self.user_turn
        return [(head, True), (user_text.strip() if self.template_strips else user_text, False), (tail, True)]

    def _response_parts(self, text: str) -> list[tuple[str, bool]]:
        """Return the (text, trusted) parts of a response; raise the ValueError of `response_ids`."""
        parsed = parse_response(text)
        if not isinstance(parsed, ParsedResponse):
            raise ValueError(parsed)
        opening = "" if self.supplies_think else f"{THINK_OPEN}\n"
        closing = f"\n{THINK_CLOSE}\n\n"
        return [(opening, True), (parsed.think, False), (closing, True), (parsed.answer, False), (self._turn_end, True)]

    @cached_property
    def _stop_texts(self) -> tuple[str, ...]:
        return tuple(filter(str.strip, (self.tokenizer.decode([id_]) for id_ in self.stop_ids)))

    @cached_property
    def _turn_end(self) -> str:
        """Template text after an assistant's message, such as `<|im_end|>\\n`; if that has no control token, the EOS
        token, or nothing if there is none."""
        has_control_token = self.tokenizer.control_tokens_in(self._text_after_response)
        return self._text_after_response if has_control_token else self.tokenizer.hugging_face.eos_token or ""

    @cached_property
    def _text_after_response(self) -> str:
        marker = secrets.token_hex(8)
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": marker}]
        return self._render(turns, False).rpartition(marker)[2]

    def _text_around(self, roles: list[str], problem: str) -> list[str]:
        """Return the template text before, between and after one message of each role, in len(roles) + 1 pieces.

        Raises:
            UserError: the template does not show all messages in order, each once; `problem` says so.
        """
        markers = [secrets.token_hex(8) for _ in roles]
        turns = [{"role": role, "content": marker} for role, marker in zip(roles, markers, strict=True)]
        pieces = re.split(f"({'|'.join(markers)})", self._render(turns, True))
        if pieces[1::2] != markers:
            raise UserError(f"{self.folder}: {problem}")
        return pieces[::2]

    def _render(self, turns: list[dict[str, str]], add_generation_prompt: bool) -> str:
        # By default it reads the clock. Chats of other dates share the environment, so it is set every time.
        self._environment.globals["strftime_now"] = self.tokenizer.date.strftime
        try:
            return self.tokenizer.hugging_face.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=add_generation_prompt, **self._arguments
            )
        except Exception as error:  # the template is external data and may fail in any way that Jinja can
            raise self._template_error(error) from None

    @property
    def _environment(self) -> Environment:
        """The Jinja environment in which transformers renders the template; transformers caches it."""
        from transformers.utils import chat_template_utils  # takes two seconds to import

        try:
            return chat_template_utils._compile_jinja_template(self._template).environment
        except Exception as error:  # the template is external data
            raise self._template_error(error) from None

    def _template_error(self, error: Exception) -> UserError:
        reason = " ".join(str(error).split()) or type(error).__name__
        return UserError(f"{self.folder}: the chat template fails ({reason})")

    def _read_template(self) -> str:
        """Return the source of the template, of several the one named `default`."""
        template = self.tokenizer.hugging_face.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        if not template:
            raise UserError(f"{self.folder}: the tokenizer has no chat template; add chat_template.jinja to the folder")
        return template

    def _check_arguments(self) -> None:
        """Raise a UserError for an argument that the template does not read, or that ThinkSafe sets."""
        for name in self._arguments:
            if name in {*inspect.signature(self.tokenizer.hugging_face.apply_chat_template).parameters, "messages"}:
                raise UserError(f"template_arguments.{name}: is not an argument for recipes; remove it")
            if name not in self._variables:
                own = ", ".join(sorted(self._variables - {"messages", "add_generation_prompt"})) or "no variable"
                raise UserError(
                    f"template_arguments.{name}: the chat template of {self.folder} does not read it; it reads {own}"
                )

    @cached_property
    def _variables(self) -> set[str]:
        """The names of the variables that the template reads and does not always set itself."""
        return meta.find_undeclared_variables(self._environment.parse(self._template))

    def _stop_ids(self) -> tuple[int, ...]:
        """Return the value of `stop_ids`; raise UserError if there is none or generation_config.json is damaged."""
        ids = {self.tokenizer.hugging_face.eos_token_id}
        generation_config = self.folder / "generation_config.json"
        if generation_config.exists():
            try:
                eos = json.loads(generation_config.read_text()).get("eos_token_id")
            except (ValueError, AttributeError) as error:
                raise UserError(f"{generation_config}: not valid JSON ({error})") from None
            eos = eos if isinstance(eos, list) else [eos]
            if not all(id_ is None or isinstance(id_, int) for id_ in eos):
                raise UserError(
                    f"{generation_config}: eos_token_id must be a token id or a list of token ids, found {eos!r}"
                )
            ids |= set(eos)
        ids |= {self.tokenizer.control_ids[token] for token in self.tokenizer.control_tokens_in(self._turn_end)[:1]}
        if not (ids := ids - {None}):
            raise UserError(f"{self.folder}: no end-of-turn token; set eos_token in tokenizer_config.json")
        return tuple(sorted(ids))
