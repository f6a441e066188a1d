"""Former names of recipe keys. A recipe that still has one gets an error with the present name."""

from thinksafe.evaluation.config import EvaluationSet
from thinksafe.guards.config import GuardConfig
from thinksafe.guards.formats import GuardFormat, Question
from thinksafe.recipe.schema import GenerationConfig, Recipe
from thinksafe.sampler.config import EngineConfig, SamplingConfig
from thinksafe.training.config import TrainingConfig

RENAMED_KEYS: dict[type, dict[str, str]] = {
    Recipe: {"limit": "max_prompts"},
    GenerationConfig: {"max_retries": "max_retry_responses", "unsteered_probe": "num_unsteered_prompts"},
    EngineConfig: {
        "max_running": "max_num_seqs",
        "max_step_tokens": "max_prefill_tokens",
        "tensor_parallel": "tensor_parallel_size",
        "weights": "weight_dtype",
    },
    SamplingConfig: {"stop_loops": "stop_on_repetition"},
    GuardConfig: {"judged": "scope", "agree": "voting", "min_mass": "min_verdict_probability"},
    GuardFormat: {"frame": "delimiters", "raw": "is_full_prompt"},
    Question: {"about": "topic", "lead": "answer_prefix", "if_unsafe": "only_if_unsafe"},
    TrainingConfig: {
        "batch_tokens": "tokens_per_step",
        "benign_loss": "method.benign_loss",
        "frozen_weights": "frozen_weight_dtype",
    },
    EvaluationSet: {
        "file": "source",
        "where": "filter",
        "answer": "answer_matcher",
        "answer_after": "answer_marker",
    },
}
"""{dataclass of a section: {former key: present key}}; a present key is a key of the same section, or a path from the
root if it has a dot."""
