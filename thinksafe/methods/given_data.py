"""Methods that train on a given data set instead of sampled responses."""

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from thinksafe.data.jsonl import Row
from thinksafe.data.records import Example, Label
from thinksafe.errors import UserError
from thinksafe.methods.base import Method
from thinksafe.text.chat import THINK_CLOSE, THINK_OPEN, parse_response


@dataclass(frozen=True)
class GivenData(Method):
    """A method that trains on the rows of a data set, without sampling and without a guard."""

    stages: ClassVar[tuple[str, ...]] = ("load",)
    columns: ClassVar[tuple[str, ...]]
    """Columns that the data set must have."""
    published_counts: ClassVar[dict[Label, int]] = {}
    """Label -> number of rows of the published data set; empty if the method uses a part of it, or the user's data."""
    published_config: ClassVar[str | None] = None
    """Configuration of the published data set on the hub, if it has several."""

    response_tokens: ClassVar[float | None] = None
    """Mean number of trained tokens of an example, for an estimate; None if it is that of a reasoning response."""

    source: str = ""
    """File, folder or data set on the hub (split `train`) with the columns of the published data set."""

    @abstractmethod
    def example_of(self, row: Row) -> Example | str:
        """Return the example of a row that has all `columns`, or the reason why it is left out.

        Raises:
            UserError: a column has a value of another kind than in the published data set.
        """

    @property
    def expected_counts(self) -> dict[Label, int]:
        """Label -> number of examples of the published data set, for an estimate; empty if it is unknown."""
        return self.published_counts

    def select(self, examples: Iterable[Example]) -> Iterable[Example]:
        """Return the examples to train on, out of those of all rows."""
        return examples


def text_in(row: Row, column: str) -> str:
    """Return a column that must hold a text with more than white space; raise a UserError otherwise."""
    value = row.values[column]
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{row.where}: {column!r} must be a text, found {value!r}")
    return value


def reasoning_example(prompt: str, response: str, label: Label) -> Example | str:
    """Return the example of a response in which the opening think tag may be missing, or the reason of `parse_response`
    why it is left out. A response without a closed think block is left out."""
    if THINK_OPEN not in response and THINK_CLOSE in response:
        response = f"{THINK_OPEN}\n{response}"
    parsed = parse_response(response)
    if isinstance(parsed, str):
        return parsed
    return Example(prompt, f"{THINK_OPEN}\n{parsed.think}\n{THINK_CLOSE}\n\n{parsed.answer}", label)
