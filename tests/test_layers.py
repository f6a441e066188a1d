"""The import contract: a package imports only packages of lower layers, so there is no cycle."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = [
    {"errors"},
    {"paths", "formatting", "hardware", "section"},
    {"kernels", "text", "data", "distributed"},
    {"model"},
    {"sampler", "training"},
    {"organism"},
    {"evaluation", "guards"},
    {"methods"},
    {"recipe"},
    {"run"},
    {"estimate", "reporting"},
    {"pipeline", "export"},
    {"cli"},
]
"""Packages and modules of thinksafe, lowest layer first. Packages of the same layer do not import each other."""
FORBIDDEN = {
    "kernels": {"errors", "paths", "formatting", "hardware", "section"},
    "sampler": {"text", "data", "distributed"},
    "data": {"hardware", "formatting"},
}
"""Further imports that are forbidden: kernels know nothing of the package, the sampler nothing of text and files."""


def part_of(file: Path) -> str:
    """Return the package or ground module that a source file belongs to."""
    if file.is_relative_to(ROOT / "kernels"):
        return "kernels"
    return file.relative_to(ROOT / "thinksafe").parts[0].removesuffix(".py")


def imported_modules(source: str) -> set[str]:
    """Return the names of all modules that a source imports, at the top or inside functions."""
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


def parts_imported(source: str) -> set[str]:
    """Return the packages and ground modules of thinksafe that a source imports."""
    names = [module.split(".") for module in imported_modules(source)]
    return {name[1] for name in names if name[0] == "thinksafe" and name[1:]} - {"__version__"}


def sources() -> list[Path]:
    """Return every module of the library; thinksafe/kernels is a link to kernels/."""
    linked = ROOT / "thinksafe/kernels", ROOT / "thinksafe/launch"
    library = [file for file in ROOT.glob("thinksafe/**/*.py") if not any(map(file.is_relative_to, linked))]
    return sorted([*library, *ROOT.glob("kernels/*.py")])


@pytest.mark.parametrize("file", sources(), ids=lambda file: str(file.relative_to(ROOT)))
def test_module_imports_only_lower_layers(file):
    if file == ROOT / "thinksafe/__init__.py":
        assert not imported_modules(file.read_text())
        return
    part = part_of(file)
    (layer,) = (number for number, parts in enumerate(LAYERS) if part in parts)
    allowed = set().union({part}, *LAYERS[:layer]) - FORBIDDEN.get(part, set())
    assert parts_imported(file.read_text()) <= allowed


def test_library_imports_no_tests_tools_or_benchmarks():
    for file in sources():
        packages = {module.split(".")[0] for module in imported_modules(file.read_text())}
        assert not packages & {"tests", "tools", "benchmarks"}, file


def test_contract_sees_imports_inside_functions_and_of_submodules():
    function = "def f():\n    from thinksafe.cli import parser\n    import thinksafe.run.directory\n"
    source = function + "from thinksafe import pipeline"
    assert parts_imported(source) == {"cli", "run", "pipeline"}
