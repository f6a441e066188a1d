"""What the comparisons of answers read from LaTeX: the last box, and text without its wrappers."""

import re

_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=\{)|\\(?:boxed|fbox)\s+(\w+)")
_WRAPPER = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:bf|rm|it|sf|tt|normal)|boldsymbol|bm|mbox|hbox|operatorname)"
    r"\s*\{((?:[^{}\\]|\\.)*)\}"
)


def last_box(text: str) -> str | None:
    """Return the content of the last \\boxed{} or \\fbox{} that is not empty; None if there is none. A box that is not
    closed ends with the text."""
    contents = (match[1] or _group(text, match.end()) for match in reversed([*_BOX.finditer(text)]))
    return next((content.strip() for content in contents if content.strip()), None)


def _group(text: str, start: int) -> str:
    """Return what the braces at a position enclose; an escaped brace does not count."""
    depth, position = 0, start
    while position < len(text):
        if text[position] == "\\":
            position += 1
        elif text[position] in "{}":
            depth += 1 if text[position] == "{" else -1
            if depth == 0:
                return text[start + 1 : position]
        position += 1
    return text[start + 1 :]


def unwrap_text(latex: str) -> str:
    """Return LaTeX with the content of \\text{}, \\mathrm{} and the like in their place."""
    while (unwrapped := _WRAPPER.sub(r"\1", latex)) != latex:
        latex = unwrapped
    return latex
