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
        prompt: the pair's whole prompt.
        text: the part of the response in this window.
        reply: the guard's reply so far; the next question's `answer_prefix` is not yet part of it.
        answers: topic -> meaning -> natural log-probability, for each question with an answer that is not NaN.
        decision: decision of `GuardConfig.decide` on the window; `unknown` until the question about harm is answered.
        reason: why the decision is `unknown`; `guard_nan` if any answer was NaN; `no_verdict` if the reference rule
            made the decision safe; else empty.
    """

    prompt: str
    text: str
    reply: str = ""
    answers: dict[str, dict[str, float]] = field(default_factory=dict)
    decision: Decision = "unknown"
    reason: str = ""

    @property
    def log_odds(self) -> float:
        """log P(unsafe) - log P(safe), once `answers` has harm; -inf if P(unsafe) is 0, even if P(safe) is 0 too."""
        harm = self.answers["harm"]
        return harm["unsafe"] - harm["safe"] if harm["unsafe"] > -math.inf else -math.inf

    @property
    def category(self) -> str:
        """Likeliest category of an unsafe window; empty if the window is not unsafe or no category is likeliest."""
        categories = self.answers.get("category", {NEITHER: 0.0})
        likeliest = max(categories, key=categories.__getitem__)
        return likeliest if self.decision == "unsafe" and likeliest != NEITHER else ""

    @property
    def labels(self) -> dict[str, float]:
        """Meaning -> probability of the answers to all questions except harm, without the meaning `neither`."""
        others = [meanings for topic, meanings in self.answers.items() if topic != "harm"]
        return {name: math.exp(lp) for meanings in others for name, lp in meanings.items() if name != NEITHER}

    def refusal(self, least_verdict_probability: float) -> bool | None:
        """Return whether P(refusal) > P(compliance); None without an answer or with too little probability.

        Args:
            least_verdict_probability: lowest P(refusal) + P(compliance) at which the answer counts.
        """
        logprobs = self.answers.get("refusal")
        if (
            logprobs is None
            or math.exp(logprobs["refusal"]) + math.exp(logprobs["compliance"]) < least_verdict_probability
        ):
            return None
        return logprobs["refusal"] > logprobs["compliance"]


class ModelGuard:
    """A guard that is one language model: Llama Guard, WildGuard, Qwen3Guard, or another model with a `format`.

    Attributes:
        name: `kind:model`.
        format: the guard's prompt and questions.
        answer_ids: first token id of each answer, one list for each question.
        template_delimiter_counts: how often each delimiter of the format occurs around a pair that contains none.
    """

    def __init__(self, decoder: Decoder | None, tokenizer: SafeTokenizer, config: GuardConfig):
        """Prepare the guard, and check that the tokenizer fits the format.

        Args:
            decoder: the guard model; None if the guard is only checked, then `judge` must not be called.
            tokenizer: tokenizer of the guard's checkpoint.
            config: the guard section of a recipe, of a kind that is one model.

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
        """Yield one result for each pair, in order.

        A pair that the guard cannot read is `unknown` without probabilities: with the reason `too_long_for_guard` if
        the prompt leaves too little room for the response. If `scope` is not `response`, also if the think block is
        malformed (a `FormatProblem`) or the judged part is empty (`empty_think`).
        """
        engine = Engine(self._decoder, self._config.sampler)  # a local, so its pages are freed before other stages run
        source = iter(pairs)
        # The batch is small enough that its pairs are still in the prefix cache at the next question.
        while batch := list(islice(source, self._config.sampler.max_num_seqs)):
            yield from self._judge_batch(engine, batch)

    def _judge_batch(self, engine: Engine, pairs: Sequence[PromptResponse]) -> Iterator[GuardResult]:
        """Yield one result for each pair of a batch, in order; each question is asked about all windows at once."""
        windows_of: dict[str, list[_Window]] = {}
        unreadable: dict[str, str] = {}

        def new_windows() -> Iterator[_Window]:
            """Record and yield the windows of all pairs, lazily: the GPU reads some while others are tokenized."""
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
        """Ask one question about each window and store the answers in the windows.

        Windows with an earlier NaN are left out, and so are windows that are not unsafe if the question is
        `only_if_unsafe`.

        Args:
            answer_ids: first token id of each answer.
        """
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
        """Set the decision to `safe` and the reason to `no_verdict`, as the paper's code does, in each window where at
        least two other tokens are likelier than both verdicts.

        Each verdict then has a probability below 1/3, so only windows where this holds are read again, over the whole
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
        """Store a window's answer to a question, and extend its reply by the answer.

        A NaN is stored as the reason `guard_nan`: a safe window becomes `unknown`, an unsafe one stays unsafe.

        Args:
            logprobs: [number of answers] fp64, natural log-probability of each answer's first token.
        """
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
        """Return one result from a pair's windows.

        The decision is unsafe if any window is unsafe, else unknown if any is unknown or the pair contains a delimiter,
        else safe.
        """
        undecided = [window for window in windows if window.decision == "unknown"]
        decision, reason = "safe", next((window.reason for window in windows if window.reason == "no_verdict"), "")
        if any(window.decision == "unsafe" for window in windows):
            decision, reason = "unsafe", ""
        elif undecided:
            decision, reason = "unknown", undecided[0].reason
        elif self.injects_delimiter(pair):
            decision, reason = "unknown", "delimiter_injection"
        # The last window ends with the answer, and the answer is what refuses.
        refusal = windows[-1].refusal(self._config.least_verdict_probability) if self._config.scope != "think" else None
        judged = [window for window in windows if "harm" in window.answers]
        if not judged:
            return GuardResult(pair.id, decision, None, None, refusal, reason, windows=len(windows))
        worst = max(judged, key=lambda window: (window.decision == "unsafe", window.log_odds))
        p_safe, p_unsafe = (math.exp(worst.answers["harm"][verdict]) for verdict in ("safe", "unsafe"))
        return GuardResult(
            pair.id, decision, p_safe, p_unsafe, refusal, reason, worst.category, worst.labels, len(windows)
        )

    def injects_delimiter(self, pair: PromptResponse) -> bool:
        """Return whether a delimiter of the format occurs more often with this pair than in the format's own text.

        If it does, the pair may pretend to the guard that it has ended or that another turn follows.
        """
        counts = self._count_delimiters(pair.prompt, pair.response)
        return any(
            count > template_count for count, template_count in zip(counts, self.template_delimiter_counts, strict=True)
        )

    def _count_delimiters(self, prompt: str, response: str) -> list[int]:
        """Return how often each delimiter of the format occurs in the layout with this prompt and response."""
        text = normalize_for_matching("".join(part for part, _ in self._layout.parts(prompt, response, "")))
        return [len(pattern.findall(text)) for pattern in self._delimiters]

    def _window_texts(self, pair: PromptResponse, limit: int) -> list[str] | str:
        """Return the texts of a pair's windows, at least one, or the reason why the pair cannot be judged.

        Args:
            limit: largest number of tokens that the guard can read at once.
        """
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
        """Return a text in overlapping pieces that fit beside the prompt: the whole text as one piece if it fits.

        Neighboring pieces share about 1/4 of their tokens. The list is empty if the prompt leaves less than 1/8 of the
        tokens that the format leaves free.

        Args:
            limit: largest number of tokens that the guard can read at once: format, prompt, piece and longest reply.
        """
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
        """Return the number of tokens that the guard reads for this prompt and text, with the longest reply."""
        return len(self.token_ids(prompt, text, self._longest_reply))

    def token_ids(self, prompt: str, text: str, reply: str) -> list[int]:
        """Return the token ids of everything that the guard reads: format, prompt, text, and its reply so far."""
        return self._tokenizer.encode(self._layout.parts(prompt, text, reply))

    def _first_answer_token_ids(self) -> list[list[int]]:
        """Return one list for each question: the first token id of each answer, in the order of the answers.

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
