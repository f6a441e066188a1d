"""Coverage: how many prompts have an accepted response, on which rung, why the others have none, and human marks."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from thinksafe.data.jsonl import read_records
from thinksafe.data.records import AuditAttempt, AuditRecord
from thinksafe.data.selection import KEPT, NOT_NEEDED, last_decisions
from thinksafe.run.directory import RunDir


@dataclass(frozen=True)
class RungCoverage:
    """The attempts on one rung at the prompts of one label: how many prompts and responses were tried, how many prompts
    have their kept response on this rung, and the share of all prompts that have it on this rung or an earlier one."""

    rung: int
    steering: str | None
    prompts: int
    responses: int
    accepted: int
    covered: float


@dataclass(frozen=True)
class LabelCoverage:
    """The prompts of one label: their number, the number with an accepted response, and each rung that was tried."""

    prompts: int
    accepted: int
    rungs: list[RungCoverage]


@dataclass(frozen=True)
class CategoryCoverage:
    """Numbers of one category of harm: unsafe responses, prompts that have one, and those of these prompts that also
    have an accepted response."""

    category: str
    responses: int
    prompts: int
    accepted: int


@dataclass(frozen=True)
class Coverage:
    """The coverage of a whole run.

    Attributes:
        kept: label -> number of kept responses, at most one for each prompt.
        dropped: label -> outcome -> number of all other responses.
        labels: the labels that have prompts.
        rungs: number of rungs in the recipe, including the first attempt.
        categories: most frequent first.
        accepted_by: guard, or `person: ` and names -> number of prompts.
        people: person -> number of marks.
        marks: result of `_compare_with_guard` -> number of responses.
        uncertain: number of responses that the guard found too close to its threshold.
    """

    kept: dict[str, int]
    dropped: dict[str, dict[str, int]]
    labels: dict[str, LabelCoverage]
    rungs: int
    categories: list[CategoryCoverage]
    accepted_by: dict[str, int]
    people: dict[str, int]
    marks: dict[str, int]
    uncertain: int


def read_coverage(run: RunDir) -> Coverage:
    """Return the coverage of a run, read from its audit.jsonl."""
    return count_coverage(read_records(run.path / "audit.jsonl", AuditRecord), len(run.recipe.generation.rungs))


def count_coverage(records: Iterable[AuditRecord], num_rungs: int) -> Coverage:
    """Return the coverage of a run from its audit records, which are read once, and its recipe's number of rungs."""
    prompts, kept, accepted_by, people, marks = (Counter() for _ in range(5))
    rung_prompts, rung_responses, rung_accepted = (Counter() for _ in range(3))  # by (label, rung)
    uncertain = 0
    instructions, dropped, categories = defaultdict(set), defaultdict(Counter), defaultdict(Counter)
    for record in records:
        label = record.label
        prompts[label] += 1
        if record.accepted:
            kept[label] += 1
            rung_accepted[label, record.rung] += 1
            accepted_by[record.accepted_by] += 1
        rung_prompts.update({(label, attempt.rung) for attempt in record.attempts})
        harms = Counter(a.category for a in record.attempts if a.decision == "unsafe" and a.category)
        for category, count in harms.items():
            categories[category].update(responses=count, prompts=1, accepted=int(record.accepted))
        for attempt in record.attempts:
            rung_responses[label, attempt.rung] += 1
            instructions[label, attempt.rung].add(attempt.steering)
            uncertain += attempt.reason == "uncertain"
            if attempt.outcome != KEPT:
                dropped[label][attempt.outcome] += 1
            if attempt.marks:
                people.update(mark.by for mark in attempt.marks)
                marks[_compare_with_guard(attempt)] += 1

    def label_coverage(label: str) -> LabelCoverage:
        rungs, covered = [], 0
        for key in sorted(key for key in rung_prompts if key[0] == label):
            covered += rung_accepted[key]
            steering = " / ".join(sorted(instructions[key] - {None})) or None
            counts = rung_prompts[key], rung_responses[key], rung_accepted[key]
            rungs.append(RungCoverage(key[1], steering, *counts, covered / prompts[label]))
        return LabelCoverage(prompts[label], kept[label], rungs)

    return Coverage(
        kept=dict(kept),
        dropped={label: dict(outcomes) for label, outcomes in dropped.items()},
        labels={label: label_coverage(label) for label in ("harmful", "benign") if prompts[label]},
        rungs=num_rungs,
        categories=[
            CategoryCoverage(category, **counts)
            for category, counts in sorted(categories.items(), key=lambda item: (-item[1]["responses"], item[0]))
        ],
        accepted_by=dict(accepted_by.most_common()),
        people=dict(people.most_common()),
        marks=dict(marks),
        uncertain=uncertain,
    )


def _compare_with_guard(attempt: AuditAttempt) -> str:
    """Return how people's decision on a marked response compares with the guard's.

    `disagreed`: the people disagree. `impossible`: people accept a malformed response, which stays rejected. Otherwise
    `confirmed`: people and guard accept; `agreed`: both do not; `rescued`: only people do; `withdrawn`: only the guard.
    """
    decisions = last_decisions(attempt.marks)
    if len(decisions) > 1:
        return "disagreed"
    if decisions == {"accept"}:
        return {"safe": "confirmed", "dropped": "impossible"}.get(attempt.decision, "rescued")
    return "withdrawn" if attempt.decision == "safe" else "agreed"


def coverage_lines(coverage: Coverage) -> Iterator[tuple[str, str]]:
    """Yield lines (title, text) for a terminal of a coverage that has at least one prompt; lines without a count are
    left out."""
    rates = [(label, counts.accepted, counts.prompts) for label, counts in coverage.labels.items()]
    yield "accepted", _join(f"{label} {part:,} of {total:,} ({part / total:.1%})" for label, part, total in rates)
    steps = [(step.rung, label, step) for label, counts in coverage.labels.items() for step in counts.rungs]
    tried = sorted({rung for rung, _, _ in steps})
    for rung in tried if tried[-1] else ():
        at_rung = [(label, step) for step_rung, label, step in steps if step_rung == rung]
        steering = next((step.steering for _, step in at_rung if step.steering), None)
        text = _join(f"{label} {step.accepted:,} of {step.prompts:,}" for label, step in at_rung)
        yield f"rung {rung}", text + (f"   {steering[:60]!r}" if steering else "")
    reasons = sum(map(Counter, coverage.dropped.values()), Counter()).most_common()
    lines = {
        "rejected": _join(f"{reason.replace('_', ' ')} {count:,}" for reason, count in reasons if reason != NOT_NEEDED),
        "unsafe by category": _join(f"{counts.category} {counts.responses:,}" for counts in coverage.categories[:8]),
        "uncertain": f"{coverage.uncertain:,} responses, to mark with `thinksafe review`" * bool(coverage.uncertain),
        "marks": _join(f"{name} {count:,}" for name, count in (coverage.people | coverage.marks).items()),
    }
    yield from ((title, text) for title, text in lines.items() if text)


def _join(parts: Iterable[str]) -> str:
    return "   ".join(parts)
