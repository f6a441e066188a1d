"""Prompts and responses in the format of a model's chat template.

The canonical text of a response is `<think>\\n...\\n</think>\\n\\n...`, both for models that write the opening tag
(Qwen3) and for models whose template supplies it (R1-Distill). Training ids are assembled from prompt, response and end
of turn; an assistant turn is never rendered through the template, because templates drop parts of past thoughts.
"""

import json
import re
import secrets
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from thinksafe.errors import UserError
from thinksafe.text.tokenizer import SafeTokenizer

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"

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

    def __init__(self, folder: Path):
        """Read the tokenizer and template of a checkpoint folder.

        Raises:
            UserError: the folder has no fast tokenizer, no chat template or no stop id; the template fails or does not
                show the user's message exactly once; or generation_config.json is damaged.
        """
        self.tokenizer = SafeTokenizer(folder)
        self.folder = folder
        if not self.tokenizer.hugging_face.chat_template:
            raise UserError(f"{folder}: the tokenizer has no chat template; add chat_template.jinja to the folder")
        head, tail = self._text_around(["user"], "the chat template does not show a user's message exactly once")
        if "<｜Assistant｜>" in tail and THINK_OPEN not in tail:
            tail += f"{THINK_OPEN}\n"  # early R1-Distill templates omit the tag that the model expects
        self.user_turn = head, tail
        self.supplies_think = tail.rstrip().endswith(THINK_OPEN)
        self.stop_ids = self._stop_ids()

    def prompt_ids(self, user_text: str) -> list[int]:
        """Return the token ids of a user turn and of the opening of the model's turn, after which the model writes.
        A control token in `user_text` is encoded as ordinary characters."""
        text = user_text.strip() if self.template_strips else user_text
        head, tail = self.user_turn
        return self.tokenizer.encode([(head, True), (text, False), (tail, True)])

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
        parsed = parse_response(text)
        if not isinstance(parsed, ParsedResponse):
            raise ValueError(parsed)
        opening = "" if self.supplies_think else f"{THINK_OPEN}\n"
        closing = f"\n{THINK_CLOSE}\n\n"
        return self.tokenizer.encode(
            [(opening, True), (parsed.think, False), (closing, True), (parsed.answer, False), (self._turn_end, True)]
        )

    def decode(self, ids: list[int] | tuple[int, ...]) -> str:
        """Return the text of sampled ids in canonical form, with `<think>` and with control tokens spelled out."""
        text = self.tokenizer.decode(ids)
        return f"{THINK_OPEN}\n{text}" if self.supplies_think else text

    def has_control_token(self, text: str) -> bool:
        """Return whether a text spells out a control token of the model, other than `<think>` and `</think>`."""
        return any(token not in (THINK_OPEN, THINK_CLOSE) for token in self.tokenizer.control_tokens_in(text))

    @cached_property
    def template_strips(self) -> bool:
        """Whether the template strips outer white space from a user's message."""
        marker = secrets.token_hex(8)
        return f" {marker} " not in self._render([{"role": "user", "content": f" {marker} "}], True)

    @cached_property
    def _turn_end(self) -> str:
        """Template text after an assistant's message, such as `<|im_end|>\\n`; if that has no control token, the EOS
        token, or nothing if there is none."""
        marker = secrets.token_hex(8)
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": marker}]
        end = self._render(turns, False).rpartition(marker)[2]
        return end if self.tokenizer.control_tokens_in(end) else self.tokenizer.hugging_face.eos_token or ""

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
        try:
            return self.tokenizer.hugging_face.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # the template is external data and may fail in any way that Jinja can
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{self.folder}: the chat template fails ({reason})") from None

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
