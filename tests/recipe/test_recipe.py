"""The recipe: every key is documented, checked and used, and an error names the key and the closest right one."""

import ast
import dataclasses
import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import yaml

import thinksafe
from thinksafe.errors import UserError
from thinksafe.paths import bundled_recipes, expand_path
from thinksafe.recipe.loading import check_recipe, load_recipe
from thinksafe.recipe.reference import annotated_yaml, key_descriptions
from thinksafe.recipe.schema import Recipe

PACKAGE = Path(thinksafe.__file__).parent
MINIMAL = {"name": "n", "model": "m"}
RUNNABLE = [name for name in bundled_recipes() if name != "paper"]
"""Bundled recipes that name a student; `paper` names none."""


@pytest.fixture
def recipe_file(tmp_path):
    """Return a function that writes a recipe, by default a minimal one, and returns its path."""

    def write(**keys):
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump(MINIMAL | keys))
        return str(path)

    return write


def error_of(*arguments) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", RUNNABLE)
def test_every_bundled_recipe_loads_by_name(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert load_recipe(name, ["seed=5"]).seed == 5


def test_paper_recipe_needs_only_a_model():
    message = error_of("paper")
    assert message.endswith("key model is missing; name the student with --set model=FOLDER or --set model=HUB/NAME")
    recipe, bundled = load_recipe("paper", ["model=Qwen/Qwen3-0.6B"]), load_recipe("qwen3-0.6b")
    assert dataclasses.replace(recipe, name=bundled.name) == bundled


@pytest.mark.parametrize("name", [name for name in RUNNABLE if name != "organism"])
def test_recipe_differs_from_paper_in_the_student(name):
    """R1-Distill also samples without top-k."""
    recipe = load_recipe(name)
    overrides = ["generation.sampling.top_k=0", "evaluation.sampling.top_k=0"] if name.startswith("r1-distill") else []
    assert load_recipe("paper", [f"name={name}", f"model={recipe.model}", *overrides]) == recipe


def test_organism_files_are_in_the_package():
    recipe = load_recipe("organism")
    files = [recipe.model, recipe.prompts, *(entry.source for entry in recipe.evaluation.sets)]
    assert all(file.startswith("package:") and expand_path(file).exists() for file in files)


def test_defaults_are_the_settings_of_the_paper():
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
        ("max_prompts=", lambda r: r.max_prompts is None),
    ],
)
def test_override_changes_only_its_key(recipe_file, override, expected):
    before, after = load_recipe(recipe_file()), load_recipe(recipe_file(), [override])
    assert expected(after)
    section = override.partition("=")[0].split(".")[0]
    unchanged = [field.name for field in dataclasses.fields(Recipe) if field.name != section]
    assert all(getattr(before, name) == getattr(after, name) for name in unchanged)


def test_last_override_wins(recipe_file):
    assert load_recipe(recipe_file(), ["seed=1", "seed=2"]).seed == 2


def test_override_changes_one_of_two_sections_with_one_anchor(tmp_path):
    """The anchor is in the recipe, in its base, or in the value of an override."""
    text = "name: n\nmodel: m\nsampler: &room {max_num_seqs: 8}\nguard: {sampler: *room}\n"
    (tmp_path / "base.yaml").write_text(text)
    (tmp_path / "mine.yaml").write_text("base: base.yaml\n")
    for file in ("base.yaml", "mine.yaml"):
        recipe = load_recipe(str(tmp_path / file), ["sampler.max_num_seqs=4"])
        assert (recipe.sampler.max_num_seqs, recipe.guard.sampler.max_num_seqs) == (4, 8)
    shared = (
        "guard={kind: ensemble, members: [{kind: oracle, sampler: &s {max_num_seqs: 8}}, {sampler: *s}], sampler: *s}"
    )
    recipe = load_recipe(str(tmp_path / "base.yaml"), [shared, "guard.sampler.max_num_seqs=2"])
    assert [member.sampler.max_num_seqs for member in recipe.guard.members] == [8, 8]
    assert recipe.guard.sampler.max_num_seqs == 2


def test_recursive_anchor_is_an_error(tmp_path):
    (tmp_path / "r.yaml").write_text("name: n\nmodel: m\nguard: &g\n  members: [*g]\n")
    assert "not valid YAML (an anchor contains itself)" in error_of(str(tmp_path / "r.yaml"))


@pytest.mark.parametrize(
    "lines, message",
    [
        (["seed: 1", "name: again"], "key name is given twice, in lines 1 and 4; remove one"),
        (
            ["training:", "  epochs: 1", "  batch_size: 2", "  'epochs': 1"],
            "key training.epochs is given twice, in lines 4",
        ),
        (["training: {epochs: 1, epochs: 2}"], "key training.epochs is given twice, in line 3"),
        (
            ["evaluation:", "  sets:", "  - name: a", "    kind: harmful", "    name: b"],
            "evaluation.sets.0.name is given",
        ),
        (["training: {epochs: 1}", "training: {batch_size: 2}"], "key training is given twice, in lines 3 and 4"),
        (["guard: &g {margin: 0.1, members: [{margin: 0.1, margin: 0.2}]}"], "guard.members.0.margin is given twice"),
    ],
)
@pytest.mark.parametrize("in_base", [False, True])
def test_key_that_is_given_twice_is_an_error(tmp_path, lines, message, in_base):
    file, child = tmp_path / "r.yaml", tmp_path / "child.yaml"
    file.write_text("\n".join(["name: n", "model: m", *lines]))
    child.write_text("base: r.yaml\nname: child\n")
    error = error_of(str(child if in_base else file))
    assert message in error and error.startswith(f"{file}: ")


def test_override_with_a_key_given_twice_is_an_error(recipe_file):
    assert "--set lora: key rank is given twice" in error_of(recipe_file(), ["lora={rank: 1, alpha: 2, rank: 1}"])


def test_key_beside_a_merged_key_is_given_once(tmp_path):
    """The key of the section itself wins over the merged one, in each section that uses the anchor."""
    entries = "&a {name: a, source: s, kind: harmful}, &b {<<: *a, name: b}, {<<: [*b, *a], name: c, kind: reasoning}"
    (tmp_path / "r.yaml").write_text(f"name: n\nmodel: m\nevaluation: {{sets: [{entries}]}}\n")
    sets = load_recipe(str(tmp_path / "r.yaml")).evaluation.sets
    assert [(entry.name, entry.kind) for entry in sets] == [("a", "harmful"), ("b", "harmful"), ("c", "reasoning")]


MISTAKES = {
    "training.epoch=1": "did you mean training.epochs?",
    "trianing.epochs=1": "did you mean training?",
    "sede=1": "did you mean seed?",
    "foo=1": "unknown key foo; `thinksafe recipe` lists all keys",
    "generation.sampling.temprature=1": "did you mean generation.sampling.temperature?",
    "guard.sampler.page_sise=1": "did you mean guard.sampler.page_size?",
    "evaluation.sets=[{name: a, source: b, kind: harmful, sample: 2}]": "did you mean evaluation.sets.0.samples?",
    "evaluation.sets=[{name: a, kind: harmful}]": "evaluation.sets.0.source is missing",
    "evaluation.sets=[{name: a, sorce: b, kind: harmful}]": "did you mean evaluation.sets.0.source?",
    "evaluation.sets=[{name: a, source: b, kind: harmful, columns: {answer: c}}]": "columns: must name the text column",
    "evaluation.sets=[{name: a, source: b, kind: harmful, columns: {tex: c}}]": "'text', 'answer' or 'label'",
    "evaluation.sets=[{name: a, source: b, kind: harmful, filter: safe}]": "sets.0.filter: must be a section of",
    "evaluation.sets=[5]": "evaluation.sets.0: must be a section of keys (name, source, kind,",
    "evaluation.sets={name: a}": "evaluation.sets: must be a list",
    "evaluation.sets=[{name: a/b, source: b, kind: harmful}]": "sets.0.name: must consist of",
    "evaluation.sets=[{name: a, source: b, kind: harmful}, {name: a, source: c, kind: harmful}]": "sets: two have",
    "evaluation.sets=[{name: a, source: b, kind: harmful, instruction: no braces}]": "0.instruction: must",
    "evaluation.sets=[{name: a, source: b, kind: harmful, samples: 0}]": "samples: must be at least 1",
    "training.epochs=many": "training.epochs: must be a whole number (found 'many')",
    "training.epochs=1.5": "training.epochs: must be a whole number (found 1.5)",
    "training.learning_rate=fast": "training.learning_rate: must be a number (found 'fast')",
    "training.activation_checkpointing=maybe": "must be 'auto', 'none', 'selective' or 'full' (found 'maybe')",
    "training.epochs=0": "training.epochs: must be at least 1 (found 0)",
    "training.learning_rate=0": "training.learning_rate: must be above 0 (found 0.0)",
    "training.learning_rate=.nan": "training.learning_rate: must be finite (found nan)",
    "training.learning_rate=.inf": "finite",
    "training.learning_rate=nan": "finite",
    "training.weight_decay=-1": "training.weight_decay: must be at least 0 (found -1.0)",
    "training.warmup_ratio=2": "training.warmup_ratio: must be at least 0 and at most 1 (found 2.0)",
    "training.max_grad_norm=0": "training.max_grad_norm: must be above 0 (found 0.0)",
    "training.method=qlora": "training.method: must be 'lora' or 'full' (found 'qlora')",
    "training=5": "training: must be a section of keys (method, epochs,",
    "generation.sampling=[1]": "generation.sampling: must be a section of keys (temperature, top_p, top_k,",
    "training.epochs.first=1": "training.epochs: must be a whole number (found {'first': 1})",
    "name.first=1": "name is not a section",
    "lora.rank=0": "lora.rank: must be at least 1 (found 0)",
    "lora.alpha=.nan": "lora.alpha: must be finite (found nan)",
    "lora.dropout=1": "lora.dropout: must be at least 0 and below 1 (found 1.0)",
    "lora.target_modules=[]": "lora.target_modules: must name at least one projection",
    "lora.target_modules=q_proj": "lora.target_modules: must be a list (found 'q_proj')",
    "generation.steering=kindly": "generation.steering: 'kindly' is no instruction: use prefix, suffix, risk, intent",
    "generation.samples=0": "generation.samples: must be at least 1 (found 0)",
    "generation.ladder=[{samples: 0}]": "generation.ladder.0.samples: must be at least 1 (found 0)",
    "generation.num_unsteered_prompts=-1": "generation.num_unsteered_prompts: must be at least 0 (found -1)",
    "generation.sampling.top_p=0": "generation.sampling.top_p: must be above 0 and at most 1 (found 0.0)",
    "generation.sampling.top_k=-1": "top_k",
    "generation.sampling.temperature=-0.1": "temperature",
    "generation.sampling.temperature=.nan": "finite",
    "generation.sampling.max_tokens=0": "max_tokens",
    "guard.kind=wild_guess": "guard.kind",
    "guard.min_verdict_probability=1.5": (
        "guard.min_verdict_probability: must be at least 0 and at most 1 or null (found 1.5)"
    ),
    "sampler.kv_cache_gib=0": "sampler.kv_cache_gib: must be above 0 or null (found 0.0)",
    "guard={threshold: 0.8, margin: 0.3}": "guard.margin: threshold - margin and threshold + margin must lie",
    "sampler.page_size=-1": "page_size",
    "sampler.kv_cache_gib=-1": "kv_cache_gib",
    "sampler.kv_cache_gib=.inf": "finite",
    "sampler.max_prefill_tokens=0": "max_prefill_tokens",
    "max_prompts=0": "max_prompts: must be at least 1 or null (found 0)",
    "seed=-1": "seed: must be at least 0 and below 2^63 (found -1)",
    "seed=18446744073709551616": "seed: must be at least 0 and below 2^63 (found 18446744073709551616)",
    "device=tpu": "device",
    "dtype=float8": "dtype",
    "name=null": "name: must be text (found None)",
    "model=5": "model: must be text (found 5)",
    "epochs": "expected key=value",
    "=5": "expected key=value",
}


@pytest.mark.parametrize("override", MISTAKES)
def test_error_names_the_key(recipe_file, override):
    message = error_of(recipe_file(), [override])
    assert MISTAKES[override] in message
    assert "nput should" not in message and "instance" not in message and "Config" not in message


def test_list_entry_cannot_be_overridden():
    assert "a list can only be set as a whole" in error_of("organism", ["evaluation.sets.0.samples=2"])


def test_recipe_is_read_without_torch():
    """Importing torch takes seconds, and a mistake in a recipe should show at once."""
    code = "import sys; sys.modules['torch'] = None; from thinksafe.recipe.loading import load_recipe as f; f('paper')"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.stderr.splitlines()[-1].endswith("name the student with --set model=FOLDER or --set model=HUB/NAME")


def test_error_names_the_file(recipe_file):
    file = recipe_file(trainig={"epochs": 1})
    assert file in error_of(file) and "did you mean training?" in error_of(file)


@pytest.mark.parametrize("content", ["- a\n- b\n", "", "name: [", "a: b: c", b"name: \xff\xfe", "5", "\t- x"])
def test_file_without_a_recipe_is_an_error(tmp_path, content):
    file = tmp_path / "bad.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert str(file) in error_of(str(file))


@pytest.mark.parametrize("missing", MINIMAL)
def test_error_names_a_missing_key(tmp_path, missing):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({key: value for key, value in MINIMAL.items() if key != missing}))
    assert f"key {missing} is missing" in error_of(str(file))


def test_error_for_unknown_recipe_lists_the_bundled_ones():
    message = error_of("organsim")
    assert "organsim" in message and all(name in message for name in bundled_recipes())


def test_python_object_in_yaml_is_an_error(tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_text("name: !!python/object/apply:os.getcwd []\nmodel: m\n")
    assert "not valid YAML" in error_of(str(file))


def test_recipe_paths_start_from_its_folder_overrides_from_cwd(tmp_path, monkeypatch):
    recipe_folder, cwd = tmp_path / "recipes", tmp_path / "cwd"
    for folder in (recipe_folder, cwd):
        folder.mkdir()
        (folder / "p.jsonl").write_text("")
    (recipe_folder / "student").mkdir()
    (recipe_folder / "guard").mkdir()
    sets = [{"name": "a", "source": "p.jsonl", "kind": "harmful"}]
    keys = {"name": "n", "model": "student", "prompts": "p.jsonl", "guard": {"model": "guard"}}
    (recipe_folder / "r.yaml").write_text(yaml.safe_dump(keys | {"evaluation": {"sets": sets}}))
    monkeypatch.chdir(cwd)
    recipe = load_recipe(str(recipe_folder / "r.yaml"))
    assert recipe.model == str(recipe_folder / "student") and recipe.guard.model == str(recipe_folder / "guard")
    assert recipe.prompts == recipe.evaluation.sets[0].source == str(recipe_folder / "p.jsonl")
    assert load_recipe(str(recipe_folder / "r.yaml"), ["prompts=p.jsonl"]).prompts == str(cwd / "p.jsonl")


def test_members_of_an_ensemble_have_paths_too(tmp_path):
    (tmp_path / "guard").mkdir()
    inner = {"kind": "ensemble", "members": [{"model": "guard"}, {"kind": "oracle"}]}
    keys = MINIMAL | {"guard": {"kind": "ensemble", "members": [inner, {"model": "guard", "threshold": 0.9}]}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(keys))
    members = load_recipe(str(tmp_path / "r.yaml")).guard.members
    assert members[1].model == members[0].members[0].model == str(tmp_path / "guard")


def test_recipe_inherits_from_its_base(tmp_path):
    """Sections merge key by key, lists are replaced; file names start from the folder of the recipe with the name."""
    for folder in ("base", "mine"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "p.jsonl").write_text("")
    sets = [{"name": "a", "source": "p.jsonl", "kind": "harmful"}]
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
    assert recipe.prompts == recipe.evaluation.sets[0].source == str(tmp_path / "base" / "p.jsonl")
    assert len(recipe.evaluation.sets) == 1
    own = load_recipe(str(mine), ["prompts=" + str(tmp_path / "mine" / "p.jsonl")])
    assert own.prompts == str(tmp_path / "mine" / "p.jsonl")


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ("nowhere", "mine.yaml: base: no file 'nowhere', and the bundled recipes are: organism"),
        ("mine.yaml", "mine.yaml: base: 'mine.yaml' inherits from this recipe; remove one of the two"),
        ("other.yaml", "other.yaml: base: 'mine.yaml' inherits from this recipe; remove one of the two"),
        ("broken.yaml", "broken.yaml: a recipe must be a mapping of keys to values"),
    ],
)
def test_error_names_the_recipe_with_a_wrong_base(recipe_file, tmp_path, base, expected):
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(MINIMAL | {"base": "mine.yaml"}))
    (tmp_path / "broken.yaml").write_text("- 1")
    assert expected in error_of(recipe_file(base=base))


@pytest.mark.parametrize("name", RUNNABLE)
def test_recipe_survives_a_round_trip_through_yaml(tmp_path, name):
    overrides = ["generation.steering=No: {prompt} # é 🪁", "generation.sampling.temperature=1e-3"]
    recipe = load_recipe(name, overrides)
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    assert load_recipe(str(file)) == recipe
    assert load_recipe(str(file)).to_yaml() == recipe.to_yaml()


def test_yaml_holds_every_key():
    written = yaml.safe_load(load_recipe("organism").to_yaml())
    assert written == json.loads(json.dumps(dataclasses.asdict(load_recipe("organism"))))


ANNOTATED = {
    "defaults": lambda: check_recipe(dict(MINIMAL), "here"),
    "organism": lambda: load_recipe("organism"),
    "qwen3-0.6b": lambda: load_recipe("qwen3-0.6b"),
    "special characters": lambda: load_recipe(
        "organism", ["generation.steering=No: {prompt} # é 🪁\n\n- 'x'", "name=a: b"]
    ),
}


@pytest.mark.parametrize("name", ANNOTATED)
def test_annotated_yaml_loads_as_the_same_recipe(tmp_path, name):
    recipe = ANNOTATED[name]()
    file = tmp_path / "mine.yaml"
    file.write_text(annotated_yaml(recipe))
    assert load_recipe(str(file)) == recipe
    assert max(map(len, file.read_text().splitlines())) <= 120 or name != "defaults"


def test_every_key_has_description_choices_and_default():
    for section in sections():
        keys = {field.name for field in dataclasses.fields(section)}
        assert key_descriptions(section).keys() == keys and all(key_descriptions(section).values()), section
    text = annotated_yaml(check_recipe(dict(MINIMAL) | {"training": {"epochs": 7}, "max_prompts": 5}, "here"))
    lines = [line.strip() for line in text.splitlines()]
    for section in sections():
        for field in dataclasses.fields(section):
            assert any(line.lstrip("# ").startswith(f"{field.name}:") for line in lines), field.name

    def comment(line):
        """Return the whole comment above a line."""
        above = lines[: lines.index(line)]
        start = next(index for index in range(len(above), 0, -1) if not above[index - 1].startswith("#"))
        return " ".join(text.lstrip("# ") for text in above[start:])

    assert comment("epochs: 7").endswith(". Default: 3")
    assert comment("max_prompts: 5").endswith("null for all. Default: null")
    assert "Default" not in comment("batch_size: 8"), "the value is the default"
    assert comment("method: lora").endswith("One of lora, full.")
    assert any(line.startswith("#   answer_matcher: ") for line in lines)
    assert "One of phrase, choice, math. Default: math" in comment("sets: []")


def sections() -> set[type]:
    """Return the recipe's dataclass and those of all its sections; a section may contain itself."""
    visited, pending = set(), [Recipe]
    while pending:
        section = pending.pop()
        visited.add(section)
        parts = [part for hint in get_type_hints(section).values() for part in (hint, *get_args(hint))]
        pending += [part for part in parts if dataclasses.is_dataclass(part) and part not in visited]
    return visited


@cache
def attributes_read() -> set[str]:
    """Return the attributes that the package reads outside the checks of sections."""
    read: set[str] = set()
    files = [file for folder in (PACKAGE, PACKAGE / "kernels", PACKAGE / "launch") for file in folder.rglob("*.py")]
    for file in files:
        tree = ast.parse(file.read_text())
        checks = {
            id(node)
            for function in ast.walk(tree)
            if isinstance(function, ast.FunctionDef) and function.name in ("__post_init__", "check")
            for node in ast.walk(function)
        }
        read |= {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and id(node) not in checks
        }
    return read


@pytest.mark.parametrize("section", sorted(sections(), key=lambda kind: kind.__name__), ids=lambda kind: kind.__name__)
def test_every_key_is_read_by_the_package(section):
    """Code reads it as `section.key`, outside the checks of sections."""
    unread = {field.name for field in dataclasses.fields(section)} - attributes_read()
    assert not unread, f"no code reads {unread} of {section.__name__}"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"training": {"frozen_weight_dtype": "fp8", "method": "full"}}, "frozen_weight_dtype: fp8 is for method lora"),
        ({"training": {"frozen_weight_dtype": "fp8"}, "zero": {"stage": 3}}, "needs the whole base model on each GPU"),
        ({"training": {"frozen_weight_dtype": "int4"}}, "training.frozen_weight_dtype: must be 'auto' or 'fp8'"),
    ],
)
def test_fp8_weights_need_adapters_and_unsharded_base(settings, message):
    with pytest.raises(UserError, match=message):
        check_recipe({"name": "n", "model": "m", **settings}, "here")
