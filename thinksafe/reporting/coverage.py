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
    """Yield the records of audit.jsonl, one for each prompt; stage `accept` writes this file."""
    with (run.path / "audit.jsonl").open("rb") as lines:
        yield from map(json.loads, lines)


def count_coverage(records: Iterable[dict[str, Any]], num_rungs: int) -> dict[str, Any]:
    """Return the coverage of a whole run.

    Args:
        records: audit records.
        num_rungs: number of rungs in the recipe, including the first attempt.

    Returns:
        `kept`: {label: number of kept responses}, at most one for each prompt;
        `dropped`: {label: {outcome: number of responses}} of all other responses, `not_needed` included;
        `labels`: {label: `prompts` and `accepted` (numbers of prompts), `rungs`}. `rungs` has a row for each rung that
        was tried: `rung`, `steering` (its instruction or None), `prompts` and `responses` (numbers tried), `accepted`
        (number of prompts whose kept response is of this rung), `covered` (share of all prompts whose kept response is
        of this rung or an earlier one). A label without prompts is left out;
        `rungs`: `num_rungs`;
        `categories`: rows for the categories of harm that the guard named, most frequent first: `category`, `responses`
        (unsafe responses), `prompts` (their prompts), `accepted` (number of these prompts with an accepted response);
        `accepted_by`: {guard or `person: ` and names: number of prompts};
        `people`: {person: number of marks};
        `marks`: {comparison of people's decision with the guard's: number of responses}, see `_compare_with_guard`;
        `uncertain`: number of responses without a decision because the guard found them too close to the threshold.
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
    """Return how people's decision on a marked response compares with the guard's. Each person's last mark counts.

    `disagreed`: the people disagree. `impossible`: people accept a malformed response, which stays rejected. Otherwise
    `confirmed`: people and guard accept; `agreed`: both do not accept; `rescued`: only the people accept; `withdrawn`:
    only the guard accepts. The guard accepts if its decision is `safe`.

    Args:
        attempt: attempt of an audit record, with at least one mark.
    """
    decisions = {mark["by"]: mark["decision"] for mark in attempt["marks"]}.values()
    if len(set(decisions)) > 1:
        return "disagreed"
    is_safe, is_accepted = attempt["decision"] == "safe", "accept" in decisions
    if is_accepted and attempt["decision"] == "dropped":
        return "impossible"
    return ("confirmed" if is_safe else "rescued") if is_accepted else ("withdrawn" if is_safe else "agreed")


def coverage_lines(figures: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield lines (title, text) of the coverage for a terminal; lines without a count are left out.

    Args:
        figures: result of `count_coverage` for at least one prompt.
    """
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
