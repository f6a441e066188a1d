"""The texts that a run will process: how many prompts and responses, and how long they are."""

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
from thinksafe.paths import expand
from thinksafe.recipe.schema import Recipe
from thinksafe.run.directory import RunDir

# The paper's data set, and the mean response of Qwen3-0.6B and of larger models, in tokens.
_PAPERS_PROMPTS, _PAPERS_COUNTS = "UWNSL/SafeChain", {"harmful": 17_887, "benign": 22_100}
_SMALL_PARAMETERS = 1e9
_PAPERS_RESPONSES = {True: {"harmful": 442, "benign": 866}, False: {"harmful": 600, "benign": 1600}}
_PROMPT_TOKENS = 150
_SPREAD = 0.8
"""Sigma of the log-normal law that response lengths follow."""
_REASONING_TOKENS = 2500
"""Assumed of a response to a reasoning question; the paper gives none."""
_KNOWN_ROWS = {
    ("JailbreakBench/JBB-Behaviors", "harmful"): 100,
    ("JailbreakBench/JBB-Behaviors", "benign"): 100,
    ("Paul/XSTest", "train"): 250,
    ("openai/gsm8k", None): 1319,
    ("HuggingFaceH4/MATH-500", None): 500,
    ("walledai/StrongREJECT", "train"): 313,
    ("allenai/wildjailbreak", "train"): 2000,
    ("HuggingFaceH4/aime_2024", "train"): 30,
}
_UNKNOWN_ROWS = 500


@dataclass(frozen=True)
class Texts:
    """Some prompts and their responses, in tokens.

    Attributes:
        prompts: how many there are.
        count: responses, of all samples.
        prompt: mean length of a prompt.
        response: mean length of a response.
        square: mean of a response's squared length, which attention follows.
    """

    prompts: float
    count: float
    prompt: float
    response: float
    square: float

    @classmethod
    def expected(cls, prompts: float, samples: float, response: float, longest: int) -> "Texts":
        """So many responses a prompt, of lengths that follow a log-normal law around this mean."""
        mean = min(response, longest)
        return cls(prompts, prompts * samples, _PROMPT_TOKENS, mean, mean**2 * math.exp(_SPREAD**2))

    @classmethod
    def of(cls, responses: Iterable[Response]) -> "Texts":
        """As they are."""
        prompts, count, prompt, response, square = set(), 0, 0, 0, 0
        for one in responses:
            prompts.add(one.prompt_id)
            count += 1
            prompt += one.num_prompt_tokens
            response += one.num_tokens
            square += one.num_tokens**2
        most = max(count, 1)
        return cls(len(prompts), count, prompt / most, response / most, square / most)

    @property
    def tokens(self) -> float:
        """Of all responses."""
        return self.count * self.response

    @property
    def pairs(self) -> float:
        """Of a response's token and what it sees, over all responses."""
        return self.count * (self.prompt * self.response + self.square / 2)

    @property
    def all_pairs(self) -> float:
        """The same with the prompts' tokens among them."""
        return self.pairs + self.count * self.prompt**2 / 2


def _responses(recipe: Recipe, model: ModelConfig, run: RunDir | None, assumptions: list[str]) -> dict[str, Texts]:
    """Of each label: as the run directory has them, sampled or brought, or as the paper leads to expect."""
    shard = None if run is None else run.attempts(0)[0]
    if shard is not None and shard.exists():
        found = {label: Texts.of(_of_label(shard, label)) for label in _PAPERS_COUNTS}
        if any(texts.tokens for texts in found.values()):
            assumptions.append("response lengths are those of the run directory")
            return {label: texts for label, texts in found.items() if texts.count}
        counts = {label: (texts.prompts, texts.count / max(texts.prompts, 1)) for label, texts in found.items()}
    else:
        counts = {label: (count, recipe.generation.samples) for label, count in _prompt_counts(recipe).items()}
    longest = min(recipe.generation.sampling.max_tokens, model.max_seq_len)
    small = model.num_parameters < _SMALL_PARAMETERS
    assumptions.append(f"prompts of {_PROMPT_TOKENS} tokens, responses as long as in the paper, all accepted")
    return {
        label: Texts.expected(prompts, samples, _PAPERS_RESPONSES[small][label], longest)
        for label, (prompts, samples) in counts.items()
        if prompts
    }


def _probed(recipe: Recipe, by_label: dict[str, Texts], run: RunDir | None) -> list[Texts]:
    """Harmful prompts that are sampled without steering as well: as the run directory has them, or as with it."""
    if run is not None and "probe" in run.manifest["stages"]:
        return [Texts.of(read_records(run.path / "unsteered.jsonl", Response))]
    generation, harmful = recipe.generation, by_label.get("harmful")
    if harmful is None or generation.steering is None or generation.unsteered_probe == 0:
        return []
    return [replace(harmful, count=min(generation.unsteered_probe, harmful.prompts))]


def _of_label(shard: Path, label: str) -> Iterator[Response]:
    return (response for response in read_records(shard, Response) if response.label == label)


def _prompt_counts(recipe: Recipe) -> dict[str, float]:
    if recipe.prompts is None:
        raise UserError("prompts: missing; name a file in the recipe or with --set prompts=FILE")
    if recipe.prompts == _PAPERS_PROMPTS:
        share = min(1.0, (recipe.limit or math.inf) / sum(_PAPERS_COUNTS.values()))
        return {label: round(share * count) for label, count in _PAPERS_COUNTS.items()}
    if not expand(recipe.prompts).exists():
        raise UserError(f"prompts: how many {recipe.prompts!r} holds is not known here; download it, or give a file")
    counts = {"harmful": 0, "benign": 0}
    for prompt in islice(load_prompts(recipe.prompts), recipe.limit):
        counts[prompt.label] += 1
    if not any(counts.values()):
        raise UserError(f"prompts: {recipe.prompts} holds no prompt")
    return counts


def _rows(entry: EvaluationSet, assumptions: list[str]) -> int:
    if expand(entry.file).exists():
        return len(evaluation_prompts(entry))
    if (entry.file, entry.split) in _KNOWN_ROWS:
        return _KNOWN_ROWS[entry.file, entry.split]
    assumptions.append(f"{entry.file}: its size is not known here, taken as {_UNKNOWN_ROWS} rows")
    return _UNKNOWN_ROWS
