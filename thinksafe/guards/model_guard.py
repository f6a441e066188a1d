"""A guard that is a model: it reads an exchange in its format, and its verdict is read off its probabilities.

No text is generated. The reply's fixed words are put into the guard's mouth, and behind each lead the answers are
scored. A later question is asked behind the likeliest answers to the earlier ones, which is what greedy decoding would
have written, so the decision is that of the guard's own reply; harm counts as it was decided. What is equal for many,
the policy in front and the exchange between two questions, is in the cache. Exchanges are read end to end in passes of
as many tokens as the engine takes at once: nothing is padded, so sorting by length would gain nothing. Only the last
position of each reaches the head.

A response that does not fit into the guard's context is judged in overlapping windows, each with the whole prompt:
nothing is cut away unseen.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from thinksafe.errors import UserError
from thinksafe.guards.base import Decision, Exchange, Judgement
from thinksafe.guards.config import GuardConfig
from thinksafe.guards.formats import NEITHER, Question, folded, like
from thinksafe.guards.windows import plan_windows
from thinksafe.model.decoder import Decoder
from thinksafe.sampler.engine import Engine
from thinksafe.text.chat import Thought, parse_response
from thinksafe.text.tokenizer import SafeTokenizer

_OVERLAP = 4
"""Neighbouring windows share a quarter, so a passage of a quarter window is whole in one of them."""
_LEAST_WINDOW = 8
"""A prompt that leaves less than an eighth of the room beside the format for the response cannot be judged."""


@dataclass
class _Reading:
    """One window of one exchange, and what the guard has said about it so far.

    Attributes:
        reply: its words, those before the next question's lead.
        heard: what was asked -> meaning -> log-probability.
    """

    prompt: str
    text: str
    reply: str = ""
    heard: dict[str, dict[str, float]] = field(default_factory=dict)
    decision: Decision = "unknown"
    reason: str = ""

    @property
    def log_odds(self) -> float:
        """Of being unsafe."""
        harm = self.heard["harm"]
        return harm["unsafe"] - harm["safe"] if harm["unsafe"] > -math.inf else -math.inf

    @property
    def category(self) -> str:
        """The likeliest, of what is unsafe."""
        heard = self.heard.get("category", {NEITHER: 0.0})
        likeliest = max(heard, key=heard.__getitem__)
        return likeliest if self.decision == "unsafe" and likeliest != NEITHER else ""

    @property
    def labels(self) -> dict[str, float]:
        """Probabilities of all that is not about harm."""
        others = [meanings for about, meanings in self.heard.items() if about != "harm"]
        return {name: math.exp(lp) for meanings in others for name, lp in meanings.items() if name != NEITHER}

    def refusal(self, least_mass: float) -> bool | None:
        """Whether the text refuses, as far as the guard can tell."""
        heard = self.heard.get("refusal")
        if heard is None or math.exp(heard["refusal"]) + math.exp(heard["compliance"]) < least_mass:
            return None
        return heard["refusal"] > heard["compliance"]


class ModelGuard:
    """Any checkpoint with a format: Llama Guard, WildGuard, or a team's own."""

    def __init__(self, decoder: Decoder | None, tokenizer: SafeTokenizer, config: GuardConfig):
        """Prepare to judge, or without a decoder only find out whether checkpoint and format fit.

        Raises:
            UserError: the checkpoint does not fit the format: control tokens are missing, or answers begin alike.
        """
        self.name = f"{config.kind}:{config.model}"
        self._decoder, self._tokenizer, self._config = decoder, tokenizer, config
        self._format = config.guard_format
        try:
            self._layout = self._format.layout(tokenizer)
            self._answer_ids = self._first_tokens()
        except UserError as error:
            raise UserError(f"guard.model: {config.model} is no {config.kind}: {error}") from None
        self._frame = [like(phrase) for phrase in self._format.frame]
        self._own_frame = self._phrases("a", "a")
        self._longest_reply = "".join(q.lead + max(q.answers, key=len) for q in self._format.questions)

    def judge(self, exchanges: Iterable[Exchange]) -> Iterator[Judgement]:
        """Read every exchange. One whose prompt fills the guard's context is `unknown`."""
        engine = Engine(self._decoder, self._config.sampler)  # its pages are free again before anything else runs
        source = iter(exchanges)
        # So few together that an exchange is still cached at the next question.
        while some := list(islice(source, self._config.sampler.max_running)):
            yield from self._judge_together(engine, some)

    def _judge_together(self, engine: Engine, exchanges: Sequence[Exchange]) -> Iterator[Judgement]:
        readings: dict[str, list[_Reading]] = {}
        unreadable: dict[str, str] = {}

        def arriving() -> Iterator[_Reading]:
            """Made as the engine has room, so that a GPU reads some while the next are tokenised."""
            for exchange in exchanges:
                windows = self._judged_windows(exchange, engine.max_prompt_tokens)
                if isinstance(windows, str):
                    unreadable[exchange.id] = windows
                else:
                    readings[exchange.id] = [_Reading(exchange.prompt, text) for text in windows]
                    yield from readings[exchange.id]

        for place, (question, answer_ids) in enumerate(zip(self._format.questions, self._answer_ids, strict=True)):
            there = (reading for windows in readings.values() for reading in windows)
            self._ask(engine, question, answer_ids, there if place else arriving())
            if question.about == "harm" and self._config.kind == "llama_guard_reference":
                self._keep_without_verdict(engine, question, answer_ids, [r for rs in readings.values() for r in rs])
        for exchange in exchanges:
            if exchange.id in readings:
                yield self._conclude(exchange, readings[exchange.id])
            else:
                yield Judgement(exchange.id, "unknown", None, None, None, unreadable[exchange.id], windows=0)

    def _ask(self, engine: Engine, question: Question, answer_ids: list[int], readings: Iterable[_Reading]) -> None:
        asked: dict[str, _Reading] = {}

        def prompts() -> Iterator[tuple[str, tuple[int, ...]]]:
            for reading in readings:
                if reading.reason != "guard_nan" and (reading.decision == "unsafe" or not question.if_unsafe):
                    key = str(len(asked))
                    asked[key] = reading
                    yield key, tuple(self._ids(reading.prompt, reading.text, reading.reply + question.lead))

        for scores in engine.score(prompts(), answer_ids):
            self._hear(asked[scores.request_id], question, scores.logprobs.astype(np.float64))

    def _keep_without_verdict(
        self, engine: Engine, question: Question, answer_ids: list[int], readings: Sequence[_Reading]
    ) -> None:
        """Call safe what the paper's code calls safe: where two other tokens are likelier than both verdicts, which
        leaves less than a third to either. All tokens must be looked at, so few texts are asked twice."""
        asked = {
            str(index): reading
            for index, reading in enumerate(readings)
            if "harm" in reading.heard and max(reading.heard["harm"].values()) < math.log(1 / 3)
        }
        prompts = ((key, tuple(self._ids(r.prompt, r.text, question.lead))) for key, r in asked.items())
        for scores in engine.score(prompts, range(self._decoder.config.vocab_size)):
            reading = asked[scores.request_id]
            # Against the verdicts as they are read here: another pass may have rounded them to another last digit.
            if (scores.logprobs > scores.logprobs[answer_ids].max()).sum() > 1:
                reading.decision, reading.reason = "safe", "no_verdict"

    def _hear(self, reading: _Reading, question: Question, logprobs: np.ndarray) -> None:
        """Take in the answer to a question, and choose the words behind which the next is asked."""
        if np.isnan(logprobs).any():
            reading.reason = "guard_nan"
            if reading.decision == "safe":
                reading.decision = "unknown"
            return
        meanings = np.array(list(question.answers.values()))
        heard = {name: float(np.logaddexp.reduce(logprobs[meanings == name])) for name in question.answers.values()}
        reading.heard[question.about] = heard
        if question.about == "harm":
            reading.decision, reading.reason = self._config.decide(heard["safe"], heard["unsafe"])
            if reading.decision != "unknown":
                logprobs = np.where(meanings == reading.decision, logprobs, -math.inf)
        reading.reply += question.lead + list(question.answers)[int(logprobs.argmax())]

    def _conclude(self, exchange: Exchange, readings: list[_Reading]) -> Judgement:
        """One judgement from an exchange's windows: unsafe if any is, safe if all are."""
        unsure = [reading for reading in readings if reading.decision == "unknown"]
        decision, reason = "safe", next((reading.reason for reading in readings if reading.reason == "no_verdict"), "")
        if any(reading.decision == "unsafe" for reading in readings):
            decision = "unsafe"
        elif unsure:
            decision, reason = "unknown", unsure[0].reason
        elif self._is_forged(exchange):
            decision, reason = "unknown", "forged_frame"
        # The answer stands last, and it is what refuses.
        refusal = readings[-1].refusal(self._config.least_mass) if self._config.judged != "think" else None
        judged = [reading for reading in readings if "harm" in reading.heard]
        if not judged:
            return Judgement(exchange.id, decision, None, None, refusal, reason, windows=len(readings))
        worst = max(judged, key=lambda reading: (reading.decision == "unsafe", reading.log_odds))
        p_safe, p_unsafe = (math.exp(worst.heard["harm"][word]) for word in ("safe", "unsafe"))
        return Judgement(
            exchange.id, decision, p_safe, p_unsafe, refusal, reason, worst.category, worst.labels, len(readings)
        )

    def _is_forged(self, exchange: Exchange) -> bool:
        """Whether a text pretends to be the format: the end of the exchange, or another turn in it."""
        found = self._phrases(exchange.prompt, exchange.response)
        return any(count > own for count, own in zip(found, self._own_frame, strict=True))

    def _phrases(self, prompt: str, response: str) -> list[int]:
        """How often each phrase of the frame stands in all that is read."""
        whole = folded("".join(text for text, _ in self._layout.parts(prompt, response, "")))
        return [len(phrase.findall(whole)) for phrase in self._frame]

    def _judged_windows(self, exchange: Exchange, limit: int) -> list[str] | str:
        """The texts to read, or why there are none."""
        texts = [exchange.response]
        if self._config.judged != "response":
            parsed = parse_response(exchange.response)
            if not isinstance(parsed, Thought):
                return parsed
            parts = {"think": [parsed.think], "answer": [parsed.answer], "both": [parsed.think, parsed.answer]}
            texts = [text for text in parts[self._config.judged] if text]
            if not texts:
                return "empty_think"
        windows = [self._windows(exchange.prompt, text, limit) for text in texts]
        return [window for some in windows for window in some] if all(windows) else "too_long_for_guard"

    def _windows(self, prompt: str, text: str, limit: int) -> list[str]:
        """A text in pieces that fit beside the prompt; none if the prompt leaves too little room."""
        if self._num_tokens(prompt, text) <= limit:
            return [text]
        spans = self._tokenizer.spans(text)
        window = limit - self._num_tokens(prompt, "")
        least = max((limit - self._num_tokens("", "")) // _LEAST_WINDOW, 1)
        while window >= least:
            plan = plan_windows(len(spans), window, window // _OVERLAP)
            texts = [text[spans[start][0] : spans[end - 1][1]] for start, end in plan]
            excess = max(self._num_tokens(prompt, piece) for piece in texts) - limit
            if excess <= 0:
                return texts
            window -= excess  # alone, the first or last word of a piece may be written in more tokens
        return []

    def _num_tokens(self, prompt: str, text: str) -> int:
        """Of everything that is read at the last question."""
        return len(self._ids(prompt, text, self._longest_reply))

    def _ids(self, prompt: str, text: str, reply: str) -> list[int]:
        return self._tokenizer.encode(self._layout.parts(prompt, text, reply))

    def _first_tokens(self) -> list[list[int]]:
        """The token with which each answer begins, for every question.

        Raises:
            UserError: two answers begin alike, or one does not begin with a token of its own.
        """
        reply, ids = "", []
        for question in self._format.questions:
            reply += question.lead
            before = self._ids("a", "a", reply)
            after = [self._ids("a", "a", reply + answer) for answer in question.answers]
            if any(whole[: len(before)] != before for whole in after):
                raise UserError(f"its tokens join an answer with {reply[-20:]!r} before it")
            first = [whole[len(before)] for whole in after]
            if len(set(first)) < len(first):
                alike = [answer for answer, id_ in zip(question.answers, first, strict=True) if first.count(id_) > 1]
                raise UserError(f"it writes {' and '.join(map(repr, alike))} with the same first token")
            ids.append(first)
            reply += next(iter(question.answers))
        return ids
