"""The developer pages name files, classes and layers that exist. test_pages.py checks their links."""

import re
from pathlib import Path

import pytest

from tests.test_layers import LAYERS, sources

ROOT = Path(__file__).parents[2]
DEVELOPER_PAGES = ["ARCHITECTURE.md", "CONTRIBUTING.md"]


@pytest.mark.parametrize("page", DEVELOPER_PAGES)
def test_named_files_and_folders_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    named = re.findall(r"`((?:[\w.-]+/)+[\w.-]*|\w+\.(?:py|cu))`", text)
    assert len(named) > 20
    for name in named:
        if "NAME" not in name and not name.endswith((".jsonl", ".json")):
            places = [ROOT, ROOT / "thinksafe", *(folder for folder in (ROOT / "tests").iterdir() if folder.is_dir())]
            found = any((place / name).exists() for place in places) or any(ROOT.rglob(f"*/{name}"))
            assert found, name


@pytest.mark.parametrize("page", DEVELOPER_PAGES)
def test_named_classes_and_functions_exist(page):
    code = "\n".join(file.read_text(encoding="utf-8") for file in [*sources(), *(ROOT / "tools").rglob("*.py")])
    code += "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("*.py"))
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    for name in re.findall(r"`((?:[A-Z]\w+|[a-z]\w*_\w+)(?:\.\w+)?)(?:\([^`]*\))?`", text):
        if name.endswith(".py"):
            continue
        for part in name.split("."):
            assert re.search(rf"(?:class |def |^|\W){part}\b", code), name


def test_architecture_lists_the_layers_of_the_contract():
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \|", text, re.MULTILINE)
    assert [(int(number), set(re.findall(r"`(\w+)`", names))) for number, names in rows] == [
        (number, parts) for number, parts in reversed([*enumerate(LAYERS, start=1)])
    ]


def test_glossary_is_sorted_and_defines_each_term_once():
    text = (ROOT / "docs/glossary.md").read_text(encoding="utf-8")
    terms = re.findall(r"^\| ([^|]+?) \| [^|]+ \|$", text, re.MULTILINE)[1:]
    assert len(terms) > 40 and terms == sorted(set(terms), key=str.lower)
