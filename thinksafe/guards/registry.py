"""From a recipe's guard to one that judges."""

from collections import Counter
from collections.abc import Callable, Sequence

from thinksafe.guards.base import Guard
from thinksafe.guards.config import GuardConfig
from thinksafe.guards.ensemble import Ensemble
from thinksafe.guards.model_guard import ModelGuard
from thinksafe.guards.oracle import OracleGuard
from thinksafe.model.decoder import Decoder
from thinksafe.text.tokenizer import SafeTokenizer

_RULES = ("judged", "threshold", "margin", "min_mass", "agree")
"""What guards of one checkpoint may differ in that is short enough for a name."""


def build_guard(config: GuardConfig, load: Callable[[GuardConfig], tuple[Decoder | None, SafeTokenizer]]) -> Guard:
    """A guard, with the checkpoints it needs.

    Args:
        load: reads a guard's checkpoint; without the decoder where the guard is only to be checked.

    Raises:
        UserError: a checkpoint that does not fit its format.
    """
    if config.kind == "oracle":
        return OracleGuard()
    if config.kind == "ensemble":
        members = [build_guard(member, load) for member in config.members]
        return Ensemble(dict(zip(_told_apart(config.members, members), members, strict=True)), config.agree)
    return ModelGuard(*load(config), config)


def _told_apart(configs: Sequence[GuardConfig], guards: Sequence[Guard]) -> list[str]:
    """The guards' names. Those of one checkpoint also say by which rules they differ, or else are counted."""
    names = [guard.name for guard in guards]
    for name in [name for name, count in Counter(names).items() if count > 1]:
        alike = [place for place, own in enumerate(names) if own == name]
        rules = {rule: [getattr(configs[place], rule) for place in alike] for rule in _RULES}
        differing = {rule: values for rule, values in rules.items() if any(value != values[0] for value in values)}
        said = [" ".join(f"{rule}={values[n]}" for rule, values in differing.items()) for n in range(len(alike))]
        if len(set(said)) < len(said):
            said = [f"{number} {words}".strip() for number, words in enumerate(said, start=1)]
        for place, words in zip(alike, said, strict=True):
            names[place] += f"[{words}]"
    return names
