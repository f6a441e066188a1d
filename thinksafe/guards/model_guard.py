"""A guard that is a language model: it reads a pair in its format, and its token probabilities give the decision.

No text is generated. The fixed words of the reply are appended to the prompt, and the answers are scored after each
prefix. A later question follows the likeliest answers to the earlier ones, as greedy decoding would write them; after
the question about harm, the reply continues with the verdict that the recipe's rule decided.

Text that many prompts share comes from the prefix cache: the policy at the beginning, and the pair from one question to
the next. The engine packs prompts without padding, so sorting by length would gain nothing. A response that does not
fit into the guard's context is judged in overlapping windows, each with the whole prompt, so no part stays unread.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice

import numpy as np

from thinksafe.data.records import Response, Verdict
from thinksafe.errors import UserError
from thinksafe.guards.base import Decision
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
"""A response is not judged if its prompt leaves less than 1/8 of the context that the format leaves free."""


@dataclass
class Window:
    """A part of a response that the guard reads at once, and what the guard has answered about it so far.

    Attributes:
        text: None if the guard cannot read the response; `reason` then says why.
        reply: the guard's reply so far, without the next question's `answer_prefix`.
        harm: verdict -> natural log-probability; None until the question about harm is answered.
        labels: meaning -> probability of the answers to the other questions.
        category, refusal: likeliest category of harm, and whether the response refuses, as in `Verdict`.
        decision: decision of `GuardConfig.decide` on the window.
        reason: why the decision is `unknown`; `guard_nan` if any answer was NaN; else empty.
    """

    text: str | None
    reply: str = ""
    harm: dict[str, float] | None = None
    labels: dict[str, float] = field(default_factory=dict)
    category: str = ""
    refusal: bool | None = None
    decision: Decision = "unknown"
    reason: str = ""

    def needs(self, question: Question) -> bool:
        """Return whether the question must be asked: the window is readable, and earlier answers allow it."""
        is_open = self.text is not None and self.reason != "guard_nan"
        return is_open and (self.decision == "unsafe" or not question.only_if_unsafe)

    @property
    def severity(self) -> tuple[bool, float]:
        """(whether the window is unsafe, log-odds of unsafe) once `harm` is known; -inf if P(unsafe) is 0."""
        safe, unsafe = self.harm["safe"], self.harm["unsafe"]
        return self.decision == "unsafe", unsafe - safe if unsafe > -math.inf else -math.inf


@dataclass
class Case:
    """A response under judgement. Its windows are made by `split` when the engine asks for their tokens, so the GPU
    reads some responses while others are tokenized."""

    response: Response
    split: Callable[[Response], list[Window]]

    @cached_property
    def windows(self) -> list[Window]:
        """The windows, at least one."""
        return self.split(self.response)


class ModelGuard:
    """A guard that is one language model: Llama Guard, WildGuard, Qwen3Guard, or another model with a `format`.

    Attributes:
        name: `kind:model`.
        answer_ids: first token id of each answer, one list for each question.
        template_delimiter_counts: how often each delimiter of the format occurs around a pair that contains none.
    """

    def __init__(self, decoder: Decoder | None, tokenizer: SafeTokenizer, config: GuardConfig):
        """Prepare the guard, and check that the tokenizer fits the format.

        Args:
            decoder: the guard model; None if the guard is only checked, then `judge` must not be called.
            config: the guard section of a recipe, of a kind that is one model.

        Raises:
            UserError: the checkpoint does not fit the format: it lacks control tokens, its chat template does not show
                every message once, or its tokenizer cannot tell two answers apart by their first tokens.
        """
        self.name = f"{config.kind}:{config.model}"
        self._decoder, self._config = decoder, config
        self.format = config.guard_format
        try:
            self._layout = self.format.layout(tokenizer)
            self._tokenizer = tokenizer.reserving(*(text for text, trusted in self._layout.pieces if trusted))
            self.answer_ids = self._first_answer_token_ids()
        except UserError as error:
            raise UserError(
                f"guard.model: {config.model} does not fit guard.kind {config.kind}: {error}; "
                "use another model, kind or format"
            ) from None
        self._longest_reply = "".join(q.answer_prefix + max(q.answers, key=len) for q in self.format.questions)
        self._delimiters = [delimiter_pattern(phrase) for phrase in self.format.delimiters]
        self.template_delimiter_counts = self._count_delimiters("a", "a")

    def judge(self, responses: Iterable[Response]) -> Iterator[Verdict]:
        """Yield one verdict for each response, in order.

        A response that the guard cannot read is `unknown` without probabilities: with the reason `too_long_for_guard`
        if the prompt leaves too little room for it, or, unless `scope` is `response`, a `FormatProblem` or
        `empty_think` if the part to judge is missing.
        """
        # A local, so its pages are freed before other stages run.
        engine = Engine(self._decoder, self._config.sampler, config_key="guard.sampler")
        source, split = iter(responses), partial(self._windows, limit=engine.max_prompt_tokens)
        # The batch is small enough that its responses are still in the prefix cache at the next question.
        while batch := list(islice(source, self._config.sampler.max_num_seqs)):
            cases = [Case(response, split) for response in batch]
            for question, answer_ids in zip(self.format.questions, self.answer_ids, strict=True):
                self._ask(engine, question, answer_ids, cases)
            yield from map(self._combine, cases)

    def _ask(self, engine: Engine, question: Question, answer_ids: Sequence[int], cases: Sequence[Case]) -> None:
        """Ask one question about each window that needs it, and store the answers.

        Args:
            answer_ids: first token id of each answer.
        """
        prompts = (
            (f"{i}/{j}", self._prompt_ids(case, window, window.reply + question.answer_prefix))
            for i, case in enumerate(cases)
            for j, window in enumerate(case.windows)
            if window.needs(question)
        )
        for scores in engine.score(prompts, answer_ids):
            i, j = map(int, scores.request_id.split("/"))
            self._record_answer(cases[i].windows[j], question, scores.logprobs.astype(np.float64))

    def _record_answer(self, window: Window, question: Question, logprobs: np.ndarray) -> None:
        """Store a window's answer, given as fp64 log-probabilities [number of answers], and extend its reply by it.

        A NaN is stored as the reason `guard_nan`: a safe window becomes `unknown`, an unsafe one stays unsafe.
        """
        if np.isnan(logprobs).any():
            window.reason = "guard_nan"
            if window.decision == "safe":
                window.decision = "unknown"
            return
        meanings, words = np.array(list(question.answers.values())), list(question.answers)
        by_meaning = {
            meaning: float(np.logaddexp.reduce(logprobs[meanings == meaning])) for meaning in meanings.tolist()
        }
        if question.topic == "harm":
            window.harm = by_meaning
            window.decision, window.reason = self._config.decide(by_meaning["safe"], by_meaning["unsafe"])
            if window.decision != "unknown":
                logprobs = np.where(meanings == window.decision, logprobs, -math.inf)
        else:
            probabilities = {meaning: math.exp(lp) for meaning, lp in by_meaning.items() if meaning != NEITHER}
            window.labels |= probabilities
            if question.topic == "refusal" and sum(probabilities.values()) >= self._config.least_verdict_probability:
                window.refusal = by_meaning["refusal"] > by_meaning["compliance"]
            if question.topic == "category":
                likeliest = max(by_meaning, key=by_meaning.__getitem__)
                window.category = likeliest if likeliest != NEITHER else ""
        window.reply += question.answer_prefix + words[int(logprobs.argmax())]

    def _combine(self, case: Case) -> Verdict:
        """Return the verdict from a response's windows: unsafe if any window is unsafe, else unknown if any is unknown
        or the pair contains a delimiter, else safe."""
        windows = case.windows
        decision, reason = "safe", ""
        if any(window.decision == "unsafe" for window in windows):
            decision = "unsafe"
        elif undecided := [window for window in windows if window.decision == "unknown"]:
            decision, reason = "unknown", undecided[0].reason
        elif self.injects_delimiter(case.response):
            decision, reason = "unknown", "delimiter_injection"
        fields = {"windows": sum(window.text is not None for window in windows)}
        if self._config.scope != "think":  # the last window ends with the answer, and the answer is what refuses
            fields["refusal"] = windows[-1].refusal
        if judged := [window for window in windows if window.harm]:
            worst = max(judged, key=lambda window: window.severity)
            fields |= {f"p_{verdict}": math.exp(worst.harm[verdict]) for verdict in ("safe", "unsafe")}
            fields |= {"labels": worst.labels, "category": worst.category if decision == "unsafe" else ""}
        return Verdict.of(case.response, self.name, decision, reason, **fields)

    def injects_delimiter(self, response: Response) -> bool:
        """Return whether a delimiter of the format occurs more often with this pair than in the format's own text.

        If so, the pair may pretend to the guard that it has ended or that another turn follows.
        """
        counts = self._count_delimiters(response.prompt, response.text)
        return any(count > expected for count, expected in zip(counts, self.template_delimiter_counts, strict=True))

    def _count_delimiters(self, prompt: str, text: str) -> list[int]:
        """Return how often each delimiter of the format occurs in the layout with this prompt and response."""
        layout_text = normalize_for_matching("".join(part for part, _ in self._layout.parts(prompt, text, "")))
        return [len(pattern.findall(layout_text)) for pattern in self._delimiters]

    def _windows(self, response: Response, limit: int) -> list[Window]:
        """Return a response's windows, at least one.

        Args:
            limit: largest number of tokens that the guard can read at once.
        """
        texts = [response.text]
        if self._config.scope != "response":
            parsed = parse_response(response.text)
            if not isinstance(parsed, ParsedResponse):
                return [Window(None, reason=parsed)]
            parts = {"think": [parsed.think], "answer": [parsed.answer], "both": [parsed.think, parsed.answer]}
            texts = [text for text in parts[self._config.scope] if text]
            if not texts:
                return [Window(None, reason="empty_think")]
        pieces_of_texts = [self.split_into_windows(response.prompt, text, limit) for text in texts]
        if not all(pieces_of_texts):
            return [Window(None, reason="too_long_for_guard")]
        return [Window(piece) for pieces in pieces_of_texts for piece in pieces]

    def split_into_windows(self, prompt: str, text: str, limit: int) -> list[str]:
        """Return a text in overlapping pieces that fit beside the prompt: the whole text as one piece if it fits.

        Neighboring pieces share about 1/4 of their tokens. The list is empty if the prompt leaves less than 1/8 of the
        tokens that the format leaves free. `limit` is as in `_windows`, and includes the longest reply.
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

    def _prompt_ids(self, case: Case, window: Window, reply: str) -> tuple[int, ...]:
        return tuple(self.token_ids(case.response.prompt, window.text, reply))

    def _first_answer_token_ids(self) -> list[list[int]]:
        """Return one list for each question: the first token id of each answer, in the order of the answers."""
        reply, first_ids_of_questions = "", []
        for question in self.format.questions:
            reply += question.answer_prefix
            context = self.token_ids("a", "a", reply)
            with_answer = [self.token_ids("a", "a", reply + answer) for answer in question.answers]
            if any(ids[: len(context)] != context for ids in with_answer):
                raise UserError(f"the tokenizer merges an answer with {reply[-20:]!r} before it")
            first_ids = [ids[len(context)] for ids in with_answer]
            ambiguous = [
                repr(word) for word, id_ in zip(question.answers, first_ids, strict=True) if first_ids.count(id_) > 1
            ]
            if ambiguous:
                raise UserError(f"the answers {' and '.join(ambiguous)} begin with the same token")
            first_ids_of_questions.append(first_ids)
            reply += next(iter(question.answers))
        return first_ids_of_questions
