"""The accepted set as a data set folder: parquet, and a card that says where every record comes from.

`datasets.load_dataset(FOLDER)` reads it, and so does `thinksafe train --data`.
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

from thinksafe.data.atomic import fresh, sha256
from thinksafe.data.selection import Attempt, choose
from thinksafe.errors import UserError
from thinksafe.guards.config import GuardConfig
from thinksafe.reporting.summary import coverage_of
from thinksafe.run.attempts import Attempts
from thinksafe.run.directory import RunDir
from thinksafe.run.marks import read_marks

_ROWS_A_GROUP = 1000


def export_data(run: RunDir, folder: Path) -> Path:
    """Write the accepted set of a run as a data set folder, all of it or nothing.

    Raises:
        UserError: nothing is accepted, or the folder holds something.
    """
    if not run.is_done("accept"):
        raise UserError(f"{run.path}: nothing is accepted yet; run `thinksafe filter` first")
    partial = fresh(folder)
    (partial / "data").mkdir(parents=True)
    shard = partial / "data" / "train-00000-of-00001.parquet"
    lengths, steered = _write_parquet(_accepted(run), shard)
    if not lengths:
        shutil.rmtree(partial)
        raise UserError(f"{run.path}: no response was accepted, so there is nothing to export; see audit.jsonl")
    (partial / "recipe.yaml").write_text(run.recipe.to_yaml(), encoding="utf-8")
    (partial / "README.md").write_text(_card(run, shard, lengths, steered), encoding="utf-8")
    os.replace(partial, folder.resolve())
    return folder


def _accepted(run: RunDir) -> Iterator[Attempt]:
    for tried in Attempts(run, read_marks(run)):
        if kept := choose(tried):
            yield kept


def _write_parquet(accepted: Iterator[Attempt], file: Path) -> tuple[dict[str, list[int]], int]:
    """Write one row an accepted response; tokens of each, by label, and how many were sampled with steering."""
    import pyarrow
    import pyarrow.parquet

    text, count, share = pyarrow.string(), pyarrow.int32(), pyarrow.float64()
    columns = {
        "prompt": text, "response": text, "label": text, "prompt_id": text, "sample": count, "rung": count,
        "accepted_by": text, "weight": share, "steering": text, "seed": pyarrow.int64(), "num_prompt_tokens": count,
        "num_tokens": count, "guard": text, "p_safe": share, "p_unsafe": share, "refusal": pyarrow.bool_(),
    }  # fmt: skip
    lengths, steered = defaultdict(list), 0
    with pyarrow.parquet.ParquetWriter(file, pyarrow.schema(columns.items()), compression="zstd") as writer:
        while some := list(islice(accepted, _ROWS_A_GROUP)):
            rows = [_row(attempt) for attempt in some]
            for row in rows:
                lengths[row["label"]].append(row["num_tokens"])
                steered += row["steering"] is not None
            writer.write_table(pyarrow.Table.from_pylist(rows, schema=writer.schema))
    return dict(lengths), steered


def _row(attempt: Attempt) -> dict[str, Any]:
    example, response, verdict = attempt.example, attempt.response, attempt.verdict
    found = {name: getattr(response, name) for name in ("steering", "seed", "num_prompt_tokens", "num_tokens")}
    said = {name: getattr(verdict, name) for name in ("guard", "p_safe", "p_unsafe", "refusal")}
    return vars(example) | found | said


def _card(run: RunDir, shard: Path, lengths: dict[str, list[int]], steered: int) -> str:
    """README.md of the folder: what the Hugging Face hub shows as the data set's card."""
    figures, manifest = coverage_of(run), run.manifest
    labels = figures["labels"].items()
    digests = {f"data/{shard.name}": sha256(shard)}
    digests |= {name: sha256(run.path / name) for name in ("accepted.jsonl", "audit.jsonl", "recipe.yaml")}
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"cell": _cell, "code": _code}
    card = (files("thinksafe.export") / "dataset_card.md.jinja").read_text(encoding="utf-8")
    return environment.from_string(card).render(
        name=run.recipe.name,
        recipe=run.recipe,
        judges=_judges(run.recipe.guard),
        figures=figures,
        filtered={label: 1 - each["rungs"][0]["accepted"] / each["prompts"] for label, each in labels},
        lost={label: 1 - each["accepted"] / each["prompts"] for label, each in labels},
        lengths={label: _statistics(tokens) for label, tokens in lengths.items()},
        count=sum(map(len, lengths.values())),
        sampled="generate" in manifest["stages"],
        steered=steered,
        manifest=manifest,
        hashes=digests | manifest.get("inputs", {}),
    )


def _judges(guard: GuardConfig) -> list[GuardConfig]:
    """Every guard that reads for itself."""
    return [judge for member in guard.members for judge in _judges(member)] or [guard]


def _cell(text: Any) -> str:
    """Text in a Markdown table: on one line, and nothing in it is markup."""
    return re.sub(r"([\\`*_\[\]<>|#!])", r"\\\1", " ".join(str(text).split()))


def _code(text: str) -> str:
    return "`" + " ".join(text.split()).replace("`", "'") + "`"


def _statistics(tokens: list[int]) -> dict[str, float]:
    low, middle, high = np.percentile(tokens, (5, 50, 95))
    return {
        "count": len(tokens),
        "mean": float(np.mean(tokens)),
        "p5": low,
        "median": middle,
        "p95": high,
        "max": max(tokens),
        "total": sum(tokens),
    }
