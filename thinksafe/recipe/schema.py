"""One recipe says everything about a run. It comes from YAML and `--set key=value` and is checked at once.

Each section's keys are documented on its class, and `thinksafe recipe` prints them. A recipe names files relative to
the folder it lies in. With `base: NAME` it says only what differs from another recipe.
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
    """How responses are sampled from the frozen student.

    Attributes:
        steering: instruction around harmful prompts: `prefix`, `suffix`, `risk`, `intent`, a text with {prompt} in it,
            or null for none.
        samples: responses a prompt; the first one that the guard accepts is kept.
        ladder: further attempts at prompts whose responses were all rejected, one after the other. Empty is the paper's
            single attempt.
        max_retries: responses that all further attempts may sample together; null for as many as the ladder asks.
        unsteered_probe: harmful prompts also sampled without steering, to measure what steering gains; not trained on.
        sampling: how tokens are drawn.
    """

    __pydantic_config__ = {"extra": "forbid"}

    steering: str | None = "prefix"
    samples: int = 1
    ladder: tuple[Rung, ...] = ()
    max_retries: int | None = None
    unsteered_probe: int = 200
    sampling: SamplingConfig = SamplingConfig()

    def __post_init__(self):
        Rung(self.steering, self.samples)
        if self.max_retries is not None and self.max_retries < 0:
            raise ValueError("max_retries must not be negative")
        if self.unsteered_probe < 0:
            raise ValueError("unsteered_probe must not be negative")

    @property
    def rungs(self) -> tuple[Rung, ...]:
        """The first attempt, and all further ones."""
        return (Rung(self.steering, self.samples), *self.ladder)


@dataclass(frozen=True)
class Recipe:
    """A whole run.

    Attributes:
        name: shown in the report.
        model: checkpoint folder or hub name of the student.
        prompts: .jsonl, .json or .parquet file, a folder of them, or a data set on the hub (its `train` split);
            only `generate` reads it.
        limit: use only the first so many prompts; null for all.
        seed: of everything random.
        device: `auto` takes a GPU where there is one.
        dtype: `auto` is bfloat16 on a GPU and float32 on a CPU.
        trackers: where training is also seen, `tensorboard` (event files in training/tensorboard) and `wandb` (Weights
            & Biases); metrics.jsonl is always written.
    """

    __pydantic_config__ = {"extra": "forbid"}

    name: str
    model: str
    prompts: str | None = None
    limit: int | None = None
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
        if self.limit is not None and self.limit < 1:
            raise ValueError("limit must be at least 1")
        if not 0 <= self.seed < 2**63:
            raise ValueError("seed must lie in [0, 2^63)")
        if self.training.frozen_weights == "fp8" and (self.zero.stage == 3 or self.zero.offload_parameters):
            raise ValueError("training.frozen_weights: fp8 keeps the base whole on every GPU, ZeRO stage 3 shards it")

    def to_yaml(self) -> str:
        """Every key with its value, as it is written into the run directory."""
        return yaml.safe_dump(json.loads(json.dumps(asdict(self))), sort_keys=False, allow_unicode=True)
