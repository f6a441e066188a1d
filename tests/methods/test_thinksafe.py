"""ThinkSafe as a section of the recipe, and the loss of its examples."""

import pytest

from thinksafe.data.records import Example
from thinksafe.errors import UserError
from thinksafe.methods.thinksafe import ThinkSafe
from thinksafe.pipeline import STAGES
from thinksafe.recipe.loading import load_recipe
from thinksafe.run.checkpoints import CheckpointStore

RESPONSE = "<think>\nhm .\n</think>\n\nyes ."


@pytest.mark.parametrize("benign_loss, labels", [("cross_entropy", set()), ("kl", {"benign"})])
def test_only_benign_examples_have_the_kl_loss(benign_loss, labels):
    recipe = load_recipe("organism", [f"method.benign_loss={benign_loss}"])
    chat = CheckpointStore(recipe).chat
    for label in ("harmful", "benign"):
        sequence = recipe.method.training_sequence(Example("p", RESPONSE, label, weight=2.0), chat)
        assert sequence.use_reference_kl == (label in labels)
        assert (sequence.weight, sequence.advantage) == (2.0, 1.0)
        prompt = chat.prompt_ids("p")
        assert sequence.input_ids.tolist() == prompt + chat.response_ids(RESPONSE)
        assert sequence.num_prompt_tokens == len(prompt)


def test_every_stage_of_the_method_exists():
    assert set(ThinkSafe.stages) <= set(STAGES)


@pytest.mark.parametrize(
    "override, message",
    [
        ("method.type=thinksave", r"method\.type: must be one of thinksafe, filter_only, .* \(found 'thinksave'\)"),
        ("method.type=[]", r"method\.type: must be one of thinksafe, .* \(found \[\]\)"),
        ("method={type: teacher, modle: x}", r"unknown key method\.modle; did you mean method\.model\?"),
        ("method={type: safepath, max_examples: 0}", r"method\.max_examples: must be at least 1"),
        ("method.benign_loss=none", r"method\.benign_loss: must be 'cross_entropy' or 'kl' \(found 'none'\)"),
        ("method.samples=5", r"unknown key method\.samples"),
        ("method=thinksafe", r"method: must be a section of keys \(type, benign_loss\)"),
    ],
)
def test_mistake_in_the_section_is_named(override, message):
    with pytest.raises(UserError, match=message):
        load_recipe("organism", [override])
