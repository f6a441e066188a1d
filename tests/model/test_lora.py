"""LoRA adapters: they equal PEFT's in logits and files, and never change the base weights.

The oracle is PEFT on transformers' model.
"""

import copy
import json
import random
import re
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.support.checkpoints import FAMILIES, make_checkpoint
from thinksafe.errors import UserError
from thinksafe.model.attention import PackedAttention, packed_positions
from thinksafe.model.config import LoraConfig
from thinksafe.model.lora import (
    adapter_parameters,
    attach,
    check_same_base,
    detach,
    load_adapter,
    merge,
    save_adapter,
    write_base_record,
)
from thinksafe.model.weights import load_config, load_decoder, save_decoder

EVERYWHERE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CONFIG = LoraConfig(rank=4, alpha=6.0, dropout=0.1, target_modules=("q_proj", "v_proj"))
IDS = torch.arange(3, 40) * 7 % 371


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {family: make_checkpoint(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


@pytest.fixture
def decoder(folders):
    return load_decoder(folders["qwen3"], torch.float32, "cpu")


def logits(decoder, ids=IDS):
    with torch.no_grad():
        hidden = decoder(ids, packed_positions([len(ids)], "cpu"), PackedAttention.of([len(ids)], "cpu"))
        return hidden @ decoder.head.T


def with_random_adapter(decoder, config=CONFIG, seed=0):
    """Attach a random adapter that changes the logits, and return the decoder."""
    attach(decoder, config, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in adapter_parameters(decoder).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return decoder.eval()


def test_new_adapter_changes_nothing_and_is_the_only_trainable(decoder):
    before = logits(decoder)
    attach(decoder, LoraConfig(target_modules=EVERYWHERE), seed=0)
    assert torch.equal(logits(decoder.eval()), before)
    trainable = {name for name, parameter in decoder.named_parameters() if parameter.requires_grad}
    assert trainable == {
        f"layers.{layer}.{name}.lora_{half}" for layer in range(2) for name in EVERYWHERE for half in "AB"
    }


def test_new_adapter_is_initialized_as_in_peft(folders):
    decoders = [load_decoder(folders["qwen3"], torch.float32, "cpu") for _ in range(3)]
    for decoder, seed in zip(decoders, (1, 1, 2), strict=True):
        attach(decoder, CONFIG, seed)
    adapter, same_seed, other_seed = (adapter_parameters(decoder) for decoder in decoders)
    assert all(torch.equal(adapter[name], same_seed[name]) for name in adapter)
    for name, parameter in adapter.items():
        if "lora_A" in name:
            bound = parameter.shape[1] ** -0.5  # the bound of Kaiming-uniform with a = sqrt(5)
            assert not torch.equal(parameter, other_seed[name])
            assert 0.9 * bound < parameter.abs().max() <= bound
        else:
            assert not parameter.any()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), EVERYWHERE], ids=["q and v", "everywhere"])
def test_our_adapter_gives_the_same_logits_in_peft(folders, tmp_path, family, targets):
    decoder = load_decoder(folders[family], torch.float32, "cpu")
    before = logits(decoder)
    config = LoraConfig(rank=4, alpha=6.0, dropout=0.1, target_modules=targets)
    save_adapter(with_random_adapter(decoder, config), config, tmp_path, str(folders[family]))
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folders[family]), tmp_path).eval()
    with torch.no_grad():
        peft_logits = model(IDS[None]).logits[0]
    torch.testing.assert_close(logits(decoder), peft_logits, rtol=1e-5, atol=1e-5)
    assert (logits(decoder) - before).abs().max() > 0.1
    assert model.peft_config["default"].base_model_name_or_path == str(folders[family])
    assert model.peft_config["default"].lora_dropout == 0.1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_peft_adapter_gives_the_same_logits_here(folders, tmp_path, family, dtype):
    settings = peft.LoraConfig(
        r=3, lora_alpha=5, lora_dropout=0.2, target_modules=["v_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folders[family]), settings).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape).mul(0.3).to(dtype))
        peft_logits = model(IDS[None]).logits[0]
    model.to(dtype).save_pretrained(tmp_path)
    decoder = load_decoder(folders[family], torch.float32, "cpu")
    config = load_adapter(decoder, tmp_path)
    assert config == LoraConfig(rank=3, alpha=5, dropout=0.2, target_modules=("down_proj", "v_proj"))
    torch.testing.assert_close(logits(decoder), peft_logits, rtol=1e-5, atol=1e-5)


def test_saved_adapter_loads_with_the_same_logits(decoder, folders, tmp_path):
    save_adapter(with_random_adapter(decoder), CONFIG, tmp_path, "base")
    reloaded = load_decoder(folders["qwen3"], torch.float32, "cpu")
    assert load_adapter(reloaded, tmp_path) == CONFIG
    assert torch.equal(logits(reloaded), logits(decoder))


def test_adapter_stays_fp32_on_a_bf16_model(folders, tmp_path):
    decoder = with_random_adapter(load_decoder(folders["qwen3"], torch.bfloat16, "cpu"))
    assert {parameter.dtype for parameter in adapter_parameters(decoder).values()} == {torch.float32}
    save_adapter(decoder, CONFIG, tmp_path, "base")
    assert {tensor.dtype for tensor in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.float32}
    reloaded = load_decoder(folders["qwen3"], torch.bfloat16, "cpu")
    load_adapter(reloaded, tmp_path)
    assert torch.equal(logits(reloaded), logits(decoder)) and logits(decoder).dtype == torch.bfloat16


def test_detaching_restores_the_base_bit_for_bit(decoder):
    before = {name: parameter.clone() for name, parameter in decoder.named_parameters()}
    expected = logits(decoder)
    with_random_adapter(decoder, LoraConfig(target_modules=EVERYWHERE))
    assert not torch.equal(logits(decoder), expected)
    detach(decoder)
    after = dict(decoder.named_parameters())
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in after)
    assert torch.equal(logits(decoder), expected)


def test_adapters_can_be_swapped(decoder, folders, tmp_path):
    expected = {}
    for seed in (0, 1):
        expected[seed] = logits(with_random_adapter(decoder, seed=seed))
        save_adapter(decoder, CONFIG, tmp_path / str(seed), "base")
        detach(decoder)
    for seed in (1, 0, 1):
        load_adapter(decoder, tmp_path / str(seed))
        assert torch.equal(logits(decoder), expected[seed])
        detach(decoder)


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_model_gives_the_same_logits_in_transformers(folders, tmp_path, family):
    decoder = load_decoder(folders[family], torch.float32, "cpu")
    with_random_adapter(decoder, LoraConfig(4, 6.0, 0.1, EVERYWHERE))
    expected = logits(decoder)
    merge(decoder)
    assert adapter_parameters(decoder) == {}
    torch.testing.assert_close(logits(decoder), expected, rtol=1e-4, atol=1e-4)
    save_decoder(decoder, json.loads((folders[family] / "config.json").read_text()), tmp_path)
    with torch.no_grad():
        reference = AutoModelForCausalLM.from_pretrained(tmp_path)(IDS[None]).logits[0]
    torch.testing.assert_close(logits(decoder), reference, rtol=1e-5, atol=1e-5)


def test_dropout_applies_only_in_training_and_to_adapters(decoder):
    base = logits(decoder)
    with_random_adapter(decoder, LoraConfig(4, 6.0, 0.5, EVERYWHERE))
    expected = logits(decoder)
    decoder.train()
    assert not torch.equal(logits(decoder), expected)
    torch.manual_seed(0)
    dropped = logits(decoder)
    assert not torch.equal(logits(decoder), dropped)
    torch.manual_seed(0)
    assert torch.equal(logits(decoder), dropped)
    decoder.eval()
    assert torch.equal(logits(decoder), expected)
    attach(decoder, LoraConfig(4, 6.0, 0.5, EVERYWHERE), seed=0)  # B is zero, so dropout has nothing to drop
    assert torch.equal(logits(decoder.train()), base)


def test_attaching_replaces_the_adapter(decoder):
    with_random_adapter(decoder, LoraConfig(target_modules=EVERYWHERE))
    attach(decoder, CONFIG, seed=0)
    names = [name for name, _ in decoder.named_parameters() if "lora" in name]
    assert len(names) == 2 * 2 * 2, names


@pytest.mark.parametrize("targets", [("lm_head",), ("q_proj", "embed_tokens"), ("query",), ("",), ("q_norm",)])
def test_unknown_projection_is_an_error_with_the_known_ones(decoder, targets):
    before = logits(decoder)
    with pytest.raises(UserError, match=r"lora.target_modules: .* choose from .*q_proj.*down_proj"):
        attach(decoder, LoraConfig(target_modules=targets), seed=0)
    assert torch.equal(logits(decoder), before)


@pytest.fixture
def adapter(folders, tmp_path):
    """A function that returns a valid adapter's folder; adapter(r=None, ...) changes settings, and None removes one."""
    folder = tmp_path / "adapter"
    decoder = with_random_adapter(load_decoder(folders["qwen3"], torch.float32, "cpu"))
    save_adapter(decoder, CONFIG, folder, "base")

    def change(**entries):
        file = folder / "adapter_config.json"
        settings = json.loads(file.read_text()) | entries
        file.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))
        return folder

    return change


def load_error(decoder, folder) -> str:
    """Return the error message of loading the adapter, after a check that the decoder did not change."""
    before = logits(decoder)
    with pytest.raises(UserError) as caught:
        load_adapter(decoder, folder)
    assert torch.equal(logits(decoder), before) and adapter_parameters(decoder) == {}
    message = str(caught.value)
    assert str(folder) in message and "\n" not in message
    return message


@pytest.mark.parametrize(
    "entries",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"rank_pattern": {"q_proj": 8}},
        {"alpha_pattern": {"q_proj": 8}},
        {"layers_to_transform": [0]},
        {"layers_to_transform": 0},
        {"layers_to_transform": False},
        {"bias": "all"},
        {"target_modules": ".*q_proj"},
        {"target_modules": []},
        {"target_modules": ["model.layers.0.self_attn.q_proj", "v_proj"]},
        {"target_modules": ["mlp.q_proj", "v_proj"]},
        {"target_parameters": ["q_proj.weight"]},
        {"exclude_modules": ["k_proj"]},
        {"trainable_token_indices": [3]},
        {"alora_invocation_tokens": [5, 6]},
        {"layer_replication": [[0, 2]]},
        {"lora_bias": True},
        {"fan_in_fan_out": True},
        {"use_qalora": True},
        {"kasa_config": {}},
        {"an_option_of_later_versions": 0},
        {"an_option_of_later_versions": {}},
        {"task_type": "SEQ_CLS"},
        {"peft_type": "IA3"},
        {"init_lora_weights": "pissa"},
    ],
    ids=lambda entries: next(iter(entries)),
)
def test_unsupported_kind_of_adapter_is_named(decoder, adapter, entries):
    assert next(iter(entries)) in load_error(decoder, adapter(**entries))


@pytest.mark.parametrize(
    "entries",
    [
        {"use_rslora": True},
        {"target_modules": ["self_attn.q_proj", "v_proj"]},
        {
            "target_modules": [
                f"model.layers.{layer}.self_attn.{name}" for layer in range(2) for name in ("q_proj", "v_proj")
            ]
        },
        {"rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": [], "an_option_of_later_versions": False},
        {"lora_alpha": -3, "revision": "main", "loftq_config": {}, "megatron_core": "megatron.core"},
    ],
    ids=lambda entries: next(iter(entries)),
)
def test_settings_mean_what_they_mean_to_peft(decoder, adapter, folders, entries):
    folder = adapter(**entries)
    load_adapter(decoder, folder)
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folders["qwen3"]), folder).eval()
    with torch.no_grad():
        peft_logits = model(IDS[None]).logits[0]
    torch.testing.assert_close(logits(decoder), peft_logits, rtol=1e-5, atol=1e-5)


ODD_VALUES = [
    *(None, True, False, 0, 1, -1, 4, 10**400, 0.0, 0.5, 1e300, float("nan"), "", "4", "all", "eva", "LORA"),
    *([], [0], ["q_proj"], ["q_proj", "v_proj"], [3], {}, {"q_proj": 2}, {"a": 1}),
]


def assert_equal_to_peft(decoder, base, folder):
    """Check that logits are those of PEFT, unless PEFT does not take a setting, such as a null for a default."""
    try:
        model = peft.PeftModel.from_pretrained(base, folder).eval()
    except Exception:
        return
    with torch.no_grad():
        torch.testing.assert_close(logits(decoder), model(IDS[None]).logits[0], rtol=1e-5, atol=1e-5)


def test_odd_settings_give_the_logits_of_peft_or_an_error(decoder, adapter, folders, fresh_seed):
    rng, default = random.Random(fresh_seed), peft.LoraConfig().to_dict()
    base = AutoModelForCausalLM.from_pretrained(folders["qwen3"])
    for _ in range(60):
        folder = adapter()
        text = (folder / "adapter_config.json").read_text()
        odd = {rng.choice([*default, "an_unknown_key"]): rng.choice(ODD_VALUES)}
        (folder / "adapter_config.json").write_text(json.dumps(json.loads(text) | odd))
        try:
            load_adapter(decoder, folder)
        except UserError as error:
            assert str(error).startswith(str(folder)) and "\n" not in str(error) and len(str(error)) < 500
        else:
            assert_equal_to_peft(decoder, copy.deepcopy(base), folder)
        (folder / "adapter_config.json").write_text(text)


@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_initializations_that_keep_the_base_are_supported(decoder, adapter, init):
    load_adapter(decoder, adapter(init_lora_weights=init))


@pytest.mark.parametrize(
    "entries",
    [
        *({"r": None}, {"r": "four"}, {"r": "4"}, {"r": 0}, {"r": True}, {"r": 4.0}, {"r": 10**400}),
        *({"lora_alpha": None}, {"lora_alpha": "six"}, {"lora_alpha": float("nan")}, {"lora_dropout": 3.0}),
        *({"use_rslora": 1}, {"target_modules": [3]}),
    ],
    ids=lambda entries: str(entries)[:30],
)
def test_invalid_settings_are_errors(decoder, adapter, entries):
    assert f"adapter_config.json: {next(iter(entries))} " in load_error(decoder, adapter(**entries)).replace(
        "key '", ""
    ).replace("'", "")


@pytest.mark.parametrize(
    "entries", [{"r": 8}, {"r": 10**7}, {"target_modules": ["q_proj"]}, {"target_modules": ["q_proj", "k_proj"]}]
)
def test_settings_that_do_not_match_tensors_are_errors(decoder, adapter, entries):
    assert "another model" in load_error(decoder, adapter(**entries))


@pytest.mark.parametrize(
    "overrides", [{"num_hidden_layers": 1}, {"num_hidden_layers": 3}, {"hidden_size": 32}], ids=str
)
def test_adapter_for_another_model_is_an_error(adapter, tmp_path, overrides):
    other_decoder = load_decoder(make_checkpoint("qwen3", tmp_path / "other", **overrides), torch.float32, "cpu")
    assert "another model" in load_error(other_decoder, adapter())


def test_adapter_records_its_base_weights(folders, adapter, tmp_path):
    """The record does not depend on the split into files or on other files in the folder. An adapter without a record
    passes the check."""
    adapter_folder, base = adapter(), folders["qwen3"]
    other_base = make_checkpoint("qwen3", tmp_path / "other", seed=1)
    check_same_base(adapter_folder, other_base)
    write_base_record(adapter_folder, "some/base", base)
    copy = tmp_path / "copy"
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(copy, max_shard_size="100KB")
    assert len(list(copy.glob("*.safetensors"))) > 2
    check_same_base(adapter_folder, copy)
    merged = load_decoder(base, torch.float32, "cpu")
    load_adapter(merged, adapter_folder)
    merge(merged)
    save_decoder(merged, load_config(base)[1], tmp_path / "merged")
    for fine_tuned in (other_base, tmp_path / "merged"):
        with pytest.raises(UserError) as caught:
            check_same_base(adapter_folder, fine_tuned)
        names = (str(adapter_folder), "some/base", str(fine_tuned), "base.json")
        assert all(name in str(caught.value) for name in names)
    for damage in (b"", b"{}", b"[1]", b"\xff"):
        (adapter_folder / "base.json").write_bytes(damage)
        with pytest.raises(UserError, match=r"base\.json: corrupt"):
            check_same_base(adapter_folder, base)


@pytest.mark.parametrize(
    "change", [torch.Tensor.int, lambda tensor: tensor.to(torch.float8_e4m3fn), lambda t: t * float("nan")]
)
def test_tensor_without_finite_floats_is_an_error(decoder, adapter, change):
    file = adapter() / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    save_file(tensors | {name: change(tensors[name])}, file)
    assert f"tensor {name} " in load_error(decoder, adapter())


def test_extra_tensor_is_an_error(decoder, adapter):
    file = adapter() / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 64)}, file)
    assert "another model" in load_error(decoder, adapter())


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("damage", [b"", b"{", b"\xff\xfe\x00 garbage", b"[1, 2]"])
def test_damaged_file_is_an_error(decoder, adapter, file, damage):
    folder = adapter()
    (folder / file).write_bytes(damage)
    assert re.search(r"adapter_config\.json: not |adapter_model\.safetensors: corrupt", load_error(decoder, folder))


def test_truncated_adapter_is_an_error(decoder, adapter):
    file = adapter() / "adapter_model.safetensors"
    content = file.read_bytes()
    for cut in (4, 100, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:cut])
        assert "corrupt" in load_error(decoder, adapter())


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors", None])
def test_missing_file_is_named(decoder, adapter, missing):
    folder = adapter()
    shutil.rmtree(folder) if missing is None else (folder / missing).unlink()
    assert (missing or "adapter_config.json") in load_error(decoder, folder)
