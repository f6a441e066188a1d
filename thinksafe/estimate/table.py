"""An estimate as a table for the terminal."""

import re
from dataclasses import dataclass

from thinksafe.errors import UserError
from thinksafe.estimate.stages import SAMPLING_SHARE, SCORING_SHARE, TRAINING_SHARE, Estimate
from thinksafe.formatting import bar, duration, short_number

_TIME_BAR_WIDTH, _MEMORY_BAR_WIDTH = 24, 10


@dataclass(frozen=True)
class Price:
    """Price of one GPU hour: `amount`, and the text of its currency before (`prefix`) or after (`suffix`) the
    number."""

    amount: float
    prefix: str
    suffix: str

    @classmethod
    def parse(cls, text: str) -> "Price":
        """Return the price in a text such as `3.5`, `$3.5` or `3.5 EUR`, with or without `/h` at the end.

        Raises:
            UserError: the text has no number, or more than one.
        """
        match = re.fullmatch(r"(\D*?)(\d+(?:\.\d+)?)(\D*?)(?:/h)?", text.strip())
        if not match:
            raise UserError(f"--price {text!r}: must be the price of one GPU hour, such as 3.5, $3.5 or '3.5 EUR'")
        return cls(float(match[2]), match[1], match[3])

    def format(self, hours: float) -> str:
        """Return the price of `hours` GPU hours as text with two decimals, such as `$1,234.50`."""
        return f"{self.prefix}{self.amount * hours:,.2f}{self.suffix}"


def estimate_table(estimate: Estimate, name: str, memory_bytes: int, price: Price | None) -> str:
    """Return the text of a table with expected time, tokens and memory per GPU of each stage, then the total, the
    roofline, the assumptions and the problems.

    Args:
        name: name of the recipe.
        memory_bytes: memory of one GPU; a memory bar of full width shows this size.
        price: price of a GPU hour, to add the cost to the total; None to leave the cost out.
    """
    gpus = f"one {estimate.gpu}" if estimate.num_gpus == 1 else f"{estimate.num_gpus} x {estimate.gpu}"
    rates = "measured" if estimate.measured else "expected from its data sheet"
    longest = max(stage.seconds for stage in estimate.stages) or 1.0
    lines = [f"{name} on {gpus}, whose rates are {rates}", ""]
    for stage in estimate.stages:
        gib = stage.peak_bytes / 2**30
        title = "unsteered" if stage.name == "probe" else stage.name.replace("_", " ")  # as the progress bar shows it
        lines.append(
            f"{title:>16}  {duration(stage.seconds):>12}  "
            f"{bar(stage.seconds / longest, _TIME_BAR_WIDTH)}  {short_number(stage.tokens):>7} tokens  {gib:6.1f} GiB  "
            f"{bar(stage.peak_bytes / memory_bytes, _MEMORY_BAR_WIDTH, '░')}  "
            + " + ".join(f"{part} {size / 2**30:.1f}" for part, size in stage.memory.items())
        )
        lines.append(f"{'':32}{stage.remark}")
    hours = estimate.num_gpus * estimate.seconds / 3600
    cost = f"  {price.format(hours)} at {price.format(1)} a GPU hour" if price else ""
    lines += ["", f"{'total':>16}  {duration(estimate.seconds):>12}  {hours:.1f} GPU hours{cost}"]
    roofline = sum(stage.roofline_seconds for stage in estimate.stages)
    lines.append(f"{'roofline':>16}  {duration(roofline):>12}  least time at the GPU's rates")
    lines.append(
        f"{'note':>16}  times are counted, not measured: they assume that sampling reaches {SAMPLING_SHARE:.0%}, "
        f"the guard {SCORING_SHARE:.0%} and training {TRAINING_SHARE:.0%} of the roofline"
    )
    lines += [f"{'assumed':>16}  {line}" for line in estimate.assumptions]
    lines += [f"{'does not fit':>16}  {line}" for line in estimate.problems]
    return "\n".join(lines)
