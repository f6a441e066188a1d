"""The recipe: every key is known, checked and used, and a mistake is answered with the key that was meant."""

import ast
import dataclasses
import json
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import yaml

import thinksafe
from thinksafe.errors import UserError
from thinksafe.paths import bundled_recipes, expand
from thinksafe.recipe.loading import check_recipe, load_recipe
from thinksafe.recipe.reference import explained, meanings
from thinksafe.recipe.schema import Recipe

PACKAGE = Path(thinksafe.__file__).parent
MINIMAL = {"name": "n", "model": "m"}


@pytest.fixture
def recipe_file(tmp_path):
    """Writes a recipe, by default a minimal one, and gives its path."""

    def write(**keys):
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump(MINIMAL | keys))
        return str(path)

    return write


def refusal(*arguments) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", bundled_recipes())
def test_every_bundled_recipe_loads_by_name(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert load_recipe(name, ["seed=5"]).seed == 5


def test_the_bundled_world_lies_in_the_package():
    recipe = load_recipe("organism")
    files = [recipe.model, recipe.prompts, *(entry.file for entry in recipe.evaluation.sets)]
    assert all(file.startswith("package:") and expand(file).exists() for file in files)


def test_the_defaults_are_the_papers_settings():
    recipe = check_recipe(dict(MINIMAL), "here")
    sampling, lora, training = recipe.generation.sampling, recipe.lora, recipe.training
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.max_tokens) == (0.6, 0.95, 20, 16384)
    assert recipe.generation.steering == "prefix" and recipe.generation.samples == 1
    assert (lora.rank, lora.alpha, lora.dropout, lora.target_modules) == (32, 16, 0.05, ("q_proj", "v_proj"))
    assert (training.epochs, training.batch_size, training.learning_rate) == (3, 8, 1e-5)
    assert (training.warmup_ratio, training.weight_decay, training.max_grad_norm) == (0.1, 0, 1)
    assert recipe.guard.model == "meta-llama/Llama-Guard-3-8B" and training.max_length == 16384


@pytest.mark.parametrize(
    "override, expected",
    [
        ("training.epochs=7", lambda r: r.training.epochs == 7),
        ("training.learning_rate=1e-5", lambda r: r.training.learning_rate == 1e-5),
        ("generation.steering=null", lambda r: r.generation.steering is None),
        ("generation.steering=risk", lambda r: r.generation.steering == "risk"),
        ("generation.steering=Say: no. {prompt}", lambda r: r.generation.steering == "Say: no. {prompt}"),
        ("generation.steering={prompt}: no\n\n # ", lambda r: r.generation.steering == "{prompt}: no\n\n # "),
        ("generation.steering='{prompt}'", lambda r: r.generation.steering == "{prompt}"),
        ("name=2026-01-02", lambda r: r.name == "2026-01-02"),
        ("name='5'", lambda r: r.name == "5"),
        ("generation.sampling={temperature: 0, top_k: 0}", lambda r: r.generation.sampling.temperature == 0),
        ("lora.target_modules=[o_proj]", lambda r: r.lora.target_modules == ("o_proj",)),
        ("generation.sampling.top_p=0.5", lambda r: r.generation.sampling.top_p == 0.5),
        ("prompts=a=b.jsonl", lambda r: r.prompts == "a=b.jsonl"),
        ("evaluation.sets=[]", lambda r: r.evaluation.sets == ()),
        ("limit=", lambda r: r.limit is None),
    ],
)
def test_an_override_changes_its_key_alone(recipe_file, override, expected):
    before, after = load_recipe(recipe_file()), load_recipe(recipe_file(), [override])
    assert expected(after)
    section = override.partition("=")[0].split(".")[0]
    unchanged = [field.name for field in dataclasses.fields(Recipe) if field.name != section]
    assert all(getattr(before, name) == getattr(after, name) for name in unchanged)


def test_the_last_override_wins(recipe_file):
    assert load_recipe(recipe_file(), ["seed=1", "seed=2"]).seed == 2


def test_sections_that_share_an_anchor_are_changed_one_by_one(tmp_path):
    """In the recipe, in the one it builds on, and in the value of an override."""
    text = "name: n\nmodel: m\nsampler: &room {max_running: 8}\nguard: {sampler: *room}\n"
    (tmp_path / "base.yaml").write_text(text)
    (tmp_path / "mine.yaml").write_text("base: base.yaml\n")
    for file in ("base.yaml", "mine.yaml"):
        recipe = load_recipe(str(tmp_path / file), ["sampler.max_running=4"])
        assert (recipe.sampler.max_running, recipe.guard.sampler.max_running) == (4, 8)
    shared = (
        "guard={kind: ensemble, members: [{kind: oracle, sampler: &s {max_running: 8}}, {sampler: *s}], sampler: *s}"
    )
    recipe = load_recipe(str(tmp_path / "base.yaml"), [shared, "guard.sampler.max_running=2"])
    assert [member.sampler.max_running for member in recipe.guard.members] == [8, 8]
    assert recipe.guard.sampler.max_running == 2


def test_an_anchor_that_holds_itself_is_refused(tmp_path):
    (tmp_path / "r.yaml").write_text("name: n\nmodel: m\nguard: &g\n  members: [*g]\n")
    assert "not valid YAML (an anchor holds itself)" in refusal(str(tmp_path / "r.yaml"))


MISTAKES = {
    "training.epoch=1": "did you mean training.epochs?",
    "trianing.epochs=1": "did you mean training?",
    "sede=1": "did you mean seed?",
    "generation.sampling.temprature=1": "did you mean generation.sampling.temperature?",
    "guard.sampler.page_sise=1": "did you mean guard.sampler.page_size?",
    "evaluation.sets=[{name: a, file: b, kind: harmful, sample: 2}]": "did you mean evaluation.sets.0.samples?",
    "evaluation.sets=[{name: a, kind: harmful}]": "evaluation.sets.0.file is missing",
    "evaluation.sets=[{name: a, fil: b, kind: harmful}]": "did you mean evaluation.sets.0.file?",
    "evaluation.sets=[{name: a, file: b, kind: harmful, columns: {answer: c}}]": "columns must say where the text is",
    "evaluation.sets=[{name: a, file: b, kind: harmful, columns: {tex: c}}]": "'text', 'answer' or 'label'",
    "evaluation.sets=[{name: a, file: b, kind: harmful, where: safe}]": "evaluation.sets.0.where: must be a section of",
    "evaluation.sets=[5]": "evaluation.sets.0: must be a section of keys (name, file, kind,",
    "evaluation.sets={name: a}": "evaluation.sets: must be a list",
    "evaluation.sets=[{name: a/b, file: b, kind: harmful}]": "name must consist of",
    "evaluation.sets=[{name: a, file: b, kind: harmful}, {name: a, file: c, kind: harmful}]": "the same name",
    "evaluation.sets=[{name: a, file: b, kind: harmful, instruction: no braces}]": "{prompt}",
    "evaluation.sets=[{name: a, file: b, kind: harmful, samples: 0}]": "samples",
    "training.epochs=many": "training.epochs: must be a whole number (found 'many')",
    "training.epochs=1.5": "training.epochs: must be a whole number (found 1.5)",
    "training.learning_rate=fast": "training.learning_rate: must be a number (found 'fast')",
    "training.activation_checkpointing=maybe": "must be 'auto', 'none', 'selective' or 'full' (found 'maybe')",
    "training.epochs=0": "epochs must be at least 1",
    "training.learning_rate=0": "learning_rate",
    "training.learning_rate=.nan": "finite",
    "training.learning_rate=.inf": "finite",
    "training.learning_rate=nan": "finite",
    "training.weight_decay=-1": "weight_decay",
    "training.warmup_ratio=2": "warmup_ratio",
    "training.max_grad_norm=0": "max_grad_norm",
    "training.method=qlora": "training.method: must be 'lora' or 'full' (found 'qlora')",
    "training=5": "training: must be a section of keys (method, epochs,",
    "generation.sampling=[1]": "generation.sampling: must be a section of keys (temperature, top_p, top_k,",
    "training.epochs.first=1": "training.epochs",
    "name.first=1": "name is not a section",
    "lora.rank=0": "rank",
    "lora.alpha=.nan": "finite",
    "lora.dropout=1": "dropout",
    "lora.target_modules=[]": "target_modules",
    "lora.target_modules=q_proj": "lora.target_modules: must be a list (found 'q_proj')",
    "generation.steering=kindly": "none of prefix, suffix, risk, intent",
    "generation.samples=0": "samples",
    "generation.unsteered_probe=-1": "unsteered_probe",
    "generation.sampling.top_p=0": "top_p",
    "generation.sampling.top_k=-1": "top_k",
    "generation.sampling.temperature=-0.1": "temperature",
    "generation.sampling.temperature=.nan": "finite",
    "generation.sampling.max_tokens=0": "max_tokens",
    "guard.kind=wild_guess": "guard.kind",
    "guard.min_mass=1.5": "min_mass",
    "sampler.page_size=-1": "page_size",
    "sampler.kv_cache_gib=-1": "kv_cache_gib",
    "sampler.kv_cache_gib=.inf": "finite",
    "sampler.max_step_tokens=0": "max_step_tokens",
    "limit=0": "limit",
    "seed=-1": "seed",
    "seed=18446744073709551616": "seed",
    "device=tpu": "device",
    "dtype=float8": "dtype",
    "name=null": "name: must be text (found None)",
    "model=5": "model: must be text (found 5)",
    "epochs": "expected key=value",
    "=5": "expected key=value",
}


@pytest.mark.parametrize("override", MISTAKES)
def test_a_mistake_is_named_with_its_key(recipe_file, override):
    message = refusal(recipe_file(), [override])
    assert MISTAKES[override] in message
    assert "nput should" not in message and "instance" not in message and "Config" not in message


def test_lists_are_set_whole():
    assert "lists are set whole" in refusal("organism", ["evaluation.sets.0.samples=2"])


def test_a_mistake_in_the_file_names_the_file(recipe_file):
    file = recipe_file(trainig={"epochs": 1})
    assert file in refusal(file) and "did you mean training?" in refusal(file)


@pytest.mark.parametrize("content", ["- a\n- b\n", "", "name: [", "a: b: c", b"name: \xff\xfe", "5", "\t- x"])
def test_a_file_that_is_no_recipe_is_named(tmp_path, content):
    file = tmp_path / "bad.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert str(file) in refusal(str(file))


@pytest.mark.parametrize("missing", MINIMAL)
def test_a_missing_key_is_named(tmp_path, missing):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({key: value for key, value in MINIMAL.items() if key != missing}))
    assert f"key {missing} is missing" in refusal(str(file))


def test_an_unknown_recipe_is_answered_with_the_known_ones():
    message = refusal("organsim")
    assert "organsim" in message and all(name in message for name in bundled_recipes())


def test_python_objects_in_yaml_are_refused(tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_text("name: !!python/object/apply:os.getcwd []\nmodel: m\n")
    assert "not valid YAML" in refusal(str(file))


def test_files_are_found_beside_the_recipe_and_those_of_overrides_where_one_stands(tmp_path, monkeypatch):
    beside, here = tmp_path / "beside", tmp_path / "here"
    for folder in (beside, here):
        folder.mkdir()
        (folder / "p.jsonl").write_text("")
    (beside / "student").mkdir()
    (beside / "guard").mkdir()
    sets = [{"name": "a", "file": "p.jsonl", "kind": "harmful"}]
    keys = {"name": "n", "model": "student", "prompts": "p.jsonl", "guard": {"model": "guard"}}
    (beside / "r.yaml").write_text(yaml.safe_dump(keys | {"evaluation": {"sets": sets}}))
    monkeypatch.chdir(here)
    recipe = load_recipe(str(beside / "r.yaml"))
    assert recipe.model == str(beside / "student") and recipe.guard.model == str(beside / "guard")
    assert recipe.prompts == recipe.evaluation.sets[0].file == str(beside / "p.jsonl")
    assert load_recipe(str(beside / "r.yaml"), ["prompts=p.jsonl"]).prompts == str(here / "p.jsonl")


def test_a_recipe_says_only_what_differs_from_its_base(tmp_path):
    """Sections key by key, lists whole; files are those beside the recipe that names them."""
    for folder in ("base", "mine"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "p.jsonl").write_text("")
    sets = [{"name": "a", "file": "p.jsonl", "kind": "harmful"}]
    keys = {
        "model": "m",
        "prompts": "p.jsonl",
        "training": {"epochs": 7, "batch_size": 2},
        "evaluation": {"sets": sets},
    }
    (tmp_path / "base" / "b.yaml").write_text(yaml.safe_dump({"base": "organism", "name": "b"} | keys))
    mine = tmp_path / "mine" / "m.yaml"
    mine.write_text(yaml.safe_dump({"base": "../base/b.yaml", "name": "n", "training": {"epochs": 1}}))
    recipe = load_recipe(str(mine), ["training.max_length=99"])
    assert (recipe.name, recipe.model, recipe.guard.kind) == ("n", "m", "oracle")
    assert (recipe.training.epochs, recipe.training.batch_size, recipe.training.max_length) == (1, 2, 99)
    assert recipe.training.learning_rate == load_recipe("organism").training.learning_rate
    assert recipe.prompts == recipe.evaluation.sets[0].file == str(tmp_path / "base" / "p.jsonl")
    assert len(recipe.evaluation.sets) == 1
    own = load_recipe(str(mine), ["prompts=" + str(tmp_path / "mine" / "p.jsonl")])
    assert own.prompts == str(tmp_path / "mine" / "p.jsonl")


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ("nowhere", "mine.yaml: base: no file 'nowhere', and the bundled recipes are: organism"),
        ("mine.yaml", "mine.yaml: base: 'mine.yaml' is built on this recipe itself"),
        ("other.yaml", "other.yaml: base: 'mine.yaml' is built on this recipe itself"),
        ("broken.yaml", "broken.yaml: a recipe is a mapping of keys to values"),
    ],
)
def test_a_base_that_is_none_is_named_with_the_recipe_that_wants_it(recipe_file, tmp_path, base, expected):
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(MINIMAL | {"base": "mine.yaml"}))
    (tmp_path / "broken.yaml").write_text("- 1")
    assert expected in refusal(recipe_file(base=base))


@pytest.mark.parametrize("name", bundled_recipes())
def test_a_recipe_comes_back_from_its_own_yaml(tmp_path, name):
    overrides = ["generation.steering=No: {prompt} # é 🪁", "generation.sampling.temperature=1e-3"]
    recipe = load_recipe(name, overrides)
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    assert load_recipe(str(file)) == recipe
    assert load_recipe(str(file)).to_yaml() == recipe.to_yaml()


def test_the_yaml_of_a_recipe_holds_every_key():
    written = yaml.safe_load(load_recipe("organism").to_yaml())
    assert written == json.loads(json.dumps(dataclasses.asdict(load_recipe("organism"))))


EXPLAINED = {
    "defaults": lambda: check_recipe(dict(MINIMAL), "here"),
    "organism": lambda: load_recipe("organism"),
    "qwen3-0.6b": lambda: load_recipe("qwen3-0.6b"),
    "odd texts": lambda: load_recipe("organism", ["generation.steering=No: {prompt} # é 🪁\n\n- 'x'", "name=a: b"]),
}


@pytest.mark.parametrize("name", EXPLAINED)
def test_an_explained_recipe_is_that_recipe(tmp_path, name):
    recipe = EXPLAINED[name]()
    file = tmp_path / "mine.yaml"
    file.write_text(explained(recipe))
    assert load_recipe(str(file)) == recipe
    assert max(map(len, file.read_text().splitlines())) <= 120 or name != "defaults"


def test_every_key_is_explained_with_its_choices_and_its_default():
    """Sections that are one idea, such as LoRA, explain their keys together."""
    for section in sections() - {Recipe}:
        keys = {field.name for field in dataclasses.fields(section)}
        assert meanings(section).keys() == keys, section
    text = explained(check_recipe(dict(MINIMAL) | {"training": {"epochs": 7}, "limit": 5}, "here"))
    lines = [line.strip() for line in text.splitlines()]
    for section in sections():
        for field in dataclasses.fields(section):
            assert any(line.lstrip("# ").startswith(f"{field.name}:") for line in lines), field.name
    assert "#   answer: How reasoning answers are compared. One of phrase, choice, math. Default: math" in lines
    assert lines[lines.index("epochs: 7") - 1] == "# Passes over the accepted examples. Default: 3"
    assert lines[lines.index("limit: 5") - 1].endswith("null for all. Default: null")
    assert lines[lines.index("batch_size: 8") - 1] == "# Sequences an optimiser step."
    assert lines[lines.index("method: lora") - 1].endswith("One of lora, full.")


def sections() -> set[type]:
    """The recipe's dataclass and those of all its sections, some of which may lie inside themselves."""
    found, waiting = set(), [Recipe]
    while waiting:
        kind = waiting.pop()
        found.add(kind)
        parts = [part for hint in get_type_hints(kind).values() for part in (hint, *get_args(hint))]
        waiting += [part for part in parts if dataclasses.is_dataclass(part) and part not in found]
    return found


@pytest.mark.parametrize("section", sorted(sections(), key=lambda kind: kind.__name__), ids=lambda kind: kind.__name__)
def test_every_key_of_the_recipe_is_read_somewhere(section):
    """As `something.key` in the package, apart from the checks in the section's own `__post_init__`."""
    read: set[str] = set()
    files = [file for folder in (PACKAGE, PACKAGE / "kernels", PACKAGE / "launch") for file in folder.rglob("*.py")]
    for file in files:
        tree = ast.parse(file.read_text())
        checks = {
            id(node)
            for function in ast.walk(tree)
            if isinstance(function, ast.FunctionDef) and function.name == "__post_init__"
            for node in ast.walk(function)
        }
        read |= {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and id(node) not in checks
        }
    unread = {field.name for field in dataclasses.fields(section)} - read
    assert not unread, f"no code reads {unread} of {section.__name__}"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"training": {"frozen_weights": "fp8", "method": "full"}}, "training: frozen_weights: fp8 is for method lora"),
        ({"training": {"frozen_weights": "fp8"}, "zero": {"stage": 3}}, "keeps the base whole on every GPU"),
        ({"training": {"frozen_weights": "int4"}}, "training.frozen_weights: must be 'auto' or 'fp8'"),
    ],
)
def test_frozen_weights_in_e4m3_are_for_adapters_on_one_whole_base(settings, message):
    with pytest.raises(UserError, match=message):
        check_recipe({"name": "n", "model": "m", **settings}, "here")
