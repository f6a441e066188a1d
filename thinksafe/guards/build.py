"""From a recipe's guard to one that judges."""

from collections.abc import Callable

from thinksafe.guards.ensemble import Ensemble
from thinksafe.guards.interface import Guard, GuardConfig
from thinksafe.guards.model_guard import ModelGuard
from thinksafe.guards.oracle import OracleGuard
from thinksafe.model.decoder import Decoder
from thinksafe.tokenization import SafeTokenizer


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
        return Ensemble([build_guard(member, load) for member in config.members], config.agree)
    return ModelGuard(*load(config), config)
