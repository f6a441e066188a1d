"""Is the final answer right? Judged on the text after the think block alone."""

import re
from typing import Literal

from thinksafe.text.chat import Thought, parse_response

AnswerKind = Literal["phrase", "choice", "math"]

_PHRASE = re.compile(r"answer is:?\s*((?:(?!answer is).)+?)\s*\.?\s*$", re.IGNORECASE | re.MULTILINE)
_BOXED_CHOICE = re.compile(r"\\boxed\{\s*(?:\\text\{)?\(?([A-Z])\)?\}?\s*\}")
_CHOICE = re.compile(r"\b([A-Z])\b")


def is_correct(response: str, gold: str, kind: AnswerKind) -> bool:
    """Compare a response's final answer with the expected one. A response without an answer is wrong.

    Args:
        response: canonical text, think block included.
        gold: the expected answer.
        kind: `phrase` compares what follows the last "answer is" word for word; `choice` the letter, boxed or the
            last one standing alone; `math` asks math-verify whether the two are equal as mathematics.
    """
    parsed = parse_response(response)
    if not isinstance(parsed, Thought):
        return False
    if kind == "phrase":
        said = _PHRASE.findall(parsed.answer)
        return bool(said) and said[-1].split() == gold.split()
    if kind == "choice":
        letters = _BOXED_CHOICE.findall(parsed.answer) or _CHOICE.findall(parsed.answer)
        return bool(letters) and letters[-1] == gold.strip()
    import math_verify

    expected = math_verify.parse(gold if "\\" in gold or "$" in gold else f"${gold}$")
    return math_verify.verify(expected, math_verify.parse(parsed.answer))
