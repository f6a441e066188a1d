"""Construction of a guard from the guard section of a recipe."""

from collections import Counter
from collections.abc import Callable, Sequence

from thinksafe.guards.base import Guard
from thinksafe.guards.config import GuardConfig
from thinksafe.guards.ensemble import Ensemble
from thinksafe.guards.model_guard import ModelGuard
from thinksafe.guards.oracle import OracleGuard
from thinksafe.model.decoder import Decoder
from thinksafe.text.tokenizer import SafeTokenizer

_POLICY_KEYS = ("scope", "threshold", "margin", "min_verdict_probability", "voting")
"""Keys that distinguish guards of one checkpoint by name; the format is too long for a name."""


def build_guard(config: GuardConfig, load: Callable[[GuardConfig], tuple[Decoder | None, SafeTokenizer]]) -> Guard:
    """Return a guard with its checkpoints loaded.

    Args:
        load: reads a guard's checkpoint; the decoder is None if the guard is only to be checked.

    Raises:
        UserError: a checkpoint does not fit its format.
    """
    if config.kind == "oracle":
        return OracleGuard()
    if config.kind == "ensemble":
        members = [build_guard(member, load) for member in config.members]
        return Ensemble(dict(zip(_unique_names(config.members, members), members, strict=True)), config.voting)
    return ModelGuard(*load(config), config)


def _unique_names(configs: Sequence[GuardConfig], guards: Sequence[Guard]) -> list[str]:
    """Return the guards' names; guards of one checkpoint get the keys in which they differ, then a number, added."""
    names = [guard.name for guard in guards]
    for name in [name for name, count in Counter(names).items() if count > 1]:
        indices = [index for index, other in enumerate(names) if other == name]
        policies = {key: [getattr(configs[index], key) for index in indices] for key in _POLICY_KEYS}
        differing = {key: values for key, values in policies.items() if any(value != values[0] for value in values)}
        suffixes = [" ".join(f"{key}={values[n]}" for key, values in differing.items()) for n in range(len(indices))]
        if len(set(suffixes)) < len(suffixes):
            suffixes = [f"{number} {suffix}".strip() for number, suffix in enumerate(suffixes, start=1)]
        for index, suffix in zip(indices, suffixes, strict=True):
            names[index] += f"[{suffix}]"
    return names
