"""Stage load: the examples of a method that trains on a given data set."""

from collections import Counter
from collections.abc import Iterator

from thinksafe.data.atomic import write_records
from thinksafe.data.records import Example
from thinksafe.data.sources import rows_of
from thinksafe.distributed.workers import leader_only
from thinksafe.errors import UserError
from thinksafe.run.directory import RunDir
from thinksafe.run.progress import print_note
from thinksafe.run.stage import run_stage


@leader_only
def load_examples(run: RunDir) -> None:
    """Write accepted.jsonl from the data set of the recipe's method, which must be a `GivenData`.

    Raises:
        UserError: the data set cannot be read, has no such column or gives no example.
    """
    if run.is_done("load"):
        return
    method = run.recipe.method
    dropped: Counter[str] = Counter()
    num_rows = 0

    def examples() -> Iterator[Example]:
        nonlocal num_rows
        config = method.published_config if method.source == type(method).source else None
        for row in rows_of(method.source, "method.source", config, default_split="train", columns=method.columns):
            if missing := [column for column in method.columns if column not in row.values]:
                raise UserError(
                    f"{row.where}: no column {', '.join(missing)}; there are {', '.join(sorted(row.values))}"
                )
            num_rows += 1
            example = method.example_of(row)
            if isinstance(example, str):
                dropped[example] += 1
            else:
                yield example

    with run_stage(run, "load") as stage:
        file = run.path / "accepted.jsonl"
        write_records(file, method.select(examples()))
        stage.files, stage.figures["dropped"] = [file], dict(dropped)
        stage.records = num_rows - dropped.total()
    counts = "".join(f", {count:,} x {reason}" for reason, count in dropped.most_common())
    print_note("load", f"{num_rows:,} rows of {method.source}{counts}")
    published = sum(method.published_counts.values())
    if published and num_rows != published:
        print_note("load", f"the published data set of method {method.type} has {published:,} rows")
