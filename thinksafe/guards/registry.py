"""Construction of a guard from the guard section of a recipe."""

from collections.abc import Callable

from thinksafe.guards.base import Guard
from thinksafe.guards.config import GuardConfig
from thinksafe.guards.ensemble import Ensemble
from thinksafe.guards.model_guard import ModelGuard
from thinksafe.guards.oracle import OracleGuard
from thinksafe.guards.paper_reference import PaperReferenceGuard
from thinksafe.model.decoder import Decoder
from thinksafe.text.tokenizer import SafeTokenizer


def build_guard(config: GuardConfig, load: Callable[[GuardConfig], tuple[Decoder | None, SafeTokenizer]]) -> Guard:
    """Return the guard that a recipe describes, with its checkpoints loaded.

    Members of an ensemble that would have the same name are numbered in order: `llama_guard:model[1]`.

    Args:
        load: called with the configuration of each guard that is one model; returns its decoder and tokenizer. If the
            decoder is None, the guard only checks that the tokenizer fits the format, and cannot judge.

    Raises:
        UserError: a checkpoint does not fit its format.
    """
    if config.kind == "oracle":
        return OracleGuard()
    if config.kind == "ensemble":
        guards = [build_guard(member, load) for member in config.members]
        names = [guard.name for guard in guards]
        unique_names = [
            f"{name}[{names[:index].count(name) + 1}]" if names.count(name) > 1 else name
            for index, name in enumerate(names)
        ]
        return Ensemble(dict(zip(unique_names, guards, strict=True)), config.voting)
    guard_class = PaperReferenceGuard if config.kind == "llama_guard_reference" else ModelGuard
    return guard_class(*load(config), config)
