"""What stages take in: files become records and training sequences, or are refused where they would mislead a stage.

Files come from this run, from elsewhere (`--responses`, `--data`) or from the recipe's evaluation sets.
"""

from pathlib import Path

from thinksafe.data.atomic import sha256, write_atomically
from thinksafe.data.jsonl import read_records
from thinksafe.data.records import Response
from thinksafe.errors import UserError
from thinksafe.run.directory import RunDir
from thinksafe.text.chat import Chat, parse_response


def required(run: RunDir, file: Path, stage: str, remedy: str) -> Path:
    """A file that a stage wrote, unchanged since, or that was taken in from elsewhere."""
    if not run.is_done(stage) and not run.workers.once(file.exists):
        raise UserError(f"{file}: not there yet; run {remedy}")
    return file


def refuse_repeated(file: Path) -> None:
    """A verdict is on a prompt and a sample number, so two responses must not share both."""
    seen = set()
    for number, response in enumerate(read_records(file, Response), start=1):
        if (response.prompt_id, response.sample) in seen:
            raise UserError(
                f"{file}: record {number} is a second response with sample {response.sample} to its prompt; "
                "give the responses to a prompt different 'sample' numbers"
            )
        seen.add((response.prompt_id, response.sample))


def response_problem(response: Response, chat: Chat) -> str | None:
    """Why a response cannot be trained on whatever a guard says, or None."""
    unfinished = {"length": "truncated", "loop": "loop", "nan": "nan"}
    if response.finish_reason in unfinished:
        return unfinished[response.finish_reason]
    if chat.has_control_token(response.text):
        return "control_token"
    parsed = parse_response(response.text)
    return parsed if isinstance(parsed, str) else None


def refuse_other_student(folder: Path, student: Path) -> None:
    """An evaluation that was begun with one adapter or checkpoint is not finished, or reported, with another."""
    weights = sorted(student.glob("*.safetensors"))
    if not weights:
        raise UserError(f"{student}: no adapter_model.safetensors there, so there is no trained student to evaluate")
    identity = "\n".join(map(sha256, weights))
    note = folder / "student.sha256"
    if note.exists() and note.read_text() == identity:
        return
    if any(shard.stat().st_size for shard in folder.glob("*.jsonl*")):
        raise UserError(f"{folder}: was measured with other weights than {student} holds now; give a new --out folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(note, identity)
