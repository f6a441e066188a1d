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
from collections.abc import Iterator
from heapq import nsmallest
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from thinksafe.data.atomic import write_atomically
from thinksafe.data.records import Verdict, content_id
from thinksafe.data.selection import Attempt
from thinksafe.run.attempts import Attempts
from thinksafe.run.directory import RunDir
from thinksafe.run.marks import read_marks, refilter_command
from thinksafe.text.chat import ParsedResponse, parse_response


def write_review(run: RunDir, max_responses: int) -> Path:
    """Write review.html with at most `max_responses` responses, the most uncertain first, and return its path.

    Malformed responses are never on the page. The page shows their number, and the number of other missing responses.
    """
    attempts = Attempts(run, read_marks(run))
    guard, counts = run.recipe.guard, Counter()

    def judged_attempts() -> Iterator[tuple[Attempt, bool]]:
        for prompt_attempts in attempts:
            kept = run.recipe.method.choose(prompt_attempts, run.recipe.seed)
            for attempt in prompt_attempts:
                counts[attempt.verdict.decision] += 1
                if attempt.verdict.decision != "dropped":
                    yield attempt, attempt is kept

    least_certain = nsmallest(
        max_responses, judged_attempts(), key=lambda pair: certainty_key(pair[0].verdict, guard.threshold)
    )
    command = f"thinksafe filter --out {shlex.quote(str(run.path))} --marks marks.jsonl"
    page = {
        "run": content_id(run.recipe.to_yaml(), str(run.path.resolve())),
        "name": run.recipe.name,
        "too_late": run.training_has_begun,
        "command": refilter_command(run, "marks.jsonl") if run.training_has_begun else command,
        "threshold": guard.threshold,
        "margin": guard.margin,
        "judged": counts.total() - counts["dropped"],
        "malformed": counts["dropped"],
        "records": [_page_record(attempt, is_kept) for attempt, is_kept in least_certain],
    }
    write_atomically(run.path / "review.html", render_page(page))
    return run.path / "review.html"


def certainty_key(verdict: Verdict, threshold: float) -> tuple[bool, float, str, int]:
    """Return a sort key that orders verdicts by certainty, least certain first.

    Verdicts `unknown` come first; then the distance of P(unsafe) from the threshold counts, which is 0 without
    probabilities; then prompt id and sample.
    """
    distance = 0.0 if verdict.unsafe_share is None else abs(verdict.unsafe_share - threshold)
    return verdict.decision != "unknown", distance, verdict.prompt_id, verdict.sample


def render_page(page: dict[str, Any]) -> str:
    """Return the HTML text of the review page from its JSON data, as `write_review` collects them."""
    folder = files("thinksafe.reporting")
    page_css, review_css, script, html = (
        (folder / name).read_text(encoding="utf-8") for name in ("page.css", "review.css", "review.js", "review.html")
    )
    style, template = page_css + review_css, Environment(autoescape=True).from_string(html)
    sources = f"style-src '{_csp_hash(style)}'; script-src '{_csp_hash(script)}'"
    # Only "<" could end the script block; JSON can write it as an escape.
    data = json.dumps(page, ensure_ascii=False, allow_nan=False, default=vars).replace("<", "\\u003c")
    return template.render(
        page=page,
        policy=f"default-src 'none'; {sources}; base-uri 'none'",
        style=Markup(style),
        script=Markup(script),
        data=Markup(data),
    )


def _csp_hash(text: str) -> str:
    """Return the source expression that allows a style or script with exactly this text: `sha256-` and base64."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _page_record(attempt: Attempt, is_kept: bool) -> dict[str, Any]:
    """Return the data of one response on the page. The answer of a response with a format problem is its whole text."""
    parsed = parse_response(attempt.response.text)
    parts = parsed if isinstance(parsed, ParsedResponse) else ParsedResponse("", attempt.response.text)
    return {
        **{name: value for name, value in attempt.fields.items() if name != "text"},
        "think": parts.think,
        "answer": parts.answer,
        "unsafe_share": attempt.verdict.unsafe_share,
        "kept": is_kept,
        "marks": attempt.audit_marks,
    }
