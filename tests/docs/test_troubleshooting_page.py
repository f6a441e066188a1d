"""docs/troubleshooting.md: every message that it quotes is a message of the code."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
VARIABLE = "\0"


def code_strings() -> list[str]:
    """Return every string of the package; the values inside an f-string become VARIABLE."""
    strings = []
    for file in (ROOT / "thinksafe").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else VARIABLE for part in node.values]
                strings.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                strings.append(node.value)
    return strings


def quoted_messages(text: str) -> list[str]:
    return [line for block in re.findall(r"```text\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]


def is_message(quote: str, strings: list[str]) -> bool:
    """Return whether one string holds all fixed parts of a quote in order. `…` stands for anything."""
    pattern = re.compile(".*".join(map(re.escape, quote.split("…"))), re.DOTALL)
    return any(pattern.search(string) for string in strings)


def test_every_quoted_message_is_in_the_code():
    quotes, strings = quoted_messages(PAGE), code_strings()
    assert len(quotes) > 30
    assert [quote for quote in quotes if not is_message(quote, strings)] == []


def test_quotes_are_specific():
    """A quote without enough fixed text would match anything."""
    assert all(max(map(len, quote.split("…"))) >= 8 for quote in quoted_messages(PAGE))


def test_unknown_message_is_found():
    assert not is_message("the printer is out of paper: …", code_strings())
