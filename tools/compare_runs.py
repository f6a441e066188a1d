"""Compare a run directory of version 0.1 before format 2 with a new one: `python -m tools.compare_runs OLD NEW`.

Prints one line for each file: "equal", or the first value that differs. The exit status is 1 if any file differs.

Recipe keys, record fields and some values had other names before format 2. The tool gives the old names their new
names and then compares everything: records line by line, tensors bit for bit, figures exactly. A wrong name here can
make equal files differ, but it cannot hide a difference. Only the values in `IGNORED_KEYS` and the files in
`IGNORED_FILES` are not compared.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any, get_type_hints

import torch
import yaml
from safetensors import safe_open

from thinksafe.recipe.renamed_keys import RENAMED_KEYS
from thinksafe.recipe.schema import Recipe
from thinksafe.section import section_in

NEW_KEYS = {"fate": "outcome", "least_seconds": "roofline_seconds", "optimiser": "optimizer"}
"""Old name of a record field -> its name in format 2."""
NEW_VALUES = {"spare": "not_needed", "loop": "repetition", "forged_frame": "delimiter_injection"}
"""Old name of an outcome, reason or finish reason -> its name in format 2. The report counts responses by them, so they
are keys too."""
VALUE_FIELDS = {"outcome", "reason", "finish_reason"}
"""Fields whose values NEW_VALUES renames."""
GUARD_FIELDS = {"guard", "accepted_by", "judge"}
"""Fields whose values are names of guards."""
NEW_GUARD_KEYS = {"judged": "scope", "agree": "voting", "min_mass": "min_verdict_probability"}
"""Old recipe key in the name of an ensemble's member -> its new name. Example of an old name:
`all(Guard[judged=think], Guard[judged=answer])`."""
ZERO_WAS_AUTOMATIC = {"page_size", "kv_cache_gib"}
"""Recipe keys whose automatic value was 0 and is null now."""

_MEASURED = {"seconds", "tokens_per_second", "mfu", "peak_bytes"}
_ORIGIN = {"created", "environment", "code_version", "run_dir"}
IGNORED_KEYS = {
    "manifest.json": _MEASURED | _ORIGIN | {"format"},
    "report.json": _MEASURED | _ORIGIN | {"left_out"},
    "metrics.jsonl": _MEASURED,
    "estimate.json": {"remark"},
    "adapter_config.json": {"base_model_name_or_path"},
    "base.json": {"model"},
}
"""File name -> keys that are not compared: measurements, versions, dates, paths and sentences."""
IGNORED_FILES = {"report.html": "it shows report.json", ".lock": "it names a process"}
"""File name -> why the file is not compared."""
MISSING = object()
"""Value of a key or list entry that only one of two values has."""


def renamed(value: Any, key: str = "") -> Any:
    """Return a JSON value with the names of format 2, for keys and values at every depth.

    Args:
        value: value of an old file.
        key: new name of the key that holds this value, which decides how a text is renamed; empty at the top level.
    """
    if isinstance(value, dict):
        new_keys = {name: _new_guard_name(NEW_KEYS.get(name, NEW_VALUES.get(name, name))) for name in value}
        return {new_keys[name]: renamed(entry, new_keys[name]) for name, entry in value.items()}
    if isinstance(value, list):
        return [renamed(entry, key) for entry in value]
    if key in VALUE_FIELDS:
        return NEW_VALUES.get(value, value)
    return _new_guard_name(value) if key in GUARD_FIELDS else value


def _new_guard_name(name: Any) -> Any:
    if not isinstance(name, str):
        return name
    return re.sub(r"(?<=[\[ ])(judged|agree|min_mass)(?==)", lambda match: NEW_GUARD_KEYS[match[0]], name)


def renamed_recipe(value: Any, section: type | None = Recipe) -> Any:
    """Return a section of a recipe, or a list of sections, with the keys of format 2.

    Args:
        value: value of an old recipe.
        section: dataclass of the section; None if the key holds no section, whose value is returned unchanged.
    """
    if isinstance(value, list):
        return [renamed_recipe(entry, section) for entry in value]
    if not isinstance(value, dict) or section is None:
        return value
    hints = get_type_hints(section)
    entries = {RENAMED_KEYS.get(section, {}).get(key, key): entry for key, entry in value.items()}
    if section is Recipe:
        moved = {"benign_loss": entries["training"].pop("benign_loss")} if "training" in entries else {}
        entries.setdefault("method", {"type": "thinksafe", **moved})
    automatic = {key for key in ZERO_WAS_AUTOMATIC & entries.keys() if entries[key] == 0}
    return {
        key: None if key in automatic else renamed_recipe(entry, section_in(hints.get(key)))
        for key, entry in entries.items()
    }


def comparable(value: Any, file_name: str) -> Any:
    """Return a JSON value without the keys that are not compared, at every depth.

    A manifest's hashes become the list of the files, since the files themselves are compared. Notes on training steps
    are sentences, so only their presence counts.

    Args:
        value: value of an old file after `renamed`, or of a new file.
        file_name: name of the file without folders, which selects the keys of IGNORED_KEYS.
    """
    ignored = IGNORED_KEYS.get(file_name, set())
    if isinstance(value, list):
        return [comparable(entry, file_name) for entry in value]
    if not isinstance(value, dict):
        return value
    kept = {key: comparable(entry, file_name) for key, entry in value.items() if key not in ignored}
    if file_name == "manifest.json" and "files" in kept:
        kept["files"] = sorted(kept["files"])
    if file_name == "metrics.jsonl" and "note" in kept:
        kept["note"] = bool(kept["note"])
    return kept


def first_difference(old: Any, new: Any, path: str = "") -> str | None:
    """Return a text with the path of the first value that differs and both values, or None if there is none.

    The order of keys does not count. 1, 1.0 and true differ, and NaN equals NaN.

    Args:
        path: dotted path of these values, which starts the text.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        pairs = [(key, old.get(key, MISSING), new.get(key, MISSING)) for key in old | new]
    elif isinstance(old, list) and isinstance(new, list):
        pairs = [(str(n), *pair) for n, pair in enumerate(zip_longest(old, new, fillvalue=MISSING), start=1)]
    elif repr(old) == repr(new):  # tells 1 from 1.0 and from True, and finds NaN equal to itself
        return None
    else:
        return f"{path}: {_shown(old)} in OLD, {_shown(new)} in NEW".removeprefix(": ")
    differences = (first_difference(a, b, f"{path}.{key}".removeprefix(".")) for key, a, b in pairs)
    return next((difference for difference in differences if difference), None)


def _shown(value: Any) -> str:
    text = "missing" if value is MISSING else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def compare_records(old: Path, new: Path) -> str | None:
    """Return the first difference between two JSONL files, with its line number, or None if all lines are equal.

    `old` is renamed to format 2 first. Keys that are not compared do not count.
    """
    with old.open(encoding="utf-8") as old_lines, new.open(encoding="utf-8") as new_lines:
        for number, (old_line, new_line) in enumerate(zip_longest(old_lines, new_lines), start=1):
            if old_line is None or new_line is None:
                return f"line {number}: missing in {'OLD' if old_line is None else 'NEW'}"
            old_record = comparable(renamed(json.loads(old_line)), old.name)
            if difference := first_difference(old_record, comparable(json.loads(new_line), new.name)):
                return f"line {number}, {difference}"
    return None


def compare_json(old: Path, new: Path) -> str | None:
    """Return the first difference between two JSON files, or None if they are equal.

    `old` is renamed to format 2 first. Keys that are not compared do not count.
    """
    old_value, new_value = (json.loads(file.read_text(encoding="utf-8")) for file in (old, new))
    return first_difference(comparable(renamed(old_value), old.name), comparable(new_value, new.name))


def compare_recipes(old: Path, new: Path) -> str | None:
    """Return the first difference between two YAML files of recipes, or None if they are equal.

    The keys of `old` are renamed to format 2 first, and its automatic values of 0 become null.
    """
    old_value, new_value = (yaml.safe_load(file.read_text(encoding="utf-8")) for file in (old, new))
    return first_difference(renamed_recipe(old_value), new_value)


def compare_tensors(old: Path, new: Path) -> str | None:
    """Return the first difference between the tensors of two safetensors files, or None if they are equal.

    It compares names, then dtype, shape and bits of each tensor in order of the names.
    """
    with safe_open(old, "pt") as old_tensors, safe_open(new, "pt") as new_tensors:
        if difference := first_difference(sorted(old_tensors.keys()), sorted(new_tensors.keys()), "names"):
            return difference
        for name in sorted(old_tensors.keys()):
            a, b = old_tensors.get_tensor(name), new_tensors.get_tensor(name)
            if (a.dtype, a.shape) != (b.dtype, b.shape):
                return f"{name}: {a.dtype} {tuple(a.shape)} in OLD, {b.dtype} {tuple(b.shape)} in NEW"
            bits = [
                tensor.contiguous().flatten().view(torch.uint8).view(a.numel(), a.element_size()) for tensor in (a, b)
            ]
            if num_differing := int((bits[0] != bits[1]).any(1).sum()):
                return f"{name}: {num_differing:,} of {a.numel():,} elements"
    return None


def compare_bytes(old: Path, new: Path) -> str | None:
    """Return `its bytes` if the bytes of two files differ, or None if they are equal."""
    return None if old.read_bytes() == new.read_bytes() else "its bytes"


COMPARISONS = {
    ".jsonl": compare_records,
    ".json": compare_json,
    ".yaml": compare_recipes,
    ".safetensors": compare_tensors,
}
"""File name suffix -> function of (old, new) that returns where two files first differ, or None if they are equal.
Files with other suffixes are compared byte by byte."""


def compare_runs(old: Path, new: Path) -> Iterator[tuple[str, str, bool]]:
    """Yield (file, result, is different) for each file of two run directories, in order of the file names.

    The file is a path relative to the run directory. The result is `equal`, `differs at ...`, `missing in OLD`,
    `missing in NEW` or `not compared, ...`; only the second to fourth are different.
    """
    folders = [{str(file.relative_to(run)): file for file in run.rglob("*") if file.is_file()} for run in (old, new)]
    for name in sorted(folders[0] | folders[1]):
        old_file, new_file = (files.get(name) for files in folders)
        if reason := IGNORED_FILES.get(Path(name).name):
            yield name, f"not compared, {reason}", False
        elif old_file is None or new_file is None:
            yield name, f"missing in {'OLD' if old_file is None else 'NEW'}", True
        else:
            difference = COMPARISONS.get(old_file.suffix, compare_bytes)(old_file, new_file)
            yield name, f"differs at {difference}" if difference else "equal", difference is not None


def main(arguments: list[str] | None = None) -> int:
    """Compare two run directories and print a line for each file. Return 1 if any file differs, else 0.

    Args:
        arguments: arguments of the command; None for those of the process. The process exits with status 2 if they are
            invalid or a path is no run directory.
    """
    parser = argparse.ArgumentParser(
        prog="python -m tools.compare_runs",
        description="Compare a run directory of version 0.1 before format 2 with a new one.",
    )
    parser.add_argument("old", type=Path, help="run directory of version 0.1 before format 2")
    parser.add_argument("new", type=Path, help="run directory of this version, with the same recipe and seed")
    options = parser.parse_args(arguments)
    for run in (options.old, options.new):
        if not (run / "recipe.yaml").is_file():
            parser.error(f"{run}: not a run directory, since it has no recipe.yaml")
    results = list(compare_runs(options.old, options.new))
    width = max(len(name) for name, _, _ in results)
    for name, result, _ in results:
        print(f"{name:{width}}  {result}")
    num_different = sum(is_different for _, _, is_different in results)
    print(f"{num_different} of {len(results)} files differ")
    return 1 if num_different else 0


if __name__ == "__main__":
    sys.exit(main())
