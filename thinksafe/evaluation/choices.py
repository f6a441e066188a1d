"""The option that an answer to a multiple-choice question chooses.

An answer may mention every option, and the words "A" and "I" many times. So a letter counts only where it is given as
the answer. Where no letter is, or several are, the answer chooses none.
"""

import re

from thinksafe.evaluation.latex import last_box, unwrap_text

_MARKUP = re.compile(r"[*_`$\"“”‘]|(?<!\w)'|['’](?!\w)|\\[()\[\]]|\\(?:left|right|displaystyle|quad)\b|\\[ ,;:!]|~")
_LETTER = r"(?P<open>[(\[{<]?)\s*(?P<letter>[A-Za-z])(?![\w'’^+])"
_OPTION = rf"(?:(?:the )?(?:(?:correct|right|final|best) )?(?:option|choice|answer|letter)\s*:?\s*)?{_LETTER}"
_IS_RIGHT = r"(?:is|must be|would be) (?:(?:clearly|therefore|thus|the|most) )*(?:correct|right|best|answer)\b"
_CHOOSE = r"(?:choose|chose|select|selected|pick|picked|go with|going with)(?: for)?"
_STATEMENTS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        # The answer is B. Answer: (B). The correct choice among these would be option B.
        r"\b(?:answer|choice|option|statement|solution)\b(?:(?!not\b|n't|never\b)[^.!?\n]){0,80}?(?:\b(?:is|be|was)\b|[:=]|\s[-–—]\s)"
        rf"\s*{_OPTION}",
        rf"\bnot (?:option )?[(\[]?[a-z][)\]]?,? but (?:rather )?{_OPTION}",
        # B is correct. Option B, the circle, is the best answer.
        rf"(?<![\w'’]){_LETTER}[)\]]? (?={_IS_RIGHT})",
        rf"\b(?:option|choice|answer) {_LETTER}(?=[^.!?\n]{{0,80}}? {_IS_RIGHT})",
        # It is B. I choose B. Therefore, B.
        rf"\b(?:it is|it's|it must be|therefore,?|thus,?|hence,?|so,?|{_CHOOSE}) (?:it is |it's )?{_OPTION}",
    )
)
_OWN_LINE = re.compile(rf"^[^\w\n]{{0,12}}?{_OPTION}[^\w\n]{{0,12}}$", re.IGNORECASE | re.MULTILINE)
_BOLD = re.compile(rf"(?:\*\*|__)\W{{0,4}}?{_LETTER}\W{{0,4}}?(?:\*\*|__)")
_FIRST_OF_LINE = re.compile(rf"^[^\w\n]{{0,12}}?{_LETTER}(?=[)\].:])", re.MULTILINE)
_WORD = re.compile(r"\s+(?P<word>[a-z]\w*)|-[a-z]", re.IGNORECASE)
_LINKS = {
    "because",
    "since",
    "as",
    "and",
    "but",
    "due",
    "for",
    "with",
    "which",
    "where",
    "given",
    "not",
    "or",
    "rather",
}
_VERBS = {
    "is",
    "are",
    "was",
    "were",
    "can",
    "cannot",
    "could",
    "does",
    "do",
    "has",
    "have",
    "had",
    "will",
    "would",
    "must",
}
_ANOTHER = re.compile(
    r"[)\]}>]?\s*(?:,\s*(?:and|or)\b|,|/|&|and\b|or\b)\s*(?:option\s+)?(?:[(\[]?[A-Z]|[(\[][a-z]|[a-z](?=\)|\s*$))"
    r"(?=[)\].;:!?]|\s*$|\s*,|\s+(?:and|or)\b)"
)


def chosen_option(answer: str) -> str | None:
    """Return the capital letter that an answer chooses; None if it chooses none, or several.

    The first kind in this list that occurs decides, and of several of a kind the last: the last \\boxed{}; a statement
    such as "the answer is B"; a letter alone on a line; a letter in bold; the only letter that opens a line, as in "B)
    Circle".
    """
    if (box := last_box(answer)) is not None and (letter := option_letter(box)):
        return letter
    text = _plain(answer)
    for pattern in (*_STATEMENTS, _OWN_LINE):
        if matches := [match for match in pattern.finditer(text) if _is_letter(match)]:
            return _single(matches[-1])
    if matches := [*_BOLD.finditer(answer)]:
        return _single(matches[-1])
    matches = [*_FIRST_OF_LINE.finditer(text)]
    return _single(matches[0]) if len(matches) == 1 else None


def option_letter(text: str) -> str | None:
    """Return the capital letter of an option as data sets and boxes give it: `C`, `c`, `(C)`, `C. Plane`, `C: 12 V`,
    `\\text{(C)}`; None for other text."""
    match = re.match(rf"\s*{_OPTION}", _plain(text), re.IGNORECASE)
    return _single(match) if match and _is_letter(match) else None


def _plain(text: str) -> str:
    """Return text without Markdown and LaTeX around letters."""
    return _MARKUP.sub(" ", unwrap_text(text)).replace("  ", " ").strip()


def _is_letter(match: re.Match[str]) -> bool:
    """Return whether a matched letter is an option, and not the word "A" or "I" or the subject of a sentence."""
    if re.compile(rf"[)\]]? {_IS_RIGHT}").match(match.string, match.end("letter")):
        return match["letter"].isupper() or bool(match["open"])
    following = _WORD.match(match.string, match.end("letter"))
    if match["open"] or following is None:
        return True
    word = following["word"]
    if word is None or word in _VERBS:
        return False
    return word in _LINKS or match["letter"] in "BCDEFGHJKLMNOPQRSTUVWXYZ"


def _single(match: re.Match[str]) -> str | None:
    """Return the matched letter in upper case; None if another option follows: "A or B"."""
    return None if _ANOTHER.match(match.string, match.end("letter")) else match["letter"].upper()
