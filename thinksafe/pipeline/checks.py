"""Checks of a stage's input: the files exist, samples are unique, responses are well-formed, weights are the same."""

from collections.abc import Sequence
from pathlib import Path

from thinksafe.data.atomic import sha256, write_atomically
from thinksafe.data.jsonl import read_records
from thinksafe.data.records import Response
from thinksafe.errors import UserError
from thinksafe.run.directory import RunDir
from thinksafe.text.chat import Chat, parse_response


def require_stage_output(run: RunDir, file: Path, stage: str, remedy: str) -> Path:
    """Return `file`, which the stage wrote or which was imported. Raise a UserError with a remedy if it does not exist;
    also if it was changed after the stage wrote it."""
    if not run.is_done(stage) and not run.workers.on_leader(file.exists):
        raise UserError(f"{file}: does not exist yet; run {remedy}")
    return file


def check_unique_samples(file: Path, source: Path) -> None:
    """Raise a UserError if two responses in a JSONL file have the same prompt id and sample, which identify a verdict.
    The message names the source of the responses, a file or run directory."""
    seen = set()
    for number, response in enumerate(read_records(file, Response), start=1):
        if (response.prompt_id, response.sample) in seen:
            raise UserError(
                f"{source}: record {number} is a second response with sample {response.sample} to its prompt; "
                "number the responses to a prompt differently with 'sample'"
            )
        seen.add((response.prompt_id, response.sample))


def response_problem(response: Response, chats: Sequence[Chat]) -> str | None:
    """Return the code of the reason why a response is malformed, so that training cannot use it; None if it is not.

    The first reason that applies counts: `truncated` (it ended at the token limit), `repetition` or `nan` (sampling
    stopped because of these), `invalid_utf8` (some of its tokens are bytes of no character), `control_token` (its text
    has a control token of one of the `chats` other than the think tags), `no_think_block`, `nested_think` or
    `empty_answer` (see `parse_response`).
    """
    if response.finish_reason != "stop":
        return "truncated" if response.finish_reason == "length" else response.finish_reason
    if any(chat.has_control_token(response.text) for chat in chats):
        return "control_token"
    parsed = parse_response(response.text)
    return parsed if isinstance(parsed, str) else None


def check_same_student(folder: Path, student: Path) -> None:
    """Raise a UserError if the records of an evaluation come from another trained student than this adapter or
    checkpoint.

    The hashes of the student's weights are kept in student.sha256 of the evaluation's folder. They are written if it
    holds no record yet, also over the hashes of another student.
    """
    weights = sorted(student.glob("*.safetensors"))
    if not weights:
        raise UserError(f"{student}: contains no *.safetensors file, so there is no trained student to evaluate")
    digests = "\n".join(map(sha256, weights))
    digest_file = folder / "student.sha256"
    if digest_file.exists() and digest_file.read_text() == digests:
        return
    if any(file.stat().st_size for file in folder.glob("*.jsonl*")):
        raise UserError(f"{folder}: was measured with other weights than the ones in {student}; use a new --out folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(digest_file, digests)
