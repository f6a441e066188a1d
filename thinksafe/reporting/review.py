"""The review page: one file, without any network, in which a person reads the most uncertain responses and marks them.

The page only shows and collects: marks come out as a file, which `thinksafe filter --marks` takes in. A page needs no
server, can be sent to whoever reviews, and cannot write into a run by itself. Everything of a record is data in a JSON
block and is put on the page as text; a content security policy lets nothing run but the page's own script, and lets
nothing in or out.
"""

import base64
import hashlib
import json
import shlex
from collections import Counter
from collections.abc import Iterable
from heapq import nsmallest
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from thinksafe.data.atomic import write_atomically
from thinksafe.data.records import Verdict, content_id
from thinksafe.data.selection import Attempt, choose
from thinksafe.run.attempts import Attempts
from thinksafe.run.directory import RunDir
from thinksafe.run.marks import filter_anew, read_marks
from thinksafe.text.chat import Thought, parse_response


def write_review(run: RunDir, most: int) -> Path:
    """Write `review.html` with the responses that are most worth reading.

    Args:
        most: responses on the page; what is left out is counted there.

    Returns:
        The path of the page.
    """
    attempts = Attempts(run, read_marks(run))
    threshold, counts = run.recipe.guard.threshold, Counter()

    def readable() -> Iterable[tuple[Attempt, bool]]:
        for tried in attempts:
            kept = choose(tried)
            for attempt in tried:
                counts[attempt.verdict.decision] += 1
                if attempt.verdict.decision != "dropped":
                    yield attempt, attempt is kept

    chosen = nsmallest(most, readable(), key=lambda shown: certainty(shown[0].verdict, threshold))
    command = f"thinksafe filter --out {shlex.quote(str(run.path))} --marks marks.jsonl"
    page = {
        "run": content_id(run.recipe.to_yaml(), str(run.path.resolve())),
        "name": run.recipe.name,
        "too_late": run.training_has_begun,
        "command": filter_anew(run, "marks.jsonl") if run.training_has_begun else command,
        "threshold": threshold,
        "margin": run.recipe.guard.margin,
        "judged": counts.total() - counts["dropped"],
        "malformed": counts["dropped"],
        "records": [_shown(*each) for each in chosen],
    }
    write_atomically(run.path / "review.html", render(page))
    return run.path / "review.html"


def certainty(verdict: Verdict, threshold: float) -> tuple[bool, float, str, int]:
    """Sorts verdicts, the least certain first: those without a decision, then those closest to the threshold."""
    return (verdict.decision != "unknown", _distance(verdict, threshold), verdict.prompt_id, verdict.sample)


def render(page: dict[str, Any]) -> str:
    """The page; see `write_review`."""
    folder = files("thinksafe.reporting")
    html, style, script = ((folder / f"review.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))
    # In a script block only "<" could end the block; JSON knows it by another name too.
    data = json.dumps(page, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    return (
        Environment(autoescape=True)
        .from_string(html)
        .render(
            title=f"Review: {page['name']}",
            policy=f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; base-uri 'none'",
            style=Markup(style),
            script=Markup(script),
            data=Markup(data),
        )
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _share(verdict: Verdict) -> float | None:
    """P(unsafe) among the two verdicts, which the threshold is about."""
    if verdict.p_safe is None or verdict.p_unsafe is None or not verdict.p_safe + verdict.p_unsafe > 0:
        return None
    return verdict.p_unsafe / (verdict.p_safe + verdict.p_unsafe)


def _distance(verdict: Verdict, threshold: float) -> float:
    share = _share(verdict)
    return 0.0 if share is None else abs(share - threshold)


def _shown(attempt: Attempt, is_kept: bool) -> dict[str, Any]:
    response, verdict = attempt.response, attempt.verdict
    parsed = parse_response(response.text)
    thought = parsed if isinstance(parsed, Thought) else Thought("", response.text)
    return {
        "prompt_id": response.prompt_id,
        "sample": response.sample,
        "text_id": content_id(response.text),
        "label": response.label,
        "prompt": response.prompt,
        "think": thought.think,
        "answer": thought.answer,
        "steering": response.steering,
        "rung": response.rung,
        "tokens": response.num_tokens,
        "guard": verdict.guard,
        "decision": verdict.decision,
        "reason": verdict.reason,
        "share": _share(verdict),
        "category": verdict.category,
        "labels": verdict.labels,
        "refusal": verdict.refusal,
        "windows": verdict.windows,
        "kept": is_kept,
        "marks": [{"decision": mark.decision, "by": mark.by, "at": mark.at} for mark in attempt.marks],
    }
