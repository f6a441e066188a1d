"""Paths of files that a recipe names, and of the bundled recipes."""

from pathlib import Path

_PACKAGE_FOLDER = Path(__file__).parent  # importlib.resources would take longer to import than `--help` takes
_PACKAGE_PREFIX = "package:"
RECIPES_FOLDER = _PACKAGE_FOLDER / "launch" / "recipes"


def bundled_recipes() -> list[str]:
    """Return the names of bundled recipes. `--recipe` and `base` accept them, as well as files."""
    return sorted(file.stem for file in RECIPES_FOLDER.glob("*.yaml"))


def expand_path(name: str) -> Path:
    """Return the path of a file name. `package:NAME` is a file of this package, and `~` is the home folder."""
    if name.startswith(_PACKAGE_PREFIX):
        return _PACKAGE_FOLDER / name.removeprefix(_PACKAGE_PREFIX)
    return Path(name).expanduser()
