"""The recipe: all settings of a run. It comes from YAML and `--set key=value`, and loading.py checks it.

The docstring of each section describes its keys; `thinksafe recipe` prints these descriptions, and docs/recipe.md lists
them.
"""

import json
from dataclasses import asdict, dataclass
from typing import Literal

import yaml

from thinksafe.evaluation.config import EvaluationConfig
from thinksafe.guards.config import GuardConfig
from thinksafe.model.lora import LoraConfig
from thinksafe.sampler.engine import EngineConfig
from thinksafe.sampler.request import SamplingConfig
from thinksafe.text.steering import Rung
from thinksafe.training.loop import TrainingConfig
from thinksafe.training.trackers import TrackerName
from thinksafe.training.zero_config import ZeroConfig


@dataclass(frozen=True)
class GenerationConfig:
    """How to sample responses from the frozen student.

    Attributes:
        steering: instruction around harmful prompts: `prefix`, `suffix`, `risk` or `intent`, a text that contains
            {prompt}, or null for none. Benign prompts never have one.
        samples: number of responses for each prompt. Training uses the first accepted one.
        ladder: further attempts, in this order, at prompts whose responses were all rejected. An empty list is the
            paper's single attempt.
        max_retry_responses: largest total number of responses in all further attempts; null for no limit.
        num_unsteered_prompts: number of harmful prompts that are also sampled without steering, to measure what
            steering gains. These responses are not used for training.
        sampling: how tokens are sampled.
    """

    __pydantic_config__ = {"extra": "forbid"}

    steering: str | None = "prefix"
    samples: int = 1
    ladder: tuple[Rung, ...] = ()
    max_retry_responses: int | None = None
    num_unsteered_prompts: int = 200
    sampling: SamplingConfig = SamplingConfig()

    def __post_init__(self):
        Rung(self.steering, self.samples)
        if self.max_retry_responses is not None and self.max_retry_responses < 0:
            raise ValueError("max_retry_responses must not be negative")
        if self.num_unsteered_prompts < 0:
            raise ValueError("num_unsteered_prompts must not be negative")

    @property
    def rungs(self) -> tuple[Rung, ...]:
        """The first attempt, then all further attempts; the index is the rung of a response."""
        return (Rung(self.steering, self.samples), *self.ladder)


@dataclass(frozen=True)
class Recipe:
    """All settings of a run.

    Attributes:
        name: name of the run, shown in the report.
        model: checkpoint folder, or name on the Hugging Face hub, of the student.
        prompts: .jsonl, .json or .parquet file, folder of such files, or data set on the hub (split `train`). Only
            `generate` needs it.
        max_prompts: number of prompts to use, counted from the first; null for all.
        seed: seed of all random numbers.
        device: device of the models. `auto` is a GPU if torch sees one, else the CPU.
        dtype: dtype of the weights. `auto` is bfloat16 on a GPU and float32 on a CPU.
        trackers: programs that show the training metrics: `tensorboard` (event files in training/tensorboard) and
            `wandb` (Weights & Biases). training/metrics.jsonl is always written.
    """

    __pydantic_config__ = {"extra": "forbid"}

    name: str
    model: str
    prompts: str | None = None
    max_prompts: int | None = None
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    trackers: tuple[TrackerName, ...] = ()
    generation: GenerationConfig = GenerationConfig()
    guard: GuardConfig = GuardConfig()
    sampler: EngineConfig = EngineConfig()
    lora: LoraConfig = LoraConfig()
    training: TrainingConfig = TrainingConfig()
    zero: ZeroConfig = ZeroConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    def __post_init__(self):
        if self.max_prompts is not None and self.max_prompts < 1:
            raise ValueError("max_prompts must be at least 1")
        if not 0 <= self.seed < 2**63:
            raise ValueError("seed must lie in [0, 2^63)")
        if self.training.frozen_weight_dtype == "fp8" and (self.zero.stage == 3 or self.zero.offload_parameters):
            raise ValueError(
                "training.frozen_weight_dtype: fp8 needs the whole base model on each GPU, and ZeRO stage 3 shards it"
            )

    def to_yaml(self) -> str:
        """Return YAML of every key with its value and no comment: the text of recipe.yaml in the run directory."""
        return yaml.safe_dump(json.loads(json.dumps(asdict(self))), sort_keys=False, allow_unicode=True)
