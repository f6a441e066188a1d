"""An estimate as a table for the terminal."""

import re
from typing import NamedTuple

from thinksafe.errors import UserError
from thinksafe.estimate.stages import SAMPLING_SHARE, SCORING_SHARE, TRAINING_SHARE, Estimate
from thinksafe.formatting import bar, duration, short_number

_TIME_BAR_WIDTH, _MEMORY_BAR_WIDTH = 24, 10


class Price(NamedTuple):
    """Price of one GPU hour: the text of its currency is before (`prefix`) or after (`suffix`) the number."""

    prefix: str
    amount: float
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
        return cls(match[1], float(match[2]), match[3])

    def format(self, hours: float) -> str:
        """Return the price of `hours` GPU hours as text with two decimals, such as `$1,234.50`."""
        return f"{self.prefix}{self.amount * hours:,.2f}{self.suffix}"


def estimate_table(estimate: Estimate, name: str, price: Price | None) -> str:
    """Return a table with expected time, tokens and memory per GPU of each stage, then the total, the roofline, the
    assumptions and the problems.

    Args:
        name: name of the recipe.
        price: price of a GPU hour, to add the cost to the total; None to leave the cost out.
    """
    hardware, num_gpus = estimate.hardware, estimate.num_gpus
    gpus = f"one {hardware.name}" if num_gpus == 1 else f"{num_gpus} x {hardware.name}"
    rates = "measured" if hardware.measured else "expected from its data sheet"
    longest = max(stage.seconds for stage in estimate.stages) or 1.0
    lines = [f"{name} on {gpus}, whose rates are {rates}", ""]
    for stage in estimate.stages:
        title = "unsteered" if stage.name == "probe" else stage.name.replace("_", " ")  # as the progress bar shows it
        lines.append(
            f"{title:>16}  {duration(stage.seconds):>12}  "
            f"{bar(stage.seconds / longest, _TIME_BAR_WIDTH)}  {short_number(stage.tokens):>7} tokens  "
            f"{stage.peak_bytes / 2**30:6.1f} GiB  "
            f"{bar(stage.peak_bytes / hardware.memory_bytes, _MEMORY_BAR_WIDTH, '░')}  "
            + " + ".join(f"{part} {size / 2**30:.1f}" for part, size in stage.memory.items())
        )
        lines.append(f"{'':32}{stage.remark}")
    hours = num_gpus * estimate.seconds / 3600
    cost = f"  {price.format(hours)} at {price.format(1)} a GPU hour" if price else ""
    roofline = sum(stage.roofline_seconds for stage in estimate.stages)
    lines += [
        "",
        f"{'total':>16}  {duration(estimate.seconds):>12}  {hours:.1f} GPU hours{cost}",
        f"{'roofline':>16}  {duration(roofline):>12}  least time at the GPU's rates",
        f"{'note':>16}  times are counted, not measured: they assume that sampling reaches {SAMPLING_SHARE:.0%}, "
        f"the guard {SCORING_SHARE:.0%} and training {TRAINING_SHARE:.0%} of the roofline",
    ]
    lines += [f"{'assumed':>16}  {line}" for line in estimate.assumptions]
    lines += [f"{'does not fit':>16}  {line}" for line in estimate.problems]
    return "\n".join(lines)
