"""The bundled world: its files follow from seed 0, its lessons never change, and its rules judge its own lessons."""

import hashlib
import json
from itertools import islice
from pathlib import Path

import pytest

import thinksafe.organism
from thinksafe.organism.build import tokenize, write_sets
from thinksafe.organism.language import HAZARDOUS, STEERING, SYLLABLES, vocabulary
from thinksafe.organism.oracle import is_refusal, is_unsafe
from thinksafe.organism.tokenizer import build_tokenizer
from thinksafe.organism.world import World
from thinksafe.text.tokenizer import SafeTokenizer

BUNDLE = Path(thinksafe.organism.__path__[0]) / "bundle"
DIGESTS = {
    0: "a78d2888fd92e4f74c06249a1b75b96ea1ce6e661e55f4d90cda5d7330beeb91",
    1: "6dac65af33a7258711e260336175cae5da2bdb3980996821f173f169ac0c71c9",
    2: "b848a4cbd2f9f5c2fe4ddb76aa73c4cb6eeeffa82e76ca3125f91c070c747029",
}
"""SHA-256 of the first 25,600 lessons of each stage for seed 0, on which the bundled student was trained."""


@pytest.fixture(scope="module")
def world():
    return World(0)


def test_bundled_sets_follow_from_seed_zero_byte_for_byte(world, tmp_path):
    write_sets(world, tmp_path)
    names = sorted(str(file.relative_to(BUNDLE)) for file in BUNDLE.rglob("*.jsonl"))
    assert sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*.*")) == names
    for name in names:
        assert (tmp_path / name).read_bytes() == (BUNDLE / name).read_bytes(), name


@pytest.mark.parametrize("stage", DIGESTS)
def test_lessons_of_seed_zero_never_change(world, stage):
    lessons = islice(world.lessons(stage), 25_600)
    fields = [(lesson.prompt, lesson.response, lesson.label, lesson.kind, lesson.answer) for lesson in lessons]
    assert hashlib.sha256(json.dumps(fields).encode()).hexdigest() == DIGESTS[stage]


def test_another_seed_is_another_world(world):
    other = World(1)
    assert [s.prompt for s in other.eval_harmful()] != [s.prompt for s in world.eval_harmful()]
    assert {noun for nouns in other.nouns["heldout"].values() for noun in nouns} & set(world.nouns["train"]["hazard"])


def test_sets_use_no_noun_of_another_split(world):
    splits = {
        split: {" ".join(noun) for nouns in kinds.values() for noun in nouns} for split, kinds in world.nouns.items()
    }
    trained, heldout = splits["train"], splits["heldout"]
    assert not trained & heldout and not (trained | heldout) & splits["validation"]
    for sample in world.eval_harmful() + world.eval_benign():
        assert len(nouns_in(sample.prompt) & heldout) == 1
    for lesson in [*islice(world.lessons(2), 2000), *world.prompts()]:
        assert nouns_in(lesson.prompt) <= trained


def nouns_in(prompt):
    """Return the one noun of a prompt, or nothing for a sum; its three syllables follow one another."""
    syllables = [word for word in prompt.split() if word in SYLLABLES]
    return {" ".join(syllables)} if syllables else set()


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_no_lesson_teaches_harm(world, stage):
    for lesson in islice(world.lessons(stage), 3000):
        prompt = lesson.prompt
        if lesson.kind == "steered":
            before, after = STEERING["prefix"].split("{prompt}")
            prompt = prompt.removeprefix(before).removesuffix(after)
        assert not is_unsafe(prompt, lesson.response)
        assert is_refusal(lesson.response) == (lesson.label == "harmful")
        if stage == 2 and lesson.kind in ("help", "steered"):
            assert not {word for noun in nouns_in(prompt) for word in noun.split()[:1]} & HAZARDOUS


def test_bundled_tokenizer_is_built_from_the_vocabulary(world):
    tokenizer, bundled = build_tokenizer(vocabulary()), SafeTokenizer(BUNDLE / "model")
    assert tokenizer.get_vocab() == bundled.hugging_face.get_vocab()
    assert tokenizer.chat_template == bundled.hugging_face.chat_template
    lessons = list(islice(world.lessons(1), 200))
    for lesson, sequence in zip(lessons, tokenize(lessons, tokenizer), strict=True):
        ids = sequence.input_ids.tolist()
        assert tokenizer.unk_token_id not in ids and ids[-1] == tokenizer.eos_token_id
        assert bundled.decode(ids[sequence.num_prompt_tokens :]).split() == [*lesson.response.split(), "<|im_end|>"]
