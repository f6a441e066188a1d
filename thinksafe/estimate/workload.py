"""Workload of a run: the number of its prompts and responses, and their lengths."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from thinksafe.data.jsonl import read_records
from thinksafe.data.records import Response
from thinksafe.data.sources import load_prompts
from thinksafe.errors import UserError
from thinksafe.evaluation.config import EvaluationSet
from thinksafe.evaluation.sets import evaluation_prompts
from thinksafe.model.config import ModelConfig
from thinksafe.paths import expand_path
from thinksafe.recipe.schema import Recipe
from thinksafe.run.directory import RunDir

# Data set of the paper, and its mean response length in tokens: of Qwen3-0.6B (True) and of larger models (False).
_PAPER_DATASET, _PAPER_PROMPT_COUNTS = "UWNSL/SafeChain", {"harmful": 17_887, "benign": 22_100}
_MAX_SMALL_PARAMETERS = 1e9
_PAPER_RESPONSE_TOKENS = {True: {"harmful": 442, "benign": 866}, False: {"harmful": 600, "benign": 1600}}
_PROMPT_TOKENS = 150
_LOG_LENGTH_SIGMA = 0.8
"""Sigma of the log-normal distribution of response lengths."""
REASONING_TOKENS = 2500
"""Assumed length of a response to a reasoning question; the paper gives no length."""
_KNOWN_SET_SIZES = {
    ("JailbreakBench/JBB-Behaviors", "harmful"): 100,
    ("JailbreakBench/JBB-Behaviors", "benign"): 100,
    ("Paul/XSTest", "train"): 250,
    ("openai/gsm8k", None): 1319,
    ("HuggingFaceH4/MATH-500", None): 500,
    ("walledai/StrongREJECT", "train"): 313,
    ("allenai/wildjailbreak", "train"): 2000,
    ("HuggingFaceH4/aime_2024", "train"): 30,
}
_DEFAULT_SET_SIZE = 500


@dataclass(frozen=True)
class TextLengths:
    """Number of prompts and responses of one group (a label, or an evaluation set), and their lengths in tokens.

    Attributes:
        num_prompts: number of prompts.
        num_responses: number of responses to all prompts; each sample counts.
        mean_prompt_tokens: mean length of a prompt.
        mean_response_tokens: mean length of a response.
        mean_squared_response_tokens: mean of a response's squared length, to which attention is proportional.
    """

    num_prompts: float
    num_responses: float
    mean_prompt_tokens: float
    mean_response_tokens: float
    mean_squared_response_tokens: float

    @classmethod
    def from_mean(
        cls, num_prompts: float, samples: float, mean_response_tokens: float, max_tokens: int
    ) -> "TextLengths":
        """Return assumed lengths: prompts of `_PROMPT_TOKENS` tokens, and log-normal response lengths.

        Args:
            samples: number of responses per prompt.
            mean_response_tokens: mean response length; `max_tokens` is used if it is less.
            max_tokens: largest number of tokens of a response.
        """
        mean = min(mean_response_tokens, max_tokens)
        return cls(num_prompts, num_prompts * samples, _PROMPT_TOKENS, mean, mean**2 * math.exp(_LOG_LENGTH_SIGMA**2))

    @classmethod
    def from_responses(cls, responses: Iterable[Response]) -> "TextLengths":
        """Return the actual counts and mean lengths of responses and their prompts; all are 0 without responses.

        Only prompts with a response count. In the mean prompt length, a prompt counts once for each of its responses.
        """
        prompt_ids, num_responses, prompt_tokens, response_tokens, squared_tokens = set(), 0, 0, 0, 0
        for response in responses:
            prompt_ids.add(response.prompt_id)
            num_responses += 1
            prompt_tokens += response.num_prompt_tokens
            response_tokens += response.num_tokens
            squared_tokens += response.num_tokens**2
        divisor = max(num_responses, 1)
        return cls(
            len(prompt_ids),
            num_responses,
            prompt_tokens / divisor,
            response_tokens / divisor,
            squared_tokens / divisor,
        )

    @property
    def response_tokens(self) -> float:
        """Number of tokens in all responses."""
        return self.num_responses * self.mean_response_tokens

    @property
    def response_pairs(self) -> float:
        """Number of (query, key) pairs within the causal mask whose query is a response token, over all responses."""
        return self.num_responses * (
            self.mean_prompt_tokens * self.mean_response_tokens + self.mean_squared_response_tokens / 2
        )

    @property
    def causal_pairs(self) -> float:
        """Number of (query, key) pairs within the causal mask, over all sequences of prompt and response."""
        return self.response_pairs + self.num_responses * self.mean_prompt_tokens**2 / 2


def response_lengths(
    recipe: Recipe, model: ModelConfig, run: RunDir | None, assumptions: list[str]
) -> dict[str, TextLengths]:
    """Return the response lengths of each label that has prompts.

    They are the actual lengths of the run directory's responses, sampled or imported. Without responses, or if imported
    ones have no token counts, they are the mean lengths of the paper.

    Args:
        model: configuration of the student; the paper's lengths depend on its size.
        run: run directory; None to use the paper's lengths.
        assumptions: list to which sentences on the assumed lengths are appended.

    Raises:
        UserError: without a run directory's responses, the number of prompts is unknown or 0.
    """
    responses_file = None if run is None else run.attempt_paths(0)[0]
    if responses_file is not None and responses_file.exists():
        lengths = {
            label: TextLengths.from_responses(_responses_with_label(responses_file, label))
            for label in _PAPER_PROMPT_COUNTS
        }
        if any(texts.response_tokens for texts in lengths.values()):
            assumptions.append("response lengths are those of the run directory")
            return {label: texts for label, texts in lengths.items() if texts.num_responses}
        counts = {
            label: (texts.num_prompts, texts.num_responses / max(texts.num_prompts, 1))
            for label, texts in lengths.items()
        }
    else:
        counts = {label: (count, recipe.generation.samples) for label, count in _prompt_counts(recipe).items()}
    max_tokens = min(recipe.generation.sampling.max_tokens, model.max_seq_len)
    small = model.num_parameters < _MAX_SMALL_PARAMETERS
    assumptions.append(
        f"prompts have {_PROMPT_TOKENS} tokens, responses are as long as in the paper (at most {max_tokens:,}), "
        "all are accepted"
    )
    return {
        label: TextLengths.from_mean(prompts, samples, _PAPER_RESPONSE_TOKENS[small][label], max_tokens)
        for label, (prompts, samples) in counts.items()
        if prompts
    }


def unsteered_response_lengths(
    recipe: Recipe, by_label: dict[str, TextLengths], run: RunDir | None
) -> list[TextLengths]:
    """Return the lengths of the unsteered baseline, a list of one group, or an empty list if the recipe samples no
    baseline.

    They are the actual lengths if the run directory has sampled the baseline (stage `probe`), else those of the steered
    harmful responses.

    Args:
        by_label: what `response_lengths` returned.
    """
    if run is not None and "probe" in run.manifest["stages"]:
        return [TextLengths.from_responses(read_records(run.path / "unsteered.jsonl", Response))]
    generation, harmful = recipe.generation, by_label.get("harmful")
    if harmful is None or generation.steering is None or generation.num_unsteered_prompts == 0:
        return []
    return [replace(harmful, num_responses=min(generation.num_unsteered_prompts, harmful.num_prompts))]


def _responses_with_label(responses_file: Path, label: str) -> Iterator[Response]:
    """Return an iterator over the file's responses to prompts with this label."""
    return (response for response in read_records(responses_file, Response) if response.label == label)


def _prompt_counts(recipe: Recipe) -> dict[str, float]:
    """Return the number of the recipe's prompts of each label; raise a UserError if it is unknown or 0."""
    if recipe.prompts is None:
        raise UserError("prompts: missing; name a file in the recipe or with --set prompts=FILE")
    if recipe.prompts == _PAPER_DATASET:
        share = min(1.0, (recipe.max_prompts or math.inf) / sum(_PAPER_PROMPT_COUNTS.values()))
        return {label: round(share * count) for label, count in _PAPER_PROMPT_COUNTS.items()}
    if not expand_path(recipe.prompts).exists():
        raise UserError(f"prompts: the number of prompts in {recipe.prompts!r} is unknown; download it, or use a file")
    counts = {"harmful": 0, "benign": 0}
    for prompt in islice(load_prompts(recipe.prompts), recipe.max_prompts):
        counts[prompt.label] += 1
    if not any(counts.values()):
        raise UserError(f"prompts: {recipe.prompts} holds no prompt")
    return counts


def evaluation_set_size(entry: EvaluationSet, assumptions: list[str]) -> int:
    """Return the number of prompts of an evaluation set: counted in a local file, or known for a public set. If it is
    unknown, return `_DEFAULT_SET_SIZE` and append a sentence to `assumptions`."""
    if expand_path(entry.source).exists():
        return len(evaluation_prompts(entry))
    if (entry.source, entry.split) in _KNOWN_SET_SIZES:
        return _KNOWN_SET_SIZES[entry.source, entry.split]
    assumptions.append(f"{entry.source}: the size is unknown, {_DEFAULT_SET_SIZE} rows are assumed")
    return _DEFAULT_SET_SIZE
