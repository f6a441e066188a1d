"""An estimate as a table on a terminal."""

import re
from dataclasses import dataclass

from thinksafe.errors import UserError
from thinksafe.estimate.stages import SAMPLING_SHARE, SCORING_SHARE, TRAINING_SHARE, Estimate
from thinksafe.formatting import bar, duration, in_short

_TIME_BAR, _MEMORY_BAR = 24, 10


@dataclass(frozen=True)
class Price:
    """What one GPU costs an hour, and how its currency is written around the number."""

    amount: float
    before: str
    after: str

    @classmethod
    def parse(cls, text: str) -> "Price":
        """From `3.5`, `$3.5` or `3.5 EUR`.

        Raises:
            UserError: no number, or more than one.
        """
        found = re.fullmatch(r"(\D*?)(\d+(?:\.\d+)?)(\D*?)(?:/h)?", text.strip())
        if not found:
            raise UserError(f"--price {text!r}: expected what a GPU costs an hour, such as 3.5, $3.5 or '3.5 EUR'")
        return cls(float(found[2]), found[1], found[3])

    def of(self, hours: float) -> str:
        """So many GPU hours."""
        return f"{self.before}{self.amount * hours:,.2f}{self.after}"


def estimate_table(estimate: Estimate, name: str, memory_bytes: int, price: Price | None) -> str:
    """Stage by stage: time, tokens and memory, each with a bar; then the total, and what it rests on.

    Args:
        name: of the recipe.
        memory_bytes: of one GPU, what its memory bars are a share of.
    """
    gpus = f"one {estimate.gpu}" if estimate.num_gpus == 1 else f"{estimate.num_gpus} x {estimate.gpu}"
    rates = "measured" if estimate.measured else "expected from its data sheet"
    longest = max(stage.seconds for stage in estimate.stages) or 1.0
    lines = [f"{name} on {gpus}, whose rates are {rates}", ""]
    for stage in estimate.stages:
        gib = stage.peak_bytes / 2**30
        lines.append(
            f"{stage.name.replace('_', ' '):>16}  {duration(stage.seconds):>12}  "
            f"{bar(stage.seconds / longest, _TIME_BAR)}  {in_short(stage.tokens):>7} tokens  {gib:6.1f} GiB  "
            f"{bar(stage.peak_bytes / memory_bytes, _MEMORY_BAR, '░')}  "
            + " + ".join(f"{part} {size / 2**30:.1f}" for part, size in stage.memory.items())
        )
        lines.append(f"{'':32}{stage.remark}")
    hours = estimate.num_gpus * estimate.seconds / 3600
    cost = f"  {price.of(hours)} at {price.of(1)} a GPU hour" if price else ""
    lines += ["", f"{'in all':>16}  {duration(estimate.seconds):>12}  {hours:.1f} GPU hours{cost}"]
    least = sum(stage.least_seconds for stage in estimate.stages)
    lines.append(
        f"{'at the limit':>16}  {duration(least):>12}  expected is sampling at {SAMPLING_SHARE:.0%}, the guard at "
        f"{SCORING_SHARE:.0%} and training at {TRAINING_SHARE:.0%} of it: aims, not measured yet"
    )
    lines += [f"{'assumed':>16}  {line}" for line in estimate.assumptions]
    lines += [f"{'does not fit':>16}  {line}" for line in estimate.problems]
    return "\n".join(lines)
