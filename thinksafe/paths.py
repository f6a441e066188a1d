"""Paths of files that a recipe names, and of the bundled recipes."""

from pathlib import Path

_PACKAGE_FOLDER = Path(__file__).parent  # importlib.resources would take longer to import than `--help` takes
_PACKAGE_PREFIX = "package:"
RECIPES_FOLDER = _PACKAGE_FOLDER / "launch" / "recipes"
"""Folder of the bundled recipes, NAME.yaml."""
METHODS_FOLDER = _PACKAGE_FOLDER / "launch" / "methods"
"""Folder of the settings of each method, NAME.yaml."""


def bundled_recipes() -> list[str]:
    """Return the sorted names of the bundled recipes, which `--recipe` and the key `base` accept beside files."""
    return sorted(file.stem for file in RECIPES_FOLDER.glob("*.yaml"))


def bundled_methods() -> list[str]:
    """Return the sorted names of the methods that `--method` accepts."""
    return sorted(file.stem for file in METHODS_FOLDER.glob("*.yaml"))


def expand_path(name: str) -> Path:
    """Return the path of a file that a recipe names, whether or not it exists: `package:NAME` is a file in the folder
    of the package thinksafe, a leading `~` is the home folder, and any other name is a path as it is."""
    if name.startswith(_PACKAGE_PREFIX):
        return _PACKAGE_FOLDER / name.removeprefix(_PACKAGE_PREFIX)
    return Path(name).expanduser()
