"""Export of the accepted examples as a Hugging Face data set: a parquet file and a card with the origin of the records.

`datasets.load_dataset(FOLDER)` reads the folder; `thinksafe train --data` reads the parquet file.
"""

import os
import re
import shutil
from collections import defaultdict
from collections.abc import Iterator
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined

from thinksafe.data.atomic import sha256, staging_folder
from thinksafe.data.selection import Attempt, choose
from thinksafe.errors import UserError
from thinksafe.reporting.summary import read_coverage
from thinksafe.run.attempts import Attempts
from thinksafe.run.directory import RunDir
from thinksafe.run.marks import read_marks

_ROWS_PER_GROUP = 1000


def export_data(run: RunDir, folder: Path) -> Path:
    """Write the accepted examples of a run as a data set folder, completely or not at all, and return `folder`.

    The folder holds data/*.parquet, the recipe and a card (README.md).

    Args:
        folder: a folder that does not exist yet or is empty.

    Raises:
        UserError: stage `accept` is not finished, no response is accepted, or `folder` is not empty or is a file.
    """
    if not run.is_done("accept"):
        raise UserError(f"{run.path}: no responses are accepted yet; run `thinksafe filter` first")
    staging = staging_folder(folder)
    (staging / "data").mkdir(parents=True)
    file = staging / "data" / "train-00000-of-00001.parquet"
    lengths, num_steered = _write_parquet(_accepted_attempts(run), file)
    if not lengths:
        shutil.rmtree(staging)
        raise UserError(f"{run.path}: no response was accepted, so there is nothing to export; see audit.jsonl")
    (staging / "recipe.yaml").write_text(run.recipe.to_yaml(), encoding="utf-8")
    (staging / "README.md").write_text(_render_card(run, file, lengths, num_steered), encoding="utf-8")
    os.replace(staging, folder.resolve())
    return folder


def _accepted_attempts(run: RunDir) -> Iterator[Attempt]:
    """Yield the attempt that training uses, for each prompt that has one, in order of prompt id."""
    for attempts in Attempts(run, read_marks(run)):
        if kept := choose(attempts):
            yield kept


def _write_parquet(accepted: Iterator[Attempt], file: Path) -> tuple[dict[str, list[int]], int]:
    """Write a parquet file with one row for each accepted response.

    Returns:
        {label: [number of tokens of each response]}, and the number of responses that were sampled with steering.
    """
    import pyarrow
    import pyarrow.parquet

    text, integer, real = pyarrow.string(), pyarrow.int32(), pyarrow.float64()
    columns = {
        "prompt": text, "response": text, "label": text, "prompt_id": text, "sample": integer, "rung": integer,
        "accepted_by": text, "weight": real, "steering": text, "seed": pyarrow.int64(), "num_prompt_tokens": integer,
        "num_tokens": integer, "guard": text, "p_safe": real, "p_unsafe": real, "refusal": pyarrow.bool_(),
    }  # fmt: skip
    lengths, num_steered = defaultdict(list), 0
    with pyarrow.parquet.ParquetWriter(file, pyarrow.schema(columns.items()), compression="zstd") as writer:
        while group := list(islice(accepted, _ROWS_PER_GROUP)):
            rows = [_row(attempt) for attempt in group]
            for row in rows:
                lengths[row["label"]].append(row["num_tokens"])
                num_steered += row["steering"] is not None
            writer.write_table(pyarrow.Table.from_pylist(rows, schema=writer.schema))
    return dict(lengths), num_steered


def _row(attempt: Attempt) -> dict[str, Any]:
    """Return the columns of a response: the fields of its example, and some fields of the response and its verdict."""
    example, response, verdict = attempt.example, attempt.response, attempt.verdict
    response_fields = {
        name: getattr(response, name) for name in ("steering", "seed", "num_prompt_tokens", "num_tokens")
    }
    verdict_fields = {name: getattr(verdict, name) for name in ("guard", "p_safe", "p_unsafe", "refusal")}
    return vars(example) | response_fields | verdict_fields


def _render_card(run: RunDir, file: Path, lengths: dict[str, list[int]], num_steered: int) -> str:
    """Return the text of the folder's README.md, which the Hugging Face hub shows as the data set's card.

    Args:
        file: the parquet file.
        lengths, num_steered: results of `_write_parquet`.
    """
    figures, manifest = read_coverage(run), run.manifest
    labels = figures["labels"].items()
    digests = {f"data/{file.name}": sha256(file)}
    digests |= {name: sha256(run.path / name) for name in ("accepted.jsonl", "audit.jsonl", "recipe.yaml")}
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"cell": _escape_cell, "code": _format_code}
    card = (files("thinksafe.export") / "dataset_card.md.jinja").read_text(encoding="utf-8")
    return environment.from_string(card).render(
        name=run.recipe.name,
        recipe=run.recipe,
        guards=run.recipe.guard.single_guards,
        figures=figures,
        rejected_shares={label: 1 - counts["rungs"][0]["accepted"] / counts["prompts"] for label, counts in labels},
        lost_shares={label: 1 - counts["accepted"] / counts["prompts"] for label, counts in labels},
        lengths={label: _length_statistics(tokens) for label, tokens in lengths.items()},
        num_records=sum(map(len, lengths.values())),
        is_sampled="generate" in manifest["stages"],
        num_steered=num_steered,
        manifest=manifest,
        hashes=digests | manifest.get("inputs", {}),
    )


def _escape_cell(text: Any) -> str:
    """Return a text for a cell of a Markdown table: on one line, with all markup escaped."""
    return re.sub(r"([\\`*_\[\]<>|#!])", r"\\\1", " ".join(str(text).split()))


def _format_code(text: str) -> str:
    """Return a text as Markdown code on one line; backticks become apostrophes."""
    return "`" + " ".join(text.split()).replace("`", "'") + "`"


def _length_statistics(tokens: list[int]) -> dict[str, float]:
    """Return count, mean, 5th, 50th and 95th percentile, maximum and sum of numbers of tokens, at least one."""
    low, median, high = np.percentile(tokens, (5, 50, 95))
    return {
        "count": len(tokens),
        "mean": float(np.mean(tokens)),
        "p5": low,
        "median": median,
        "p95": high,
        "max": max(tokens),
        "total": sum(tokens),
    }
