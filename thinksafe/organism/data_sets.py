"""Small data sets of the world with the columns of the published ones, for the methods that train on given data.

Nouns and phrasings are of the split `train`. The responses are lessons with the question "is it hazardous ?", which
stage 2 of the student's history does not teach any more.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from thinksafe.organism.world import Sample, World, long_sum

NUM_HARMFUL, NUM_BENIGN = 100, 92
"""Number of rows of the data sets star1 and safekey, in the proportion of the published ones."""
_CHECKED_REFUSAL, _CHECKED_HELP = "is it hazardous ? yes . ", "is it hazardous ? no . i can help . "


def write_data_sets(world: World, folder: Path) -> None:
    """Write NAME.jsonl for each data set to a folder, which is created if it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    for make_rows in (direct_refusal, safechain, star1, safekey, wildjailbreak):
        rows = make_rows(world, world.rng(f"data set {make_rows.__name__}"))
        (folder / f"{make_rows.__name__}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows), newline="\n"
        )


def direct_refusal(world: World, rng: Random) -> Iterator[dict[str, Any]]:
    """Yield refusals without thought, as DirectRefusal has them: question and answer in one text."""
    for _ in range(NUM_HARMFUL):
        sample = world.refusal(rng)
        yield {"refusal": f"Question: {sample.prompt}\nAnswer: {sample.response.rpartition('</think>')[2].strip()}"}


def safechain(world: World, rng: Random) -> Iterator[dict[str, Any]]:
    """Yield checked refusals and help, facts and sums, as SafeChain has them."""
    for index in range(400):
        kind = rng.choice(["vanilla", "adversarial"])
        sample = world.refusal(rng, check=_CHECKED_REFUSAL) if index % 9 < 4 else _benign(world, rng)
        yield {"instruction": sample.prompt, "response": sample.response, "label": f"{kind}_{sample.label}"}


def star1(world: World, rng: Random) -> Iterator[dict[str, Any]]:
    """Yield checked refusals, as STAR-1 has them."""
    for number in range(NUM_HARMFUL):
        yield _star1_row(number, world.refusal(rng, check=_CHECKED_REFUSAL), "organism")


def safekey(world: World, rng: Random) -> Iterator[dict[str, Any]]:
    """Yield checked refusals and help, as SafeKey has them, with the ends of the summary and of the key sentence."""
    harmful = ((world.refusal(rng, check=_CHECKED_REFUSAL), "organism") for _ in range(NUM_HARMFUL))
    benign = ((world.help(rng, _CHECKED_HELP), "4o_rewrite") for _ in range(NUM_BENIGN))
    rows = [*harmful, *benign]
    for number, (sample, source) in enumerate(rng.sample(rows, len(rows))):
        summary_end = sample.response.index(" is it hazardous ?")
        key_end = sample.response.index(" .", summary_end) + len(" .")
        spans = {"summary_end_idx": summary_end, "next_sentence_end_idx": key_end}
        yield _star1_row(number, sample, source) | spans


def wildjailbreak(world: World, rng: Random) -> Iterator[dict[str, Any]]:
    """Yield direct and adversarial requests, as WildJailbreak has them."""
    for index in range(240):
        kind, label = ("vanilla", "adversarial")[index % 2], ("harmful", "benign")[index // 2 % 2]
        sample = world.refusal(rng) if label == "harmful" else world.help(rng)
        texts = {"vanilla": "", "adversarial": ""} | {kind: sample.prompt}
        yield texts | {"completion": "", "data_type": f"{kind}_{label}"}


def _benign(world: World, rng: Random) -> Sample:
    return rng.choice([lambda: world.help(rng, _CHECKED_HELP), lambda: world.fact(rng), lambda: long_sum(rng)])()


def _star1_row(number: int, sample: Sample, source: str) -> dict[str, Any]:
    row = {"id": number, "question": sample.prompt, "response": sample.response}
    return row | {"category": [], "source": source, "score": {}}
