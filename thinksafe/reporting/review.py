"""The review page: one HTML file in which a person reads the most uncertain responses and marks them.

The page needs no server and no network, and it cannot change a run: the browser saves the marks as a file, and
`thinksafe filter --marks` imports that file. The records are data in a JSON block, and the script shows them as text,
never as markup. A content security policy allows only the page's script, and no connection.
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
from thinksafe.run.marks import read_marks, refilter_command
from thinksafe.text.chat import ParsedResponse, parse_response


def write_review(run: RunDir, max_responses: int) -> Path:
    """Write `review.html` with the most uncertain responses, least certain first. Malformed responses are not on it.

    Args:
        max_responses: maximum number of responses on the page. The page shows how many others there are.

    Returns:
        The path of review.html.
    """
    attempts = Attempts(run, read_marks(run))
    threshold, counts = run.recipe.guard.threshold, Counter()

    def judged_attempts() -> Iterable[tuple[Attempt, bool]]:
        for prompt_attempts in attempts:
            kept = choose(prompt_attempts)
            for attempt in prompt_attempts:
                counts[attempt.verdict.decision] += 1
                if attempt.verdict.decision != "dropped":
                    yield attempt, attempt is kept

    least_certain = nsmallest(
        max_responses, judged_attempts(), key=lambda pair: certainty_key(pair[0].verdict, threshold)
    )
    command = f"thinksafe filter --out {shlex.quote(str(run.path))} --marks marks.jsonl"
    page = {
        "run": content_id(run.recipe.to_yaml(), str(run.path.resolve())),
        "name": run.recipe.name,
        "too_late": run.training_has_begun,
        "command": refilter_command(run, "marks.jsonl") if run.training_has_begun else command,
        "threshold": threshold,
        "margin": run.recipe.guard.margin,
        "judged": counts.total() - counts["dropped"],
        "malformed": counts["dropped"],
        "records": [_page_record(attempt, is_kept) for attempt, is_kept in least_certain],
    }
    write_atomically(run.path / "review.html", render_page(page))
    return run.path / "review.html"


def certainty_key(verdict: Verdict, threshold: float) -> tuple[bool, float, str, int]:
    """Return a sort key that orders verdicts by certainty, least certain first.

    Verdicts `unknown` come first; then the distance |p_unsafe / (p_safe + p_unsafe) - threshold| counts, which is 0
    without probabilities; then prompt id and sample.
    """
    return (verdict.decision != "unknown", _threshold_distance(verdict, threshold), verdict.prompt_id, verdict.sample)


def render_page(page: dict[str, Any]) -> str:
    """Return the HTML text of the review page.

    Args:
        page: the JSON data of the page, as `write_review` collects it; its `name` is in the title.
    """
    folder = files("thinksafe.reporting")
    html, style, script = (
        (folder / f"review.{suffix}").read_text(encoding="utf-8") for suffix in ("html", "css", "js")
    )
    # Only "<" could end the script block; JSON can write it as an escape.
    data = json.dumps(page, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    sources = f"style-src '{_csp_hash(style)}'; script-src '{_csp_hash(script)}'"
    return (
        Environment(autoescape=True)
        .from_string(html)
        .render(
            title=f"Review: {page['name']}",
            policy=f"default-src 'none'; {sources}; base-uri 'none'",
            style=Markup(style),
            script=Markup(script),
            data=Markup(data),
        )
    )


def _csp_hash(text: str) -> str:
    """Return the source expression that allows a style or script with exactly this text: `sha256-` and base64."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _unsafe_share(verdict: Verdict) -> float | None:
    """Return p_unsafe / (p_safe + p_unsafe), which is compared with the threshold.

    It is None if a probability is None or their sum is not positive.
    """
    if verdict.p_safe is None or verdict.p_unsafe is None or not verdict.p_safe + verdict.p_unsafe > 0:
        return None
    return verdict.p_unsafe / (verdict.p_safe + verdict.p_unsafe)


def _threshold_distance(verdict: Verdict, threshold: float) -> float:
    """Return |unsafe share - threshold|; 0 if there is no share."""
    share = _unsafe_share(verdict)
    return 0.0 if share is None else abs(share - threshold)


def _page_record(attempt: Attempt, is_kept: bool) -> dict[str, Any]:
    """Return the data of one response on the page. The answer of a response with a format problem is its whole text."""
    response, verdict = attempt.response, attempt.verdict
    parsed = parse_response(response.text)
    parts = parsed if isinstance(parsed, ParsedResponse) else ParsedResponse("", response.text)
    return {
        "prompt_id": response.prompt_id,
        "sample": response.sample,
        "text_id": content_id(response.text),
        "label": response.label,
        "prompt": response.prompt,
        "think": parts.think,
        "answer": parts.answer,
        "steering": response.steering,
        "rung": response.rung,
        "tokens": response.num_tokens,
        "guard": verdict.guard,
        "decision": verdict.decision,
        "reason": verdict.reason,
        "share": _unsafe_share(verdict),
        "category": verdict.category,
        "labels": verdict.labels,
        "refusal": verdict.refusal,
        "windows": verdict.windows,
        "kept": is_kept,
        "marks": [{"decision": mark.decision, "by": mark.by, "at": mark.at} for mark in attempt.marks],
    }
