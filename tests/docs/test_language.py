"""The language rules of CONTRIBUTING.md that a pattern can check, on everything that a person reads."""

import ast
import io
import re
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
AVOIDED = {
    r"\bso many\b": "name the number",
    r"\bas many\b": "name the number",
    r"\b[Ww]h(?:o|at|ich|ere|en)ever\b": "name the person or thing",
    r"\bwhat there is\b": "name the thing",
    r"\bwhat (?:is|was) left\b": "name the thing",
    r"\bof (?:its|their|one's|your|his|her|our) own\b": "say which one: separate, another, the user's",
    r"\b(?:[Bb]ut|[Ss]ave) for\b": "except",
    r"\bnor\b": "split the sentence",
    r"\b(?:[Tt]hose|[Tt]hese|[Oo]nes?) (?:that|who)\b": "repeat the noun",
    r"\blast digits?\b": "rounding",
    r"\bcomputed again\b": "recomputed",
    r"\btak(?:e|es|en|ing) (?:up|in)\b": "occupy, read, import",
    r"\bin the place of\b": "instead of",
    r"\bin (?:the )?midst\b": "during",
    r"\bmend(?:s|ed|ing)?\b": "fix",
    r"\b(?:is|are|was|were|be) told\b": "name the argument or the event",
    r"\bgo(?:es)? on\b(?! with)": "continue, resume",
    r"\bgive a new\b": "use a new",
    r"(?:^|[.:;] |\"\"\")Of (?:a|an|the|every|all|each|several|what|many|some)\b": "start with the subject",
}
"""Phrases that are hard to read, with what to write instead."""
NO_VERB = {
    *("A", "All", "An", "Any", "As", "At", "Both", "By", "Each", "Every", "For", "From", "How"),
    *("If", "In", "Its", "It", "No", "Of", "On", "One", "Only", "Some", "So", "That", "The"),
    *("Their", "There", "These", "They", "This", "Those", "To", "Under", "What", "When", "Where", "Whether", "Which"),
    *("Who", "Whose", "Why", "With", "Within", "Without"),
}
"""First words of a function's docstring that are no verb."""
SUFFIXES = {".py", ".md", ".yaml", ".toml", ".sh", ".jinja", ".html", ".js", ".css", ".cu", ".h", ".cff"}


def files() -> list[Path]:
    """Return the files of the repository that hold prose; results and the bundled world are data."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    paths = [ROOT / name for name in listed if "results/" not in name and "/bundle/" not in name]
    prose = [path for path in paths if path.suffix in SUFFIXES or path.name == "Makefile"]
    return [path for path in prose if path.is_file() and not path.is_symlink() and path != Path(__file__)]


def passages(file: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of every comment and string of a Python file, or of every paragraph of another file."""
    source = file.read_text(encoding="utf-8")
    if file.suffix == ".py":
        yield from python_passages(source)
        return
    line = 1
    for paragraph in source.split("\n\n"):
        yield line, paragraph
        line += paragraph.count("\n") + 2


def python_passages(source: str) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of runs of comments and of every string, f-strings included."""
    comments: list[str] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments.append(token.string)
        elif token.type not in (tokenize.NL, tokenize.INDENT, tokenize.DEDENT):
            if comments:
                yield token.start[0] - len(comments), " ".join(comment.lstrip("# ") for comment in comments)
                comments = []
            if token.type in (tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", -1)):
                yield token.start[0], token.string


def problems(file: Path) -> list[str]:
    """Return every avoided phrase of a file with its line and what to write instead."""
    return [
        f"{file.relative_to(ROOT)}:{line}: {match[0]!r}: {better}"
        for line, passage in passages(file)
        for pattern, better in AVOIDED.items()
        for match in re.finditer(pattern, " ".join(passage.split()))
    ]


def functions_without_verb(source: str) -> list[tuple[int, str]]:
    """Return (line, first word) of function docstrings that do not start with a verb; a property is named by a noun."""
    starts = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef):
            continue
        decorators = {ast.unparse(decorator).split(".")[-1] for decorator in node.decorator_list}
        document = ast.get_docstring(node)
        if document and not decorators & {"property", "cached_property", "fixture"}:
            word = document.split()[0].strip("`.,:;'\"")
            if word in NO_VERB:
                starts.append((node.lineno, word))
    return starts


@pytest.mark.parametrize("file", files(), ids=lambda file: str(file.relative_to(ROOT)))
def test_text_avoids_phrases_that_are_hard_to_read(file):
    assert not problems(file)


def test_docstring_of_a_function_starts_with_a_verb():
    library = [file for file in files() if file.suffix == ".py" and file.relative_to(ROOT).parts[0] != "tests"]
    assert [
        f"{file.relative_to(ROOT)}:{line}: {word}"
        for file in library
        for line, word in functions_without_verb(file.read_text(encoding="utf-8"))
    ] == []


def test_check_sees_comments_strings_and_docstrings():
    source = '# Of every\n# prompt so\n# many\ndef f(x):\n    """The x."""\n    raise ValueError(f"nor {x}")\n'
    texts = " | ".join(text for _, text in python_passages(source))
    assert texts.startswith('Of every prompt so many | """The x.""" | ') and "nor " in texts
    assert functions_without_verb(source) == [(4, "The")]
