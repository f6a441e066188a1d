"""Files of a checkpoint: what transformers loads is loaded, and two files or tensors that disagree are one clear error.

The oracle is transformers' model of the same folder.
"""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.support.checkpoints import FAMILIES, make_checkpoint, make_model
from thinksafe.errors import UserError
from thinksafe.model.weights import hugging_face_name, load_decoder, projections_digest

EMBEDDING, HEAD, INDEX = "model.embed_tokens.weight", "lm_head.weight", "model.safetensors.index.json"
UP_PROJ = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {family: make_checkpoint(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


@pytest.fixture
def checkpoint(folders, tmp_path):
    """A function that returns a copy of a family's checkpoint; `change` is called with its tensors, to edit them."""

    def copy(family, change=lambda tensors: None, **keys):
        folder = shutil.copytree(folders[family], tmp_path / family)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        raw = json.loads((folder / "config.json").read_text()) | keys
        (folder / "config.json").write_text(json.dumps(raw))
        return folder

    return copy


def shards(folder, family="llama"):
    """Replace the weights of a checkpoint by shards with an index, and return the index."""
    (folder / "model.safetensors").unlink()
    make_model(family).save_pretrained(folder, max_shard_size="100KB")
    return json.loads((folder / INDEX).read_text())


def assert_equal_to_transformers(folder, dtype=torch.float32):
    decoder = load_decoder(folder, dtype, "cpu")
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).state_dict()
    for name, parameter in decoder.named_parameters():
        assert torch.equal(parameter, expected[hugging_face_name(name)]), name
    assert torch.equal(decoder.head, expected[HEAD])


def load_error(folder) -> str:
    with pytest.raises(UserError) as caught:
        load_decoder(folder, torch.float32, "cpu")
    message = str(caught.value)
    assert message.startswith(str(folder)) and "\n" not in message and len(message) < 500
    return message.removeprefix(str(folder))


def without_prefix(tensors):
    for name in [name for name in tensors if name.startswith("model.")]:
        tensors[name.removeprefix("model.")] = tensors.pop(name)


def only_head(tensors):
    tensors[HEAD] = tensors.pop(EMBEDDING)


EQUAL = {
    "tied head stored twice": ("qwen3", lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()})),
    "tied head stored alone": ("qwen3", only_head),
    "class without a head, tied": ("qwen3", without_prefix),
    "class without a head, untied": ("llama", without_prefix),
    "rotary frequencies stored": (
        "llama",
        lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}),
    ),
    "one tensor in bf16": ("qwen2", lambda tensors: tensors.update({UP_PROJ: tensors[UP_PROJ].bfloat16()})),
    "one tensor in fp64": ("mistral", lambda tensors: tensors.update({UP_PROJ: tensors[UP_PROJ].double()})),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", EQUAL)
def test_unusual_checkpoints_load_as_in_transformers(checkpoint, name, dtype):
    family, change = EQUAL[name]
    assert_equal_to_transformers(checkpoint(family, change), dtype)


def test_other_files_in_the_folder_are_not_read(checkpoint):
    folder = checkpoint("llama")
    shards(folder)
    for name in ("consolidated.safetensors", "training_args.bin"):
        (folder / name).write_bytes(b"damaged")
    assert_equal_to_transformers(folder)


def edit(name, change):
    return lambda tensors: tensors.update({name: change(tensors[name])})


def scaled_fp8(tensors):
    tensors[UP_PROJ] = tensors[UP_PROJ].to(torch.float8_e4m3fn)
    tensors[UP_PROJ + "_scale_inv"] = torch.ones(1, 1)


def below(prefix):
    def change(tensors):
        for name in list(tensors):
            tensors[prefix + name] = tensors.pop(name)

    return change


def set_value(value):
    def change(tensor):
        tensor[3, 5] = value
        return tensor

    return change


WRONG_TENSORS = {
    "int8": ("llama", edit(UP_PROJ, lambda tensor: tensor.to(torch.int8)), f"{UP_PROJ} has dtype I8"),
    "int64": ("llama", edit("model.norm.weight", lambda tensor: tensor.long()), "model.norm.weight has dtype I64"),
    "fp8 with a scale": ("llama", scaled_fp8, f"{UP_PROJ} has dtype F8_E4M3, .* use the bf16 original"),
    "scale beside bf16": (
        "llama",
        lambda tensors: tensors.update({UP_PROJ.replace("weight", "weight_scale"): torch.ones(1)}),
        "unknown tensors: model.layers.1.mlp.up_proj.weight_scale$",
    ),
    "bias that config.json denies": (
        "llama",
        lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}),
        "unknown tensors: model.layers.0.self_attn.q_proj.bias$",
    ),
    "a head for classes": (
        "qwen3",
        lambda tensors: tensors.update({"score.weight": torch.ones(2, 64)}),
        "unknown tensors: score.weight$",
    ),
    "a model inside another": (
        "qwen3",
        below("language_model."),
        "requires 2 layers, but the weights have 0; the files hold language_model.*and 21 more",
    ),
    "compiled": ("llama", below("_orig_mod."), "the files hold _orig_mod"),
    "head differs from the embedding": (
        "qwen3",
        lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].flip(0)}),
        f"tie_word_embeddings in config.json is true, but {HEAD} differs from {EMBEDDING}; set it to false",
    ),
    "head of another size": (
        "qwen3",
        lambda tensors: tensors.update({HEAD: torch.ones(7)}),
        f"{HEAD} differs from {EMBEDDING}",
    ),
    "no head": ("llama", lambda tensors: tensors.pop(HEAD), f"weights are missing: {HEAD}$"),
    "one row less": ("qwen3", edit(EMBEDDING, lambda tensor: tensor[1:].clone()), r"has shape \[399, 64\]"),
    "a scalar": ("qwen3", edit("model.norm.weight", lambda tensor: torch.tensor(1.0)), r"has shape \[\]"),
    "NaN": ("qwen2", edit(UP_PROJ, set_value(float("nan"))), f"NaN or infinite values in {UP_PROJ}"),
    "infinity": ("qwen2", edit(UP_PROJ, set_value(-float("inf"))), f"NaN or infinite values in {UP_PROJ}"),
}


@pytest.mark.parametrize("name", WRONG_TENSORS)
def test_wrong_tensor_is_an_error_that_names_it(checkpoint, name):
    family, change, message = WRONG_TENSORS[name]
    assert re.search(message, load_error(checkpoint(family, change)))


def test_values_beyond_the_range_of_the_dtype_are_an_error(checkpoint):
    folder = checkpoint("llama", edit(UP_PROJ, set_value(1e6)))
    load_decoder(folder, torch.float32, "cpu")
    with pytest.raises(UserError, match=f"NaN or infinite values in {UP_PROJ}"):
        load_decoder(folder, torch.float16, "cpu")


def test_damaged_values_are_an_error_in_fp8_too(checkpoint):
    folder = checkpoint("llama", edit(UP_PROJ, set_value(float("nan"))))
    with pytest.raises(UserError, match=f"NaN or infinite values in {UP_PROJ}"):
        load_decoder(folder, torch.float32, "cpu", weight_dtype="fp8")


@pytest.mark.parametrize("key", ["vocab_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings"])
@pytest.mark.parametrize("size", [10**6, 2**24, 10**12, 10**400])
def test_huge_sizes_take_no_memory_or_time(checkpoint, key, size):
    if key == "max_position_embeddings" and size <= 2**24:
        load_decoder(checkpoint("llama", **{key: size}), torch.float32, "cpu")
    else:
        assert str(size)[:6] in load_error(checkpoint("llama", **{key: size}))


def write_index(folder, index):
    (folder / INDEX).write_text(json.dumps(index))


def stale_shards(folder, index):
    shutil.copy(next(folder.glob("model-00001-*")), folder / "model.safetensors")


def move_a_tensor(folder, index):
    first, *_, last = sorted(set(index["weight_map"].values()))
    name = next(name for name, file in index["weight_map"].items() if file == first)
    write_index(folder, {"weight_map": index["weight_map"] | {name: last}})


def repeat_a_tensor(folder, index):
    first, second, *_ = sorted(set(index["weight_map"].values()))
    tensors = load_file(folder / first)
    save_file(tensors | load_file(folder / second), folder / second)


def name_a_file(file):
    return lambda folder, index: write_index(folder, {"weight_map": index["weight_map"] | {UP_PROJ: file}})


def name_a_tensor(folder, index):
    file = next(iter(index["weight_map"].values()))
    write_index(folder, {"weight_map": index["weight_map"] | {"model.layers.0.self_attn.scale": file}})


WRONG_FILES = {
    "one file beside shards": (stale_shards, "holds model.safetensors and .*index.json, which names other files"),
    "shards without an index": (lambda folder, _: (folder / INDEX).unlink(), "index.json must name the files"),
    "tensor in another shard": (move_a_tensor, "the files that it names do not hold model"),
    "tensor in two shards": (repeat_a_tensor, "another file holds .* as well"),
    "tensor in no shard": (name_a_tensor, "the files that it names do not hold model.layers.0.self_attn.scale"),
    "shard that is missing": (name_a_file("model-00009-of-00009.safetensors"), "model-00009-.*weights are missing"),
    "shard outside the folder": (name_a_file("../model.safetensors"), "weights are missing"),
    "shard with a null character": (name_a_file("a\0.safetensors"), "weights are missing"),
    "shard that is no name": (name_a_file(3), "not a valid weight index"),
    "index without a map": (lambda folder, _: write_index(folder, {"metadata": {}}), "not a valid weight index"),
    "index that is no object": (lambda folder, _: write_index(folder, [1]), "not a JSON object"),
    "adapter beside the model": (
        lambda folder, _: (folder / "adapter_config.json").write_text("{}"),
        "holds an adapter beside the model",
    ),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_files_that_disagree_are_an_error_that_names_them(checkpoint, name):
    change, message = WRONG_FILES[name]
    folder = checkpoint("llama")
    change(folder, shards(folder))
    assert re.search(message, load_error(folder))


def test_index_of_the_one_file_is_read(checkpoint):
    folder = checkpoint("llama")
    weight_map = dict.fromkeys(load_file(folder / "model.safetensors"), "model.safetensors")
    write_index(folder, {"weight_map": weight_map})
    assert_equal_to_transformers(folder)


def test_folder_in_place_of_the_weights_is_an_error(checkpoint):
    folder = checkpoint("llama")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    assert "corrupt safetensors" in load_error(folder)


def test_digest_does_not_depend_on_prefix_and_split(checkpoint, folders):
    folder = checkpoint("llama", without_prefix)
    assert projections_digest(folder) == projections_digest(folders["llama"])
    shards(folder)
    assert projections_digest(folder) == projections_digest(folders["llama"])
