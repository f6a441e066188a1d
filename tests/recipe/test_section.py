"""Sections check themselves: a value out of bounds is an error in YAML and in code."""

import math
from dataclasses import asdict, dataclass, replace
from typing import Annotated

import pytest

from thinksafe.evaluation.config import EvaluationSet
from thinksafe.guards.config import GuardConfig
from thinksafe.model.config import LoraConfig
from thinksafe.recipe.schema import GenerationConfig, Recipe
from thinksafe.sampler.config import EngineConfig, SamplingConfig
from thinksafe.section import Bounds, Section, bounds_by_key
from thinksafe.text.steering import Rung
from thinksafe.training.config import TrainingConfig, ZeroConfig

VALID = [
    Recipe("name", "model"),
    EvaluationSet("name", "source", "harmful"),
    GenerationConfig(),
    Rung(),
    EngineConfig(),
    SamplingConfig(),
    LoraConfig(),
    TrainingConfig(),
    GuardConfig(),
]
BOUNDS = [(section, key, bounds) for section in VALID for key, bounds in bounds_by_key(type(section)).items()]
STEP = 1e-9


@pytest.mark.parametrize(
    ("section", "key", "bounds"), BOUNDS, ids=[f"{type(section).__name__}.{key}" for section, key, _ in BOUNDS]
)
def test_value_out_of_bounds_is_an_error(section, key, bounds):
    invalid = [bounds.ge - STEP, bounds.gt, bounds.le + STEP, bounds.lt, math.nan]
    for value in filter(lambda value: not math.isinf(value), invalid):
        with pytest.raises(ValueError, match=f"^{key}: must be (finite|{bounds}) ".replace("^63", r"\^63")):
            replace(section, **{key: value})
    for value in filter(math.isfinite, [bounds.ge, bounds.gt + STEP, bounds.le, bounds.lt * (1 - STEP)]):
        if key != "threshold":  # its margin narrows it further
            replace(section, **{key: value})


@pytest.mark.parametrize(
    ("section", "settings", "message"),
    [
        (TrainingConfig, {"frozen_weight_dtype": "fp8", "method": "full"}, "frozen_weight_dtype: fp8 is for"),
        (ZeroConfig, {"offload_parameters": True, "stage": 2}, "offload_parameters: needs stage 3"),
        (LoraConfig, {"target_modules": ()}, "target_modules: must name at least one"),
        (LoraConfig, {"alpha": math.inf}, "alpha: must be finite"),
        (GenerationConfig, {"steering": "kindly"}, "steering: 'kindly' is no instruction"),
    ],
)
def test_wrong_combination_is_an_error(section, settings, message):
    with pytest.raises(ValueError, match=message):
        section(**settings)


def test_null_has_no_bounds():
    assert EngineConfig(page_size=None).page_size is None


def test_bounds_read_as_a_sentence():
    @dataclass(frozen=True)
    class Share(Section):
        share: Annotated[float, Bounds(gt=0, le=1)] = 0.5

    assert str(bounds_by_key(Share)["share"]) == "above 0 and at most 1"
    with pytest.raises(ValueError, match=r"^share: must be above 0 and at most 1 \(found 1.5\)$"):
        Share(1.5)


def test_sections_are_values():
    assert TrainingConfig() == TrainingConfig(epochs=3) and hash(TrainingConfig()) == hash(TrainingConfig(epochs=3))
    assert asdict(Rung("risk", 2)) == {"steering": "risk", "samples": 2}
