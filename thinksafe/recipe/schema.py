"""The recipe: all settings of a run. It comes from YAML and `--set key=value`; loading.py reads it.

The docstring below each key describes it: `thinksafe recipe` prints these descriptions, and docs/recipe.md lists them.
"""

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

import yaml

from thinksafe.evaluation.config import EvaluationConfig
from thinksafe.guards.config import GuardConfig
from thinksafe.methods.base import Method
from thinksafe.methods.thinksafe import ThinkSafe
from thinksafe.model.config import LoraConfig
from thinksafe.sampler.config import EngineConfig, SamplingConfig
from thinksafe.section import Bounds, Section
from thinksafe.text.steering import Rung
from thinksafe.training.config import TrackerName, TrainingConfig, ZeroConfig


@dataclass(frozen=True)
class GenerationConfig(Section):
    """How to sample responses from the frozen student."""

    steering: str | None = "prefix"
    """Instruction around harmful prompts: `prefix`, `suffix`, `risk` or `intent`, a text that contains {prompt}, or
    null for none. Benign prompts never have one."""
    samples: Annotated[int, Bounds(ge=1)] = 1
    """Number of responses for each prompt. Training uses the first accepted one."""
    ladder: tuple[Rung, ...] = ()
    """Further attempts, in this order, at prompts whose responses were all rejected. An empty list is the paper's
    single attempt."""
    max_retry_responses: Annotated[int | None, Bounds(ge=0)] = None
    """Largest total number of responses in all further attempts; null for no limit."""
    num_unsteered_prompts: Annotated[int | None, Bounds(ge=0)] = 200
    """Number of harmful prompts that are also sampled without steering, to measure what steering gains; null for all.
    Only method `dpo` uses these responses for training."""
    sampling: SamplingConfig = SamplingConfig()

    def check(self) -> None:
        Rung(self.steering)

    @property
    def rungs(self) -> tuple[Rung, ...]:
        """The first attempt, then all further attempts; the index is the rung of a response."""
        return (Rung(self.steering, self.samples), *self.ladder)


@dataclass(frozen=True)
class Recipe(Section):
    """All settings of a run."""

    name: str
    """Name of the run, shown in the report."""
    model: str
    """Checkpoint folder, or name on the Hugging Face hub, of the student."""
    template_arguments: dict[str, Any] = field(default_factory=dict)
    """Values of variables of the student's chat template, such as {enable_thinking: true}: true, false, numbers or
    texts. The template must mention each name."""
    prompts: str | None = None
    """.jsonl, .json or .parquet file, folder of such files, or data set on the hub (split `train`). Only `generate`
    needs it."""
    max_prompts: Annotated[int | None, Bounds(ge=1)] = None
    """Number of prompts to use, counted from the first; null for all."""
    seed: Annotated[int, Bounds(ge=0, lt=2**63)] = 0
    """Seed of all random numbers."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the models. `auto` is a GPU if torch sees one, else the CPU."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the weights. `auto` is bfloat16 on a GPU and float32 on a CPU."""
    trackers: tuple[TrackerName, ...] = ()
    """Programs that show the training metrics: `tensorboard` (event files in training/tensorboard) and `wandb` (Weights
    & Biases). training/metrics.jsonl is always written."""
    method: Method = ThinkSafe()
    generation: GenerationConfig = GenerationConfig()
    guard: GuardConfig = GuardConfig()
    sampler: EngineConfig = EngineConfig()
    lora: LoraConfig = LoraConfig()
    training: TrainingConfig = TrainingConfig()
    zero: ZeroConfig = ZeroConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    def check(self) -> None:
        for name, value in self.template_arguments.items():
            if not isinstance(value, (bool, int, float, str)) or value != value or value in (math.inf, -math.inf):
                raise ValueError(f"template_arguments.{name}: must be true, false, a number or text (found {value!r})")
        self.method.check_settings(self.generation, self.training)
        if self.training.frozen_weight_dtype == "fp8" and (self.zero.stage == 3 or self.zero.offload_parameters):
            raise ValueError(
                "training.frozen_weight_dtype: fp8 needs the whole base model on each GPU, and ZeRO stage 3 shards it"
            )

    def to_yaml(self) -> str:
        """Return YAML of every key with its value and no comment: the text of recipe.yaml in the run directory."""
        return yaml.safe_dump(json.loads(json.dumps(asdict(self))), sort_keys=False, allow_unicode=True)
