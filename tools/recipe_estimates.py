"""Writes into each recipe what it is expected to take on one GPU: `python -m tools.recipe_estimates`.

The lines stand above the recipe and come from thinksafe/estimate.py; tests/test_estimate.py holds them to it.
"""

from pathlib import Path

from thinksafe.estimate.stages import estimate
from thinksafe.formatting import duration
from thinksafe.hardware import GPU_NAMES, hardware_named
from thinksafe.recipe.loading import load_recipe

RECIPES = Path(__file__).parents[1] / "launch" / "recipes"
NAMES = [
    *(f"qwen3-{size}" for size in ("0.6b", "1.7b", "4b", "8b", "14b", "32b")),
    *(f"r1-distill-{model}" for model in ("qwen-1.5b", "qwen-7b", "llama-8b")),
]
"""Recipes for the paper's models."""
_FIRST = "# Expected on one GPU, as `thinksafe estimate` counts it (not measured yet):"


def expectation(name: str) -> str:
    """The comment's lines."""
    lines = [_FIRST]
    for gpu in GPU_NAMES:
        found = estimate(load_recipe(str(RECIPES / f"{name}.yaml")), hardware_named(gpu))
        if found.problems:
            lines.append(f"#   {gpu:<8} does not fit: {found.problems[0]}")
            continue
        stages = {stage.name: stage for stage in found.stages}
        taken = ", ".join(f"{part} {duration(stages[part].seconds)}" for part in ("generate", "filter", "train"))
        lines.append(
            f"#   {gpu:<8} {duration(found.seconds)} in all: {taken}; training takes "
            f"{stages['train'].peak_bytes / 2**30:.0f} GiB"
        )
    return "\n".join(lines) + "\n"


def with_expectation(text: str, name: str) -> str:
    """A recipe's text with its lines anew."""
    before, mark, after = text.partition(_FIRST + "\n")
    if not mark:  # below the opening comment
        lines = text.splitlines(keepends=True)
        opening = next(number for number, line in enumerate(lines) if not line.startswith("#"))
        before, after = "".join(lines[:opening]), "".join(lines[opening:])
    rest = after.splitlines(keepends=True)
    return before + expectation(name) + "".join(line for line in rest if not line.startswith("#   "))


if __name__ == "__main__":
    for recipe in NAMES:
        file = RECIPES / f"{recipe}.yaml"
        file.write_text(with_expectation(file.read_text(), recipe))
        print(file)
