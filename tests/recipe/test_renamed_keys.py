"""Former key names: each one gets an error that names the present key."""

import dataclasses
from typing import get_type_hints

import pytest

from thinksafe.errors import UserError
from thinksafe.methods.base import Method
from thinksafe.methods.registry import METHODS
from thinksafe.recipe.loading import load_recipe
from thinksafe.recipe.renamed_keys import RENAMED_KEYS
from thinksafe.recipe.schema import Recipe

ENTRIES = [(section, old, new) for section, keys in RENAMED_KEYS.items() for old, new in keys.items()]


@pytest.mark.parametrize(("section", "old", "new"), ENTRIES)
def test_former_key_is_gone_and_its_present_name_exists(section, old, new):
    assert old not in {field.name for field in dataclasses.fields(section)}
    *parents, key = new.split(".")
    holder = section if not parents else Recipe
    for parent in parents:
        holder = get_type_hints(holder)[parent]
    kinds = METHODS.values() if holder is Method else [holder]
    assert any(key in {field.name for field in dataclasses.fields(kind)} for kind in kinds)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("limit=5", "key limit was renamed; use max_prompts"),
        ("training.benign_loss=kl", "key training.benign_loss was renamed; use method.benign_loss"),
        ("sampler.max_running=8", "key sampler.max_running was renamed; use sampler.max_num_seqs"),
        ("guard.sampler.weights=fp8", "key guard.sampler.weights was renamed; use guard.sampler.weight_dtype"),
        (
            "evaluation.sampling.stop_loops=true",
            "key evaluation.sampling.stop_loops was renamed; use evaluation.sampling.stop_on_repetition",
        ),
        (
            "evaluation.sets=[{name: a, file: b, kind: harmful}]",
            "key evaluation.sets.0.file was renamed; use evaluation.sets.0.source",
        ),
        (
            "guard={kind: ensemble, members: [{kind: oracle}, {judged: answer}]}",
            "key guard.members.1.judged was renamed; use guard.members.1.scope",
        ),
        (
            "guard={kind: template, format: {questions: [{about: harm, answers: {}}]}}",
            "key guard.format.questions.0.about was renamed; use guard.format.questions.0.topic",
        ),
    ],
)
def test_error_for_former_key_names_the_present_one(override, message):
    with pytest.raises(UserError, match=message):
        load_recipe("organism", [override])
