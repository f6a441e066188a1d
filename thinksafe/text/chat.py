"""Prompts and responses as the model's own chat template writes them.

A response's canonical text is `<think>\\n...\\n</think>\\n\\n...`, for models that write the opening tag (Qwen3) and
for those whose template supplies it (R1-Distill) alike. Training ids are assembled from prompt, response and turn end;
an assistant turn is never rendered through the template, since templates drop parts of past thoughts.
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


@dataclass(frozen=True)
class Thought:
    """A response taken apart, without tags and outer white space."""

    think: str
    answer: str


def parse_response(text: str) -> Thought | FormatProblem:
    """Take a response apart, or say what is wrong with it. It must be one closed think block, then an answer."""
    opens, closes = text.count(THINK_OPEN), text.count(THINK_CLOSE)
    if opens == 0 or closes == 0:
        return "no_think_block"
    if opens > 1 or closes > 1 or not text.lstrip().startswith(THINK_OPEN):
        return "nested_think"
    think, answer = text.split(THINK_OPEN, 1)[1].split(THINK_CLOSE, 1)
    return Thought(think.strip(), answer.strip()) if answer.strip() else "empty_answer"


class Chat:
    """One model's tokenizer and template.

    Attributes:
        stop_ids: tokens that end the model's turn.
        user_turn: what stands before a user's message and after it, up to where the model's turn begins.
        supplies_think: the prompt already ends with an open think block.
    """

    def __init__(self, folder: Path):
        """Read the tokenizer and template of a checkpoint folder.

        Raises:
            UserError: no fast tokenizer there, no chat template, or one that does not show the user's message.
        """
        self.tokenizer = SafeTokenizer(folder)
        self.folder = folder
        if not self.tokenizer.hugging_face.chat_template:
            raise UserError(f"{folder}: the tokenizer has no chat template; add chat_template.jinja to the folder")
        head, tail = self._around(["user"], "the chat template does not show a user's message exactly once")
        if "<｜Assistant｜>" in tail and THINK_OPEN not in tail:
            tail += f"{THINK_OPEN}\n"  # early R1-Distill templates leave out what the model expects
        self.user_turn = head, tail
        self.supplies_think = tail.rstrip().endswith(THINK_OPEN)
        self.stop_ids = self._stop_ids()

    def prompt_ids(self, user_text: str) -> list[int]:
        """Ids up to where the model's turn begins."""
        text = user_text.strip() if self.template_strips else user_text
        head, tail = self.user_turn
        return self.tokenizer.encode([(head, True), (text, False), (tail, True)])

    def two_turns(self) -> list[str]:
        """What the template writes before a user's message, between it and the assistant's, and after, up to where
        the model's turn begins: how a guard whose template holds its policy is asked.

        Raises:
            UserError: the template does not show both.
        """
        return self._around(["user", "assistant"], "the chat template does not show a user's turn and its answer")

    def response_ids(self, text: str) -> list[int]:
        """Ids of a canonical response as the model would have to write it after `prompt_ids`, turn end included.

        Raises:
            ValueError: the text is not canonical; `parse_response` says why.
        """
        parsed = parse_response(text)
        if not isinstance(parsed, Thought):
            raise ValueError(parsed)
        opening = "" if self.supplies_think else f"{THINK_OPEN}\n"
        closing = f"\n{THINK_CLOSE}\n\n"
        return self.tokenizer.encode(
            [(opening, True), (parsed.think, False), (closing, True), (parsed.answer, False), (self._turn_end, True)]
        )

    def decode(self, ids: list[int] | tuple[int, ...]) -> str:
        """A sampled response as text in canonical order; control tokens that the model wrote are spelled out."""
        text = self.tokenizer.decode(ids)
        return f"{THINK_OPEN}\n{text}" if self.supplies_think else text

    def has_control_token(self, text: str) -> bool:
        """Whether a response holds a control token other than the think tags."""
        return any(token not in (THINK_OPEN, THINK_CLOSE) for token in self.tokenizer.control_tokens_in(text))

    @cached_property
    def template_strips(self) -> bool:
        """Whether outer white space of a message is left out."""
        marker = secrets.token_hex(8)
        return f" {marker} " not in self._render([{"role": "user", "content": f" {marker} "}], True)

    @cached_property
    def _turn_end(self) -> str:
        """What the template writes after an assistant turn: `<|im_end|>\\n`, `</s>`, ... At least the EOS token."""
        marker = secrets.token_hex(8)
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": marker}]
        end = self._render(turns, False).rpartition(marker)[2]
        return end if self.tokenizer.control_tokens_in(end) else self.tokenizer.hugging_face.eos_token or ""

    def _around(self, roles: list[str], problem: str) -> list[str]:
        """The template's text around one message of each role, in order."""
        markers = [secrets.token_hex(8) for _ in roles]
        turns = [{"role": role, "content": marker} for role, marker in zip(roles, markers, strict=True)]
        found = re.split(f"({'|'.join(markers)})", self._render(turns, True))
        if found[1::2] != markers:
            raise UserError(f"{self.folder}: {problem}")
        return found[::2]

    def _render(self, turns: list[dict[str, str]], add_generation_prompt: bool) -> str:
        try:
            return self.tokenizer.hugging_face.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # the template is data from outside and may fail in any way Jinja can
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{self.folder}: the chat template fails ({reason})") from None

    def _stop_ids(self) -> tuple[int, ...]:
        ids = {self.tokenizer.hugging_face.eos_token_id}
        generation_config = self.folder / "generation_config.json"
        if generation_config.exists():
            try:
                eos = json.loads(generation_config.read_text()).get("eos_token_id")
            except (ValueError, AttributeError) as error:
                raise UserError(f"{generation_config}: not valid JSON ({error})") from None
            eos = eos if isinstance(eos, list) else [eos]
            if not all(id_ is None or isinstance(id_, int) for id_ in eos):
                raise UserError(f"{generation_config}: eos_token_id must be one token id or several, found {eos!r}")
            ids |= set(eos)
        ids |= {self.tokenizer.control_ids[token] for token in self.tokenizer.control_tokens_in(self._turn_end)[:1]}
        ids.discard(None)
        if not ids:
            raise UserError(f"{self.folder}: no end-of-turn token; set eos_token in tokenizer_config.json")
        return tuple(sorted(ids))
