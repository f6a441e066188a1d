"""Coverage: how many prompts have an accepted response, on which rung, why the others have none, and human marks.

It reads audit.jsonl one record at a time.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from thinksafe.data.selection import KEPT, NOT_NEEDED
from thinksafe.run.directory import RunDir


def read_audit(run: RunDir) -> Iterator[dict[str, Any]]:
    """Yield the records of audit.jsonl."""
    with (run.path / "audit.jsonl").open("rb") as lines:
        yield from map(json.loads, lines)


def count_coverage(records: Iterable[dict[str, Any]], num_rungs: int) -> dict[str, Any]:
    """Return the coverage of a whole run.

    Args:
        records: audit records.
        num_rungs: number of rungs in the recipe, including the first attempt.

    Returns:
        `kept`: {label: number of kept responses}, one for each prompt;
        `dropped`: {label: {outcome: number of responses}};
        `labels`: {label: number of prompts, number of accepted prompts, and a row for each rung that was tried: its
        instruction, prompts, responses, accepted prompts, and the share of all prompts accepted up to this rung};
        `rungs`: `num_rungs`;
        `categories`: categories of harm, most frequent first: unsafe responses, their prompts, and the number of these
        prompts with an accepted response;
        `accepted_by`: {guard or person: number of prompts};
        `people`: {person: number of marks};
        `marks`: {comparison of people's decision with the guard's: number of responses}, see `_compare_with_guard`;
        `uncertain`: number of responses that the guard found too close to the threshold.
    """
    kept, dropped, prompts, accepted_by = Counter(), defaultdict(Counter), Counter(), Counter()
    rung_prompts, responses, accepted = (defaultdict(Counter) for _ in range(3))
    instructions = defaultdict(set)
    categories: dict[str, Counter] = defaultdict(Counter)
    people, marks, uncertain = Counter(), Counter(), 0
    for record in records:
        label = record["label"]
        prompts[label] += 1
        if record["accepted"]:
            kept[label] += 1
            accepted[label][record["rung"]] += 1
            accepted_by[record["accepted_by"]] += 1
        for rung in {attempt["rung"] for attempt in record["attempts"]}:
            rung_prompts[label][rung] += 1
        harms = Counter(a["category"] for a in record["attempts"] if a["decision"] == "unsafe" and a["category"])
        for category, count in harms.items():
            categories[category].update(responses=count, prompts=1, accepted=int(record["accepted"]))
        for attempt in record["attempts"]:
            responses[label][attempt["rung"]] += 1
            instructions[label, attempt["rung"]].add(attempt["steering"])
            uncertain += attempt["reason"] == "uncertain"
            if attempt["outcome"] != KEPT:
                dropped[label][attempt["outcome"]] += 1
            if attempt["marks"]:
                people.update(mark["by"] for mark in attempt["marks"])
                marks[_compare_with_guard(attempt)] += 1

    def rung_figures(label: str, rung: int) -> dict[str, Any]:
        num_accepted = sum(count for earlier, count in accepted[label].items() if earlier <= rung)
        return {
            "rung": rung,
            "steering": " / ".join(sorted(instructions[label, rung] - {None})) or None,
            "prompts": rung_prompts[label][rung],
            "responses": responses[label][rung],
            "accepted": accepted[label][rung],
            "covered": num_accepted / prompts[label],
        }

    return {
        "kept": dict(kept),
        "dropped": {label: dict(reasons) for label, reasons in dropped.items()},
        "labels": {
            label: {
                "prompts": prompts[label],
                "accepted": kept[label],
                "rungs": [rung_figures(label, rung) for rung in sorted(rung_prompts[label])],
            }
            for label in ("harmful", "benign")
            if prompts[label]
        },
        "rungs": num_rungs,
        "categories": [
            {"category": category, **{name: counts[name] for name in ("responses", "prompts", "accepted")}}
            for category, counts in sorted(categories.items(), key=lambda item: (-item[1]["responses"], item[0]))
        ],
        "accepted_by": dict(accepted_by.most_common()),
        "people": dict(people.most_common()),
        "marks": dict(marks),
        "uncertain": uncertain,
    }


def _compare_with_guard(attempt: dict[str, Any]) -> str:
    """Return how people's decision on a response compares with the guard's.

    `disagreed`: the people disagree. `impossible`: people accept a malformed response. Otherwise `confirmed`: people
    and guard accept; `agreed`: neither accepts; `rescued`: only the people accept; `withdrawn`: only the guard accepts.
    """
    decisions = {mark["by"]: mark["decision"] for mark in attempt["marks"]}.values()
    if len(set(decisions)) > 1:
        return "disagreed"
    is_safe, is_accepted = attempt["decision"] == "safe", "accept" in decisions
    if is_accepted and attempt["decision"] == "dropped":
        return "impossible"
    return ("confirmed" if is_safe else "rescued") if is_accepted else ("withdrawn" if is_safe else "agreed")


def coverage_lines(figures: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield lines (title, text) of the coverage for a terminal."""
    labels = figures["labels"]
    parts = [f"{label} {counts['accepted']:,} of {counts['prompts']:,} ({counts['accepted'] / counts['prompts']:.1%})"
            for label, counts in labels.items()]  # fmt: skip
    yield "accepted", "   ".join(parts)
    last = max(counts["rungs"][-1]["rung"] for counts in labels.values())
    for rung in range(last + 1) if last else ():
        by_label = {label: step for label, counts in labels.items() for step in counts["rungs"] if step["rung"] == rung}
        steering = next((step["steering"] for step in by_label.values() if step["steering"]), None)
        parts = [f"{label} {step['accepted']:,} of {step['prompts']:,}" for label, step in by_label.items()]
        if parts:
            yield f"rung {rung}", "   ".join(parts) + (f"   {steering[:60]!r}" if steering else "")
    reasons = sum(map(Counter, figures["dropped"].values()), Counter()).most_common()
    if parts := [f"{reason.replace('_', ' ')} {count:,}" for reason, count in reasons if reason != NOT_NEEDED]:
        yield "rejected", "   ".join(parts)
    if figures["categories"]:
        parts = [f"{counts['category']} {counts['responses']:,}" for counts in figures["categories"][:8]]
        yield "unsafe by category", "   ".join(parts)
    if figures["uncertain"]:
        yield "uncertain", f"{figures['uncertain']:,} responses, to mark with `thinksafe review`"
    if figures["people"]:
        parts = [f"{name} {count:,}" for name, count in (figures["people"] | figures["marks"]).items()]
        yield "marks", "   ".join(parts)
