"""Checks of a stage's input: the files exist, samples are unique, responses are well-formed, weights are the same."""

from pathlib import Path

from thinksafe.data.atomic import sha256, write_atomically
from thinksafe.data.jsonl import read_records
from thinksafe.data.records import Response
from thinksafe.errors import UserError
from thinksafe.run.directory import RunDir
from thinksafe.text.chat import Chat, parse_response


def require_stage_output(run: RunDir, file: Path, stage: str, remedy: str) -> Path:
    """Return the path of a file that a stage of this run wrote, or that was imported.

    Args:
        remedy: what to run, for the error message.

    Raises:
        UserError: the file does not exist, or was changed after the stage wrote it.
    """
    if not run.is_done(stage) and not run.workers.on_leader(file.exists):
        raise UserError(f"{file}: does not exist yet; run {remedy}")
    return file


def check_unique_samples(file: Path) -> None:
    """Raise a UserError if two responses have the same prompt and sample number, which identify a verdict."""
    seen = set()
    for number, response in enumerate(read_records(file, Response), start=1):
        if (response.prompt_id, response.sample) in seen:
            raise UserError(
                f"{file}: record {number} is a second response with sample {response.sample} to its prompt; "
                "number the responses to a prompt differently with 'sample'"
            )
        seen.add((response.prompt_id, response.sample))


def response_problem(response: Response, chat: Chat) -> str | None:
    """Return the reason why a response cannot be used for training, independent of any guard, or None."""
    unfinished = {"length": "truncated", "repetition": "repetition", "nan": "nan"}
    if response.finish_reason in unfinished:
        return unfinished[response.finish_reason]
    if chat.has_control_token(response.text):
        return "control_token"
    parsed = parse_response(response.text)
    return parsed if isinstance(parsed, str) else None


def check_same_student(folder: Path, student: Path) -> None:
    """Raise a UserError if the evaluation in this folder began with another adapter or checkpoint.

    Args:
        folder: folder of the evaluation. The first call writes the hashes of the student's weights to it.
        student: folder of the trained adapter or checkpoint.
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
