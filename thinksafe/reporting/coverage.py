"""What became of every prompt: which have an accepted response, on which rung they got it, what was wrong with the
others, and what people said. Counted from the stories of audit.jsonl, one at a time.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from thinksafe.data.selection import KEPT, SPARE
from thinksafe.run.directory import RunDir


def stories(run: RunDir) -> Iterator[dict[str, Any]]:
    """The lines of audit.jsonl."""
    with (run.path / "audit.jsonl").open("rb") as lines:
        yield from map(json.loads, lines)


def coverage(stories: Iterable[dict[str, Any]], num_rungs: int) -> dict[str, Any]:
    """Figures of a whole run.

    Args:
        num_rungs: of the recipe, the first attempt included.

    Returns:
        `kept`: {label: responses}, one a prompt; `dropped`: {label: {reason: responses}};
        `labels`: {label: prompts, accepted, and for each rung that was tried its instruction, prompts, responses,
        accepted prompts, and the share of all prompts that are accepted by then};
        `rungs`: how many the ladder has;
        `categories`: of harm, most frequent first: unsafe responses, prompts, and how many of those were accepted in
        the end;
        `accepted_by`: {guard or person: prompts};
        `people`: {who: marks}; `marks`: how they stand to the guard's word, by response; `uncertain`: responses
        without a decision because the guard was unsure.
    """
    kept, dropped, prompts, accepted_by = Counter(), defaultdict(Counter), Counter(), Counter()
    asked, responses, accepted = (defaultdict(Counter) for _ in range(3))
    instructions = defaultdict(set)
    categories: dict[str, Counter] = defaultdict(Counter)
    people, marks, uncertain = Counter(), Counter(), 0
    for story in stories:
        label = story["label"]
        prompts[label] += 1
        if story["accepted"]:
            kept[label] += 1
            accepted[label][story["rung"]] += 1
            accepted_by[story["accepted_by"]] += 1
        for rung in {attempt["rung"] for attempt in story["attempts"]}:
            asked[label][rung] += 1
        found = Counter(a["category"] for a in story["attempts"] if a["decision"] == "unsafe" and a["category"])
        for category, count in found.items():
            categories[category].update(responses=count, prompts=1, accepted=int(story["accepted"]))
        for attempt in story["attempts"]:
            responses[label][attempt["rung"]] += 1
            instructions[label, attempt["rung"]].add(attempt["steering"])
            uncertain += attempt["reason"] == "uncertain"
            if attempt["fate"] != KEPT:
                dropped[label][attempt["fate"]] += 1
            if attempt["marks"]:
                people.update(mark["by"] for mark in attempt["marks"])
                marks[_standing(attempt)] += 1

    def of_rung(label: str, rung: int) -> dict[str, Any]:
        so_far = sum(count for earlier, count in accepted[label].items() if earlier <= rung)
        return {
            "rung": rung,
            "steering": " / ".join(sorted(instructions[label, rung] - {None})) or None,
            "prompts": asked[label][rung],
            "responses": responses[label][rung],
            "accepted": accepted[label][rung],
            "covered": so_far / prompts[label],
        }

    return {
        "kept": dict(kept),
        "dropped": {label: dict(reasons) for label, reasons in dropped.items()},
        "labels": {
            label: {
                "prompts": prompts[label],
                "accepted": kept[label],
                "rungs": [of_rung(label, rung) for rung in sorted(asked[label])],
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


def _standing(attempt: dict[str, Any]) -> str:
    """How people's word on a response stands to the guard's."""
    words = {mark["by"]: mark["decision"] for mark in attempt["marks"]}.values()
    if len(set(words)) > 1:
        return "disagreed"
    safe, accepts = attempt["decision"] == "safe", "accept" in words
    if accepts and attempt["decision"] == "dropped":
        return "impossible"
    return ("confirmed" if safe else "rescued") if accepts else ("withdrawn" if safe else "agreed")


def coverage_lines(figures: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The same for a terminal, as (name, text)."""
    labels = figures["labels"]
    told = [f"{label} {each['accepted']:,} of {each['prompts']:,} ({each['accepted'] / each['prompts']:.1%})"
            for label, each in labels.items()]  # fmt: skip
    yield "accepted", "   ".join(told)
    last = max(each["rungs"][-1]["rung"] for each in labels.values())
    for rung in range(last + 1) if last else ():
        tried = {label: step for label, each in labels.items() for step in each["rungs"] if step["rung"] == rung}
        steering = next((step["steering"] for step in tried.values() if step["steering"]), None)
        told = [f"{label} {step['accepted']:,} of {step['prompts']:,}" for label, step in tried.items()]
        if told:
            yield f"rung {rung}", "   ".join(told) + (f"   {steering[:60]!r}" if steering else "")
    reasons = sum(map(Counter, figures["dropped"].values()), Counter()).most_common()
    if told := [f"{reason.replace('_', ' ')} {count:,}" for reason, count in reasons if reason != SPARE]:
        yield "rejected", "   ".join(told)
    if figures["categories"]:
        told = [f"{each['category']} {each['responses']:,}" for each in figures["categories"][:8]]
        yield "unsafe", "   ".join(told)
    if figures["uncertain"]:
        yield "too close to call", f"{figures['uncertain']:,}, for `thinksafe review`"
    if figures["people"]:
        told = [f"{name} {count:,}" for name, count in (figures["people"] | figures["marks"]).items()]
        yield "marks", "   ".join(told)
