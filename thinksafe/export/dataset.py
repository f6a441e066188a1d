"""Export of the accepted examples as a Hugging Face data set: a parquet file and a card with the origin of the records.

`datasets.load_dataset(FOLDER)` reads the folder; `thinksafe train --data` reads the parquet file.
"""

import re
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined

from thinksafe.data.atomic import export_folder, sha256
from thinksafe.errors import UserError
from thinksafe.reporting.coverage import read_coverage
from thinksafe.run.attempts import Attempts
from thinksafe.run.directory import RunDir
from thinksafe.run.marks import read_marks

_ROWS_PER_GROUP = 1000


def export_data(run: RunDir, folder: Path) -> Path:
    """Write the accepted examples of a run as a data set folder, completely or not at all, and return `folder`.

    The folder holds data/*.parquet, the recipe and a card (README.md).

    Raises:
        UserError: stage `accept` is not finished, no response is accepted, or `folder` is not empty or is a file.
    """
    if not run.is_done("accept"):
        raise UserError(f"{run.path}: no responses are accepted yet; run `thinksafe filter` first")
    with export_folder(folder) as staging:
        file = staging / "data" / "train-00000-of-00001.parquet"
        file.parent.mkdir()
        if not _write_parquet(run, file):
            raise UserError(f"{run.path}: no response was accepted, so there is nothing to export; see audit.jsonl")
        (staging / "recipe.yaml").write_text(run.recipe.to_yaml(), encoding="utf-8")
        (staging / "README.md").write_text(_render_card(run, file), encoding="utf-8")
    return folder


def _write_parquet(run: RunDir, file: Path) -> int:
    """Write one row for each accepted response, with fields of its example, its sampling and its verdict, and return
    the number of rows."""
    import pyarrow
    import pyarrow.parquet

    text, integer, real = pyarrow.string(), pyarrow.int32(), pyarrow.float64()
    columns = {
        "prompt": text, "response": text, "label": text, "prompt_id": text, "sample": integer, "rung": integer,
        "accepted_by": text, "weight": real, "steering": text, "seed": pyarrow.int64(), "num_prompt_tokens": integer,
        "num_tokens": integer, "guard": text, "p_safe": real, "p_unsafe": real, "refusal": pyarrow.bool_(),
    }  # fmt: skip
    method, seed, num_rows = run.recipe.method, run.recipe.seed, 0
    accepted = filter(None, (method.choose(attempts, seed) for attempts in Attempts(run, read_marks(run))))
    with pyarrow.parquet.ParquetWriter(file, pyarrow.schema(columns.items()), compression="zstd") as writer:
        while rows := [attempt.fields | vars(attempt.example) for attempt in islice(accepted, _ROWS_PER_GROUP)]:
            writer.write_table(pyarrow.Table.from_pylist(rows, schema=writer.schema))
            num_rows += len(rows)
    return num_rows


def _render_card(run: RunDir, file: Path) -> str:
    """Return the text of the folder's README.md, which the Hugging Face hub shows as the card of the parquet file."""
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(file, columns=["label", "num_tokens", "steering"])
    lengths, labels = rows["num_tokens"].to_numpy(), rows["label"].to_numpy()
    manifest = run.manifest
    digests = {f"data/{file.name}": sha256(file)}
    digests |= {name: sha256(run.path / name) for name in ("accepted.jsonl", "audit.jsonl", "recipe.yaml")}
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"cell": _escape_cell, "code": _format_code, "number": "{:,}".format}
    environment.filters["percent"] = lambda share: f"{100 * share:.2f}%"
    card = (files("thinksafe.export") / "dataset_card.md.jinja").read_text(encoding="utf-8")
    return environment.from_string(card).render(
        name=run.recipe.name,
        recipe=run.recipe,
        guards=run.recipe.guard.single_guards,
        coverage=read_coverage(run),
        lengths={label: _length_statistics(lengths[labels == label]) for label in dict.fromkeys(labels)},
        num_records=len(rows),
        is_sampled="generate" in manifest["stages"],
        num_steered=len(rows) - rows["steering"].null_count,
        manifest=manifest,
        hashes=digests | manifest.get("inputs", {}),
    )


def _escape_cell(text: Any) -> str:
    """Return a text for a cell of a Markdown table: on one line, with all markup escaped."""
    return re.sub(r"([\\`*_\[\]<>|#!])", r"\\\1", " ".join(str(text).split()))


def _format_code(text: str) -> str:
    """Return a text as Markdown code on one line; backticks become apostrophes."""
    return "`" + " ".join(text.split()).replace("`", "'") + "`"


def _length_statistics(tokens: np.ndarray) -> dict[str, float]:
    """Return count, mean, 5th, 50th and 95th percentile, maximum and sum of numbers of tokens, at least one."""
    low, median, high = np.percentile(tokens, (5, 50, 95))
    figures = {"count": len(tokens), "mean": tokens.mean(), "p5": low, "median": median, "p95": high}
    return figures | {"max": tokens.max(), "total": tokens.sum()}
