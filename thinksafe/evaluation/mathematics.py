"""Comparison of mathematical answers. math-verify decides, after what it misreads has been rewritten.

Words, numbers with a base and times of day are no mathematics and are compared as text. Everything else is compared by
math-verify in a separate process: it can compute for hours on an answer such as 9^{9^{9^9}}, and its own time limit
needs the main thread and does not end one long operation. A comparison that takes more than 5 seconds of CPU time or
4 GiB is ended, and the answer counts as wrong.
"""

import json
import logging
import re
import resource
import signal
import subprocess
import sys
import threading
import unicodedata
from fractions import Fraction
from functools import lru_cache

from thinksafe.errors import UserError
from thinksafe.evaluation.choices import chosen_option
from thinksafe.evaluation.latex import last_box, unwrap_text

_TIME_LIMIT = 5  # seconds of CPU time
_MEMORY_LIMIT = 4 << 30  # bytes
_MAX_CHARS = 2000
"""Longest text that is parsed, of a longer answer the end; a parser's time can grow faster than the text."""


def is_equal(answer: str, gold: str) -> bool:
    """Return whether the final answer in a text equals the gold answer, both as mathematics in LaTeX or plain text.

    The final answer is the last \\boxed{}; else what follows the last "answer is" or "answer:"; else what math-verify
    finds last.
    """
    if letter := _OPTION_GOLD.fullmatch(gold.strip()):
        return chosen_option(answer) == letter[1]
    expected, (given, is_prose) = _normalized_gold(gold), _final_answer(answer)
    if not is_prose:
        given = normalized(given)
        if expected and _compact(given) == _compact(expected):
            return True
    if words := _text(expected):
        return words == _words(given)
    if _COMPARED_AS_TEXT.search(expected) or (not is_prose and _COMPARED_AS_TEXT.search(given)):
        return False
    return _MATH_VERIFY.is_equal(expected, given, is_prose)


def is_readable(gold: str) -> bool:
    """Return whether a gold answer is text, or mathematics that math-verify reads whole and finds equal to itself. Only
    an answer written in the same way equals an unreadable one."""
    if _OPTION_GOLD.fullmatch(gold.strip()):
        return True
    expected = _normalized_gold(gold)
    if len(re.findall(r"(?<![\\A-Za-z{])[A-Za-z]{3,}(?![A-Za-z}])", expected)) > 1 and not _text(expected):
        return False  # math-verify reads words as products of their letters
    is_whole_number = re.fullmatch(r"-?\d+", expected)
    return bool(is_whole_number or _text(expected) or _COMPARED_AS_TEXT.search(expected)) or _MATH_VERIFY.is_equal(
        expected, expected, False
    )


# The final answer

_STATED = re.compile(r"\banswers?\b[^.\n$\\\d]{0,60}?(?:\b(?:is|are)\b|[:=])", re.IGNORECASE)
_DELIMITED = re.compile(
    r"\\\[(?P<a>.+?)\\\]|\\\((?P<b>.+?)\\\)|\$\$(?P<c>.+?)\$\$|\$(?P<d>[^$\n]+)(?<!\\)\$|(?P<e>\[[^\]\n]*\])", re.DOTALL
)
_SENTENCE = re.compile(r"(?:(?![.!?;](?:\s|$)|,?\s(?:because|since|as|where|which)\b).)*")


def _final_answer(text: str) -> tuple[str, bool]:
    """Return the text's final answer, and whether it is prose in which math-verify has to find the mathematics."""
    if (box := last_box(text)) is not None:
        return box[-_MAX_CHARS:], False
    statements = [*_STATED.finditer(text)]
    if not statements:
        return _rewrite_numbers(text[-_MAX_CHARS:]), True
    tail = re.sub(r"\*\*|__", "", text[statements[-1].end() :][:_MAX_CHARS]).lstrip(" \n\t*_:\"'“")
    delimited = _DELIMITED.match(tail)
    if delimited and not re.search(r"\s[A-Za-z]{3,}\s", content := next(filter(None, delimited.groups()))):
        after = tail[delimited.end() :].lstrip()
        if not re.match(r"(?:,|and\b|or\b|, and\b|, or\b)\s*\$", after):
            return content + (r"\%" if re.match(r"\\?%|percent\b", after) else ""), False
    sentence = _SENTENCE.match(tail)[0].strip(" *_\"'”")
    if not re.search(r"(?<!\\)\b(?!and\b)[A-Za-z]{3,}", _without_unit(_rewrite_numbers(sentence))) or _text(sentence):
        return sentence, False
    return f"answer is {_rewrite_numbers(sentence)}", True


# Rewriting

_SYMBOLS = {
    "−": "-", "–": "-", "×": r"\times ", "⋅": r"\cdot ", "·": r"\cdot ", "∗": "*", "÷": r"\div ", "⁄": "/", "∕": "/",
    "±": r"\pm ", "π": r"\pi ", "∞": r"\infty ", "°": r"^\circ ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ",
    "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "ℝ": r"\mathbb{R}", "⟨": "(", "⟩": ")",
}  # fmt: skip
_SUPERSCRIPT, _SUBSCRIPT = re.compile("[²³¹⁰ⁱ⁴-⁹⁺⁻ⁿ]+"), re.compile("[₀-₉]+")
_NUMBER_WORDS = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_BASES = {
    "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10, "eleven": 11,
    "twelve": 12, "sixteen": 16,
}  # fmt: skip
_UNITS = r"(?:cm|mm|km|kg|mg|ml|mL|ft|in|lb|oz|hr|h|min|mph|m/s|km/h|deg)"
_NO_UNITS = (
    r"(?:[ap]\.? ?m|or|and|if|to|mod|base|remainder|times|choose|percent|thousand|million|billion|trillion|dozen|pi"
    r"|sqrt|infty|sin|cos|tan|cot|sec|csc|log|ln|exp|max|min)\b"
)
_UNIT = re.compile(
    rf"(?<=[\d}})])(?:(?:\s*\\(?:text|mbox|hbox|mathrm|textrm)\s*\{{(?!\s*{_NO_UNITS})[^{{}}\d]*\}}"
    rf"(?:\^\{{?-?\d\}}?)?\s*/?)+|\s*{_UNITS}(?:\^\{{?\d\}}?)?\b"
    rf"|(?!\s*{_NO_UNITS})\s+(?:[A-Za-z]{{3,}}|{_UNITS})(?:[ /.-]+[A-Za-z]+)*(?:\^\{{?\d\}}?)?)"
    r"(?=\s*\.?\s*(?:$|,|\\text\{\s*(?:or|and)\b))"
)
_BASED = re.compile(r"\(?(\d[\dA-F]*)\)?\s*_\s*\{?\s*(?:\\(?:text|mathrm)\s*\{)?\s*(\w+)\s*\}*")
_BASE_IN_WORDS = re.compile(r"(\d[\dA-F]*)[\s(]*(?:\\text\{)?[\s(]*(?:in )?base[\s-]*(\w+)[\s)]*\}?")
_OPTION_GOLD = re.compile(r"(?:\\(?:text|textbf|mathrm|mathbf)\s*\{)?\s*\(([A-Z])\)\s*\}?")
_COMPARED_AS_TEXT = re.compile(r"\d_|^\s*\d?\d:[0-5]\d\b")
"""Numbers with a base, and times of day, in a normalized answer."""


def _rewrite_numbers(text: str) -> str:
    """Return text with its symbols as LaTeX and its numbers as math-verify reads them, in mathematics and in prose: 0.3
    with a bar is \\frac{1}{3}, 11 5/6 is \\frac{71}{6}, 10 080 is 10080, 1.2 million is 1200000, [18] is 18."""
    text = _SUPERSCRIPT.sub(r"^{\g<0>}", _SUBSCRIPT.sub(r"_{\g<0>}", text))
    text = "".join(_SYMBOLS.get(character) or _plain(character) for character in text)
    text = re.sub(r"(?<!\\)(?:√|\bsqrt\b)\s*(?:\{([^{}]*)\}|\(([^()]*)\)|([\d.]+|[A-Za-z]))", _square_root, text)
    text = re.sub(r"(?<=\d)(?:,\s*\\!\s*|\{,\}\s*|\s*\\!\s*(?:,\s*)?)(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"\\[$]|[€£¥₹]", "", text).replace(r"\!", "")
    text = re.sub(r"(?<!\\)\\[ ,;:]|~|\\q?quad\b|\\thinspace\b", " ", text)
    text = re.sub(r"(?<![\d.,])\d{1,3}(?:[  ]\d{3})+(?![\d,])", lambda match: re.sub(r"\s", "", match[0]), text)
    text = re.sub(r"\b(?:minus|negative)\s+(?=[\d.\\])", "-", text)
    text = re.sub(r"(\d*)\.(\d*)\\(?:overline|bar)\s*\{?(\d+)\}?", _repeating_decimal, text)
    text = re.sub(r"(?<![\w.^{}_/])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\w.])", _mixed_number, text)
    text = re.sub(r"(\d\.\d+)[eE]([+-]?\d+)", r"\1\\times 10^{\2}", text)
    text = re.sub(rf"([\d.,]*\d)\s*(?:\\text\s*\{{)?\s*\b({'|'.join(_NUMBER_WORDS)})\b\s*\}}?", _number_in_words, text)
    return re.sub(r"(?<![\w)\]\\])\[\s*((?:[^\[\],;]|(?<=\d),(?=\d{3}(?!\d)))*)\s*\](?![\w(])", r"\1", text)


def normalized(answer: str) -> str:
    """Return an answer alone as LaTeX without delimiters, spaces of layout, currency, degrees and units."""
    text = _rewrite_numbers(re.sub(r"^\s*\\\[|\\\]\s*$|\\[()]", "", re.sub(r"\\?\$", "", answer)))
    text = re.sub(r"\\\\\s*\[[^\]]*\]", r"\\\\ ", re.sub(r"\\text\s*\{([\d\s.,/-]+)\}", r"\1", text))
    text = re.sub(r"^\s*[A-Za-z]\s*\\in\s*(?=[(\[]|\\(?:left|\{))", "", text)
    text = re.sub(r"\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])\.?|\\(?:displaystyle|limits|nolimits)\b", "", text)
    text = re.sub(r"\\[dtc]frac", r"\\frac", text).replace(r"\langle", "(").replace(r"\rangle", ")")
    text = re.sub(
        r"(\\(?:sin|cos|tan|cot|sec|csc))\s*[({]?\s*([\d.]+)\s*\^\s*\{?\s*\\circ\s*\}?\s*[)}]?", _in_degrees, text
    )
    text = re.sub(r"\s*(?:\^\s*\{?\s*\\circ\s*\}?|\\degrees?\b)", "", text)
    text = _BASED.sub(_with_base, _BASE_IN_WORDS.sub(_with_base, text))
    if re.search(r"\d_", text):
        text = text.rpartition("=")[2]
    text = _without_unit(text)
    if _COMPARED_AS_TEXT.match(text):
        text = re.sub(r"[\s.]", "", unwrap_text(text).lower())
    if not re.search(r"[(\[{]", text.replace(r"\frac{", "")):
        text = re.sub(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?![\d,])", lambda match: match[0].replace(",", ""), text)
    text = re.sub(r"(?<![\\A-Za-z])pi(?![A-Za-z])", r"\\pi ", text)
    text = re.sub(r"(?<![\\A-Za-z{])(?<!\{ )(?:or|and)(?![A-Za-z}])", ",", text) if re.search(r"\d", text) else text
    return re.sub(r"^[\s=]+|[\s.,;:]+$", "", text)


def _normalized_gold(gold: str) -> str:
    return normalized(last_box(gold) or gold)


def _without_unit(text: str) -> str:
    return _UNIT.sub("", text)


def _plain(character: str) -> str:
    """Return ½ as \\frac{1}{2}, and a raised, lowered or wide character as the usual one."""
    kind = unicodedata.decomposition(character).partition(">")[0]
    plain = unicodedata.normalize("NFKC", character)
    if kind == "<fraction" and "⁄" in plain:
        return r"\frac{{{}}}{{{}}}".format(*plain.split("⁄"))
    plain = "".join(_SYMBOLS.get(part, part) for part in plain)
    return plain if kind in ("<super", "<sub", "<wide", "<narrow", "<noBreak", "<compat") else character


def _square_root(match: re.Match[str]) -> str:
    return rf"\sqrt{{{match[1] or match[2] or match[3] or ''}}}"


def _repeating_decimal(match: re.Match[str]) -> str:
    whole, fixed, period = match.groups()
    value = Fraction(
        int(f"{whole}{fixed}{period}") - int(f"{whole}{fixed}" or 0), 10 ** len(fixed) * (10 ** len(period) - 1)
    )
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def _mixed_number(match: re.Match[str]) -> str:
    whole, numerator, denominator = map(int, match.groups())
    return rf"\frac{{{whole * denominator + numerator}}}{{{denominator}}}"


def _number_in_words(match: re.Match[str]) -> str:
    try:
        value = Fraction(match[1].replace(",", "")) * _NUMBER_WORDS[match[2]]
    except ValueError:
        return match[0]
    return str(value) if value.denominator == 1 else match[0]


def _in_degrees(match: re.Match[str]) -> str:
    return rf"{match[1]}(\frac{{{match[2]}\pi}}{{180}})"


def _with_base(match: re.Match[str]) -> str:
    digits, base = match.groups()
    return f"{digits}_{_BASES.get(base.lower(), base)}"


def _text(latex: str) -> str:
    """Return the words of an answer that is text, in lower case; empty if it is mathematics."""
    words = _words(latex)
    is_wrapped = unwrap_text(latex) != latex
    return words if is_wrapped or re.search(r"\w{4,}|\w \w{2,}|^(?:yes|no|odd)$", words) else ""


def _words(latex: str) -> str:
    """Return the words of text without digits and operators, in lower case and without an article; else empty."""
    plain = unwrap_text(latex)
    if not re.fullmatch(r"[A-Za-z\s.,;:!'’()*\"-]+", plain):
        return ""
    return re.sub(r"^(?:the|an?) (?=\w)", "", " ".join(re.findall(r"[a-z]+", plain.lower())))


def _compact(latex: str) -> str:
    """Return an answer without spaces and percent signs."""
    return re.sub(r"\s+|\\?%|percent", "", latex)


# math-verify


class _MathVerify:
    """A process that compares answers with math-verify; it is started when it is needed, and again after its death."""

    def __init__(self):
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def is_equal(self, gold: str, answer: str, is_prose: bool) -> bool:
        """Return whether an answer equals a gold answer; False if the comparison exceeds its limits."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
            process = self._process
            print(json.dumps([gold, answer, is_prose]), file=process.stdin, flush=True)
            if reply := process.stdout.readline():
                return json.loads(reply)
            process.communicate()  # its timer ended it
            return False

    def _start(self) -> None:
        command = [sys.executable, "-m", __name__]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if not self._process.stdout.readline():
            raise UserError(
                f"answers cannot be compared: `python -m {__name__}` ends with an error; install math-verify"
            )


_MATH_VERIFY = _MathVerify()


def _serve() -> None:
    """Answer comparisons from stdin until it is closed. The timer of a comparison ends the process."""
    import math_verify  # noqa: F401 before the limits, because the import takes seconds

    logging.disable()
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_LIMIT, _MEMORY_LIMIT))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    print("ready", flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, _TIME_LIMIT)
        try:
            result = _compare(*json.loads(line))
        except Exception:  # sympy fails on strange expressions in many ways
            result = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(result), flush=True)


def _compare(gold: str, answer: str, is_prose: bool) -> bool:
    """Return whether math-verify finds an answer equal to a gold answer.

    Decimals are compared to six digits after the point, or six significant ones if they are smaller than 0.1. A list
    has no order, so a point or an interval does not equal it.
    """
    import math_verify
    from sympy import FiniteSet, Interval, Tuple

    expected = _parse(gold)
    given = math_verify.parse(answer, fallback_mode="no_fallback", parsing_timeout=None) if is_prose else _parse(answer)
    if expected and given and isinstance(expected[0], FiniteSet) and isinstance(given[0], (Interval, Tuple)):
        return False
    zeros = re.match(r"-?0*\.(0*)", gold)
    rounding = 6 + len(zeros[1]) if zeros else 6
    return math_verify.verify(
        expected, given, float_rounding=rounding, allow_set_relation_comp=True, timeout_seconds=None
    )


@lru_cache(1024)  # a gold is compared with several samples
def _parse(latex: str) -> list:
    """Return what math-verify reads in LaTeX. It reads the beginning of an expression that it cannot read whole; within
    brackets it cannot."""
    import math_verify
    from sympy import Expr

    parsed = math_verify.parse(f"${latex}$", fallback_mode="no_fallback", parsing_timeout=None)
    if (
        parsed
        and isinstance(parsed[0], Expr)
        and not math_verify.parse(f"$({latex})$", fallback_mode="no_fallback", parsing_timeout=None)
    ):
        return []
    return parsed


if __name__ == "__main__":
    _serve()
