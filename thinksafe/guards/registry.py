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
    """Return the guard that a recipe describes, with its checkpoints loaded.

    Args:
        config: the guard section of a recipe.
        load: called with the configuration of each guard that is one model; returns its decoder and tokenizer. If the
            decoder is None, the guard only checks that the tokenizer fits the format, and cannot judge.

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
    """Return one distinct name for each guard.

    A name that several guards have is extended by their values of the keys in which they differ, such as
    `[threshold=0.3]`, and by a number, such as `[1 threshold=0.3]`, if that does not distinguish all of them.
    """
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
