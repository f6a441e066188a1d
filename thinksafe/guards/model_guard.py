"""A guard that is a language model: it reads a pair in its format, and its token probabilities give the decision.

No text is generated. The fixed words of the reply are appended to the prompt, and the answers are scored after each
prefix. A later question follows the likeliest answers to the earlier questions, as greedy decoding would write them, so
the decision is that of the guard's own reply. After the question about harm, the reply continues with the verdict that
the recipe's rule decided.

Text that many prompts share comes from the prefix cache: the policy at the beginning, and the pair from one question to
the next. The engine packs prompts without padding into passes of `max_prefill_tokens` tokens, so sorting by length
would gain nothing. Only the last position of each prompt reaches the LM head.

A response that does not fit into the guard's context is judged in overlapping windows, each with the whole prompt, so
no part of it stays unread.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice

import numpy as np

from thinksafe.errors import UserError
from thinksafe.guards.base import Decision, GuardResult, PromptResponse
from thinksafe.guards.config import GuardConfig
from thinksafe.guards.formats import NEITHER, Question, delimiter_pattern, normalize_for_matching
from thinksafe.guards.windows import plan_windows
from thinksafe.model.decoder import Decoder
from thinksafe.sampler.engine import Engine
from thinksafe.text.chat import ParsedResponse, parse_response
from thinksafe.text.tokenizer import SafeTokenizer

_OVERLAP_DIVISOR = 4
"""Neighboring windows share 1/4 of a window, so a passage of that length lies whole in one of them."""
_MIN_WINDOW_DIVISOR = 8
"""A pair is not judged if its prompt leaves less than 1/8 of the context that the format leaves free."""


@dataclass
class _Window:
    """One window of one pair, and the guard's answers about it so far.

    Attributes:
        reply: the guard's reply so far, up to the next question's `answer_prefix`.
        answers: topic -> meaning -> log-probability.
    """

    prompt: str
    text: str
    reply: str = ""
    answers: dict[str, dict[str, float]] = field(default_factory=dict)
    decision: Decision = "unknown"
    reason: str = ""

    @property
    def log_odds(self) -> float:
        """Log-odds of unsafe against safe; -inf if P(unsafe) is 0."""
        harm = self.answers["harm"]
        return harm["unsafe"] - harm["safe"] if harm["unsafe"] > -math.inf else -math.inf

    @property
    def category(self) -> str:
        """Likeliest category of an unsafe window; else empty."""
        categories = self.answers.get("category", {NEITHER: 0.0})
        likeliest = max(categories, key=categories.__getitem__)
        return likeliest if self.decision == "unsafe" and likeliest != NEITHER else ""

    @property
    def labels(self) -> dict[str, float]:
        """Probabilities of the answers to all questions except harm, by meaning."""
        others = [meanings for topic, meanings in self.answers.items() if topic != "harm"]
        return {name: math.exp(lp) for meanings in others for name, lp in meanings.items() if name != NEITHER}

    def refusal(self, verdict_floor: float) -> bool | None:
        """Return whether the text refuses; None without an answer, or if both answers have too little probability."""
        logprobs = self.answers.get("refusal")
        if logprobs is None or math.exp(logprobs["refusal"]) + math.exp(logprobs["compliance"]) < verdict_floor:
            return None
        return logprobs["refusal"] > logprobs["compliance"]


class ModelGuard:
    """Any checkpoint with a format: Llama Guard, WildGuard, Qwen3Guard, or a team's own guard."""

    def __init__(self, decoder: Decoder | None, tokenizer: SafeTokenizer, config: GuardConfig):
        """Prepare the guard; without a decoder, only check that the checkpoint fits the format.

        Raises:
            UserError: the checkpoint does not fit the format: it lacks control tokens, its chat template does not show
                every message once, or its tokenizer cannot tell two answers apart by their first tokens.
        """
        self.name = f"{config.kind}:{config.model}"
        self._decoder, self._tokenizer, self._config = decoder, tokenizer, config
        self.format = config.guard_format
        try:
            self._layout = self.format.layout(tokenizer)
            self.answer_ids = self._first_answer_token_ids()
        except UserError as error:
            raise UserError(
                f"guard.model: {config.model} does not fit guard.kind {config.kind}: {error}; "
                "use another model, kind or format"
            ) from None
        self._delimiters = [delimiter_pattern(phrase) for phrase in self.format.delimiters]
        self.template_delimiter_counts = self._count_delimiters("a", "a")
        self._longest_reply = "".join(q.answer_prefix + max(q.answers, key=len) for q in self.format.questions)

    def judge(self, pairs: Iterable[PromptResponse]) -> Iterator[GuardResult]:
        """Yield one result for each pair, in order; `unknown` if the prompt leaves too little room for the response."""
        engine = Engine(self._decoder, self._config.sampler)  # a local, so its pages are freed before other stages run
        source = iter(pairs)
        # The batch is small enough that its pairs are still in the prefix cache at the next question.
        while batch := list(islice(source, self._config.sampler.max_num_seqs)):
            yield from self._judge_batch(engine, batch)

    def _judge_batch(self, engine: Engine, pairs: Sequence[PromptResponse]) -> Iterator[GuardResult]:
        windows_of: dict[str, list[_Window]] = {}
        unreadable: dict[str, str] = {}

        def new_windows() -> Iterator[_Window]:
            """Yield windows as the engine has room, so that the GPU reads some while the next are tokenized."""
            for pair in pairs:
                texts = self._window_texts(pair, engine.max_prompt_tokens)
                if isinstance(texts, str):
                    unreadable[pair.id] = texts
                else:
                    windows_of[pair.id] = [_Window(pair.prompt, text) for text in texts]
                    yield from windows_of[pair.id]

        for index, (question, answer_ids) in enumerate(zip(self.format.questions, self.answer_ids, strict=True)):
            known_windows = (window for windows in windows_of.values() for window in windows)
            self._score_question(engine, question, answer_ids, known_windows if index else new_windows())
            if question.topic == "harm" and self._config.kind == "llama_guard_reference":
                self._apply_reference_rule(engine, question, answer_ids, list(chain(*windows_of.values())))
        for pair in pairs:
            if pair.id in windows_of:
                yield self._combine_windows(pair, windows_of[pair.id])
            else:
                yield GuardResult(pair.id, "unknown", None, None, None, unreadable[pair.id], windows=0)

    def _score_question(
        self, engine: Engine, question: Question, answer_ids: list[int], windows: Iterable[_Window]
    ) -> None:
        window_of_key: dict[str, _Window] = {}

        def prompts() -> Iterator[tuple[str, tuple[int, ...]]]:
            for window in windows:
                if window.reason != "guard_nan" and (window.decision == "unsafe" or not question.only_if_unsafe):
                    key = str(len(window_of_key))
                    window_of_key[key] = window
                    yield key, tuple(self.token_ids(window.prompt, window.text, window.reply + question.answer_prefix))

        for scores in engine.score(prompts(), answer_ids):
            self._record_answer(window_of_key[scores.request_id], question, scores.logprobs.astype(np.float64))

    def _apply_reference_rule(
        self, engine: Engine, question: Question, answer_ids: list[int], windows: Sequence[_Window]
    ) -> None:
        """Call a window safe, as the paper's code does, if two other tokens are likelier than both verdicts.

        Each verdict then has less than 1/3 of the probability, so only those windows are read again, over the whole
        vocabulary.
        """
        candidates = {
            str(index): window
            for index, window in enumerate(windows)
            if "harm" in window.answers and max(window.answers["harm"].values()) < math.log(1 / 3)
        }
        prompts = (
            (key, tuple(self.token_ids(window.prompt, window.text, question.answer_prefix)))
            for key, window in candidates.items()
        )
        for scores in engine.score(prompts, range(self._decoder.config.vocab_size)):
            window = candidates[scores.request_id]
            # Compare with the verdicts of the same pass: those of the first pass may have other rounding errors.
            if (scores.logprobs > scores.logprobs[answer_ids].max()).sum() > 1:
                window.decision, window.reason = "safe", "no_verdict"

    def _record_answer(self, window: _Window, question: Question, logprobs: np.ndarray) -> None:
        """Store the answer to a question, and extend the reply by the words that precede the next question."""
        if np.isnan(logprobs).any():
            window.reason = "guard_nan"
            if window.decision == "safe":
                window.decision = "unknown"
            return
        meanings = np.array(list(question.answers.values()))
        by_meaning = {
            meaning: float(np.logaddexp.reduce(logprobs[meanings == meaning])) for meaning in question.answers.values()
        }
        window.answers[question.topic] = by_meaning
        if question.topic == "harm":
            window.decision, window.reason = self._config.decide(by_meaning["safe"], by_meaning["unsafe"])
            if window.decision != "unknown":
                logprobs = np.where(meanings == window.decision, logprobs, -math.inf)
        window.reply += question.answer_prefix + list(question.answers)[int(logprobs.argmax())]

    def _combine_windows(self, pair: PromptResponse, windows: list[_Window]) -> GuardResult:
        """Return one result from a pair's windows: unsafe if any window is unsafe, safe if all are safe."""
        undecided = [window for window in windows if window.decision == "unknown"]
        decision, reason = "safe", next((window.reason for window in windows if window.reason == "no_verdict"), "")
        if any(window.decision == "unsafe" for window in windows):
            decision = "unsafe"
        elif undecided:
            decision, reason = "unknown", undecided[0].reason
        elif self.injects_delimiter(pair):
            decision, reason = "unknown", "delimiter_injection"
        # The last window ends with the answer, and the answer is what refuses.
        refusal = windows[-1].refusal(self._config.verdict_floor) if self._config.scope != "think" else None
        judged = [window for window in windows if "harm" in window.answers]
        if not judged:
            return GuardResult(pair.id, decision, None, None, refusal, reason, windows=len(windows))
        worst = max(judged, key=lambda window: (window.decision == "unsafe", window.log_odds))
        p_safe, p_unsafe = (math.exp(worst.answers["harm"][verdict]) for verdict in ("safe", "unsafe"))
        return GuardResult(
            pair.id, decision, p_safe, p_unsafe, refusal, reason, worst.category, worst.labels, len(windows)
        )

    def injects_delimiter(self, pair: PromptResponse) -> bool:
        """Return whether prompt or response adds a delimiter of the format: an end of the pair, or another turn."""
        counts = self._count_delimiters(pair.prompt, pair.response)
        return any(
            count > template_count for count, template_count in zip(counts, self.template_delimiter_counts, strict=True)
        )

    def _count_delimiters(self, prompt: str, response: str) -> list[int]:
        """Return how often each delimiter occurs in everything that the guard reads."""
        text = normalize_for_matching("".join(part for part, _ in self._layout.parts(prompt, response, "")))
        return [len(pattern.findall(text)) for pattern in self._delimiters]

    def _window_texts(self, pair: PromptResponse, limit: int) -> list[str] | str:
        """Return the texts to read, or the reason why the pair cannot be judged."""
        texts = [pair.response]
        if self._config.scope != "response":
            parsed = parse_response(pair.response)
            if not isinstance(parsed, ParsedResponse):
                return parsed
            parts = {"think": [parsed.think], "answer": [parsed.answer], "both": [parsed.think, parsed.answer]}
            texts = [text for text in parts[self._config.scope] if text]
            if not texts:
                return "empty_think"
        windows = [self.split_into_windows(pair.prompt, text, limit) for text in texts]
        return list(chain(*windows)) if all(windows) else "too_long_for_guard"

    def split_into_windows(self, prompt: str, text: str, limit: int) -> list[str]:
        """Return a text in pieces that fit beside the prompt; no piece if the prompt leaves too little room."""
        if self.num_tokens(prompt, text) <= limit:
            return [text]
        spans = self._tokenizer.spans(text)
        window = limit - self.num_tokens(prompt, "")
        min_window = max((limit - self.num_tokens("", "")) // _MIN_WINDOW_DIVISOR, 1)
        while window >= min_window:
            plan = plan_windows(len(spans), window, window // _OVERLAP_DIVISOR)
            texts = [text[spans[start][0] : spans[end - 1][1]] for start, end in plan]
            excess = max(self.num_tokens(prompt, piece) for piece in texts) - limit
            if excess <= 0:
                return texts
            window -= excess  # the first or last word of a piece may need more tokens there
        return []

    def num_tokens(self, prompt: str, text: str) -> int:
        """Return the number of tokens that the guard reads, with the longest reply."""
        return len(self.token_ids(prompt, text, self._longest_reply))

    def token_ids(self, prompt: str, text: str, reply: str) -> list[int]:
        return self._tokenizer.encode(self._layout.parts(prompt, text, reply))

    def _first_answer_token_ids(self) -> list[list[int]]:
        """Return, for every question, the first token id of each answer.

        Raises:
            UserError: two answers begin with the same token, or the tokenizer merges an answer with the text before it.
        """
        reply, first_ids_of_questions = "", []
        for question in self.format.questions:
            reply += question.answer_prefix
            context = self.token_ids("a", "a", reply)
            with_answer = [self.token_ids("a", "a", reply + answer) for answer in question.answers]
            if any(ids[: len(context)] != context for ids in with_answer):
                raise UserError(f"the tokenizer merges an answer with {reply[-20:]!r} before it")
            first_ids = [ids[len(context)] for ids in with_answer]
            if len(set(first_ids)) < len(first_ids):
                ambiguous = [
                    answer for answer, id_ in zip(question.answers, first_ids, strict=True) if first_ids.count(id_) > 1
                ]
                raise UserError(f"the answers {' and '.join(map(repr, ambiguous))} begin with the same token")
            first_ids_of_questions.append(first_ids)
            reply += next(iter(question.answers))
        return first_ids_of_questions
