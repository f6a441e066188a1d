"""Workload of a run: the number of its prompts and responses, and their lengths."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from itertools import islice

import numpy as np

from thinksafe.data.jsonl import read_records
from thinksafe.data.records import Example, Response
from thinksafe.data.sources import load_prompts, rows_of
from thinksafe.errors import UserError
from thinksafe.evaluation.config import EvaluationSet
from thinksafe.evaluation.sets import evaluation_prompts
from thinksafe.methods.given_data import GivenData
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
    """Number of prompts and responses of a group (a label, or evaluation sets), their lengths in tokens, and their
    numbers of (query, key) pairs within the causal mask. All are totals over the responses."""

    num_prompts: float = 0
    num_responses: float = 0
    prompt_tokens: float = 0
    response_tokens: float = 0
    prompt_pairs: float = 0
    response_pairs: float = 0

    @classmethod
    def from_means(
        cls, num_prompts: float, num_responses: float, prompt: float, response: float, squared_response: float
    ) -> "TextLengths":
        """Return the totals for mean lengths of prompts and responses, and the mean of the squared response length."""
        means = (1, prompt, response, prompt**2 / 2, prompt * response + squared_response / 2)
        return cls(num_prompts, *(num_responses * mean for mean in means))

    @classmethod
    def assumed(cls, num_prompts: float, samples: float, mean_tokens: float, max_tokens: int) -> "TextLengths":
        """Return assumed lengths of `samples` responses per prompt: log-normal with a mean of `mean_tokens`, which is
        at most `max_tokens`."""
        mean = min(mean_tokens, max_tokens)
        squared = mean**2 * math.exp(_LOG_LENGTH_SIGMA**2)
        return cls.from_means(num_prompts, num_prompts * samples, _PROMPT_TOKENS, mean, squared)

    @classmethod
    def from_responses(cls, responses: Iterable[Response]) -> "TextLengths":
        """Return the actual counts and lengths of responses and their prompts."""
        prompt_ids, lengths = set(), []
        for response in responses:
            prompt_ids.add(response.prompt_id)
            lengths.append((response.num_prompt_tokens, response.num_tokens, response.num_tokens**2))
        return cls.from_means(len(prompt_ids), len(lengths), *np.mean(lengths or [(0, 0, 0)], axis=0).tolist())

    def with_responses(self, num_responses: float) -> "TextLengths":
        """Return the same prompts and mean lengths with another number of responses."""
        _, *totals = astuple(self)
        return TextLengths(self.num_prompts, *(total * num_responses / self.num_responses for total in totals))

    def __add__(self, other: "TextLengths") -> "TextLengths":
        return TextLengths(*map(sum, zip(astuple(self), astuple(other), strict=True)))


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
        by_label = {
            label: TextLengths.from_responses(r for r in read_records(responses_file, Response) if r.label == label)
            for label in _PAPER_PROMPT_COUNTS
        }
        if any(texts.response_tokens for texts in by_label.values()):
            assumptions.append("response lengths are those of the run directory")
            return {label: texts for label, texts in by_label.items() if texts.num_responses}
        counts = {label: (texts.num_prompts, texts.num_responses) for label, texts in by_label.items()}
    elif isinstance(recipe.method, GivenData):
        counts = {label: (count, count) for label, count in _example_counts(recipe.method).items()}
    else:
        samples = recipe.generation.samples
        counts = {label: (count, count * samples) for label, count in _prompt_counts(recipe).items()}
    max_tokens = min(recipe.generation.sampling.max_tokens, model.max_seq_len)
    mean_tokens = mean_response_tokens(model)
    if isinstance(recipe.method, GivenData) and (response_tokens := recipe.method.response_tokens):
        mean_tokens = dict.fromkeys(mean_tokens, response_tokens)
    assumptions.append(
        f"prompts have {_PROMPT_TOKENS} tokens, responses are as long as in the paper (at most {max_tokens:,}), "
        "all are accepted"
    )
    return {
        label: TextLengths.assumed(prompts, responses / prompts, mean_tokens[label], max_tokens)
        for label, (prompts, responses) in counts.items()
        if prompts
    }


def mean_response_tokens(model: ModelConfig) -> dict[str, int]:
    """Return label -> mean number of tokens of a response in the paper, for a model of this size."""
    return _PAPER_RESPONSE_TOKENS[model.num_parameters < _MAX_SMALL_PARAMETERS]


def unsteered_response_lengths(recipe: Recipe, harmful: TextLengths | None, run: RunDir | None) -> TextLengths:
    """Return the lengths of the unsteered baseline; without responses if the recipe samples none.

    They are the actual lengths if the run directory has sampled the baseline (stage `probe`), else those of the steered
    `harmful` responses.
    """
    if run is not None and "probe" in run.manifest["stages"]:
        return TextLengths.from_responses(read_records(run.path / "unsteered.jsonl", Response))
    generation = recipe.generation
    if harmful is None or generation.steering is None or generation.num_unsteered_prompts == 0:
        return TextLengths()
    count = generation.num_unsteered_prompts
    return harmful.with_responses(harmful.num_prompts if count is None else min(count, harmful.num_prompts))


def _example_counts(method: GivenData) -> dict[str, float]:
    """Return the number of a data set's examples of each label: counted in a local file, or those of the published data
    set; raise a UserError if it is unknown."""
    if not expand_path(method.source).exists():
        if method.source == type(method).source and method.expected_counts:
            return method.expected_counts
        raise UserError(f"method.source: the number of examples in {method.source!r} is unknown; use a local file")
    examples = map(method.example_of, rows_of(method.source, "method.source", default_split="train"))
    return Counter(example.label for example in method.select(e for e in examples if isinstance(e, Example)))


def _prompt_counts(recipe: Recipe) -> dict[str, float]:
    """Return the number of the recipe's prompts of each label; raise a UserError if it is unknown or 0."""
    if recipe.prompts is None:
        raise UserError("prompts: missing; name a file in the recipe or with --set prompts=FILE")
    if recipe.prompts == _PAPER_DATASET:
        share = min(1.0, (recipe.max_prompts or math.inf) / sum(_PAPER_PROMPT_COUNTS.values()))
        return {label: round(share * count) for label, count in _PAPER_PROMPT_COUNTS.items()}
    if not expand_path(recipe.prompts).exists():
        raise UserError(
            f"prompts: there is no file or folder {recipe.prompts!r}, and the estimate downloads no data set; "
            "use --set prompts=FILE"
        )
    counts = Counter(prompt.label for prompt in islice(load_prompts(recipe.prompts), recipe.max_prompts))
    if not counts:
        raise UserError(f"prompts: {recipe.prompts} holds no prompt")
    return {label: counts[label] for label in _PAPER_PROMPT_COUNTS}


def evaluation_set_size(entry: EvaluationSet, assumptions: list[str]) -> int:
    """Return the number of prompts of an evaluation set: counted in a local file, or known for a public set. If it is
    unknown, return `_DEFAULT_SET_SIZE` and append a sentence to `assumptions`."""
    if expand_path(entry.source).exists():
        return len(evaluation_prompts(entry))
    if (entry.source, entry.split) in _KNOWN_SET_SIZES:
        return _KNOWN_SET_SIZES[entry.source, entry.split]
    assumptions.append(f"{entry.source}: the size is unknown, {_DEFAULT_SET_SIZE} rows are assumed")
    return _DEFAULT_SET_SIZE
