"""Names of files and folders, as a recipe writes them, to paths."""

from importlib.resources import files
from pathlib import Path

PACKAGE = "package:"
RECIPES = files("thinksafe") / "launch" / "recipes"


def bundled_recipes() -> list[str]:
    """Names that `--recipe` takes beside files."""
    return sorted(file.name.removesuffix(".yaml") for file in RECIPES.iterdir() if file.name.endswith(".yaml"))


def expand(name: str) -> Path:
    """`package:NAME` lies in this package, wherever it is installed; `~` is the home folder; the rest is as it is."""
    if name.startswith(PACKAGE):
        return Path(str(files("thinksafe") / name.removeprefix(PACKAGE)))
    return Path(name).expanduser()
