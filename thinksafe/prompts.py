"""Prompts from wherever a recipe names them: a file, a folder of parquet, or a data set on the Hugging Face hub."""

from thinksafe.errors import UserError
from thinksafe.paths import expand
from thinksafe.records import Prompt, prompts_from_rows, read_prompts


def load_prompts(source: str) -> list[Prompt]:
    """Prompts in order, duplicates removed.

    Args:
        source: a .jsonl, .json or .parquet file; a folder of such files; or `owner/name` on the hub, split `train`.

    Raises:
        UserError: nothing there, or a row that is no prompt.
    """
    path = expand(source)
    if path.is_file():
        return read_prompts(path)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in (".jsonl", ".json", ".parquet"))
        if not files:
            raise UserError(f"prompts: no .jsonl, .json or .parquet file in {path}")
        return list({prompt.id: prompt for file in files for prompt in read_prompts(file)}.values())
    if source.startswith((".", "/", "~")) or source.count("/") != 1 or path.suffix in (".jsonl", ".json", ".parquet"):
        raise UserError(f"prompts: no file or folder {source!r}")
    from datasets import load_dataset

    try:
        rows = load_dataset(source, split="train")
    except Exception as error:  # the hub client raises a dozen kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"prompts: {source!r} is no file here and the hub did not give it: {reason}") from None
    return prompts_from_rows(((f"{source}: row {n}", row) for n, row in enumerate(rows, start=1)), source)
