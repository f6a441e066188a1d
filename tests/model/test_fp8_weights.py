"""Frozen decoders with projections in e4m3: their results, which operations are errors, and adapters on top of them.

The oracles are transformers' log-probabilities and the unquantized weights.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.checkpoints import FAMILIES, make_checkpoint
from thinksafe.kernels.fp8 import E4M3, dequantize
from thinksafe.model.attention import PackedAttention
from thinksafe.model.config import LoraConfig
from thinksafe.model.lora import adapter_parameters, attach, load_adapter, merge, save_adapter
from thinksafe.model.projection import project
from thinksafe.model.weights import load_config, load_decoder, save_decoder
from thinksafe.recipe.schema import Recipe
from thinksafe.run.checkpoints import CheckpointStore
from thinksafe.sampler.config import EngineConfig, SamplingConfig
from thinksafe.sampler.engine import Engine
from thinksafe.sampler.request import Request

LORA = LoraConfig(4, 8.0, 0.0, ("q_proj", "v_proj", "down_proj"))


def logprobs_of(decoder, tokens):
    attention = PackedAttention.of([len(tokens)], "cpu")
    hidden = decoder(tokens, torch.arange(len(tokens)), attention)
    return (hidden @ decoder.head.T).log_softmax(-1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint("qwen3", tmp_path_factory.mktemp("qwen3"), seed=11)


@pytest.fixture
def adapter_folder(folder, tmp_path):
    """A folder with an adapter that is not zero."""
    decoder = load_decoder(folder, torch.float32, "cpu")
    attach(decoder, LORA, seed=1)
    for parameter in adapter_parameters(decoder).values():
        parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(3))
    save_adapter(decoder, LORA, tmp_path / "adapter", str(folder))
    return tmp_path / "adapter"


@pytest.mark.parametrize("family", FAMILIES)
def test_only_projections_are_in_e4m3_and_logits_stay_near(tmp_path, family):
    folder = make_checkpoint(family, tmp_path, seed=11)
    decoder = load_decoder(folder, torch.float32, "cpu", weight_dtype="fp8")
    dtypes = {name: parameter.dtype for name, parameter in decoder.named_parameters()}
    assert {name for name, dtype in dtypes.items() if dtype == E4M3} == {
        f"layers.{layer}.{name}.weight" for layer in range(2) for name in decoder.config.projections
    }
    assert set(dtypes.values()) == {E4M3, torch.float32}
    tokens = torch.randint(0, 380, (40,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = AutoModelForCausalLM.from_pretrained(folder)(tokens[None]).logits[0].log_softmax(-1)
        differences = (logprobs_of(decoder, tokens) - exact).abs()
    assert 0.01 < differences.mean() < 0.5, "the wide weights of the test checkpoints cause large errors"


def test_e4m3_weights_are_within_a_sixteenth(folder):
    unquantized = load_decoder(folder, torch.float32, "cpu")
    quantized = load_decoder(folder, torch.float32, "cpu", weight_dtype="fp8")
    for layer, fp8_layer in zip(unquantized.layers, quantized.layers, strict=True):
        for name in unquantized.config.projections:
            weight, fp8 = layer.get_submodule(name).weight, fp8_layer.get_submodule(name)
            dequantized = dequantize(fp8.weight, fp8.scales_e8m0, torch.float32)
            smallest = weight.abs().amax(-1, keepdim=True) * 2.0**-17
            assert ((dequantized - weight).abs() <= weight.abs() / 16 + smallest).all()


def test_e4m3_decoder_cannot_be_merged_or_saved(folder, adapter_folder, tmp_path):
    decoder = load_decoder(folder, torch.float32, "cpu", weight_dtype="fp8")
    load_adapter(decoder, adapter_folder)
    for action in (lambda: merge(decoder), lambda: save_decoder(decoder, load_config(folder)[1], tmp_path / "out")):
        with pytest.raises(ValueError, match="load it again"):
            action()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("weight_dtype", ["auto", "fp8"])
def test_sampling_with_adapter_copies_no_base_weight(folder, adapter_folder, weight_dtype):
    """The weights stay at the same address and version: sampling allocates only activations."""
    decoder = load_decoder(folder, torch.float32, "cpu", weight_dtype=weight_dtype)
    before = {name: (p.data_ptr(), p._version) for name, p in decoder.named_parameters()}
    load_adapter(decoder, adapter_folder)
    engine = Engine(decoder, EngineConfig(4, 64, kv_cache_gib=0.01))
    request = Request("r", (5, 6, 7), SamplingConfig(temperature=0, max_tokens=8), 0, ())
    (with_adapter,) = engine.generate([request])
    after = {name: (p.data_ptr(), p._version) for name, p in decoder.named_parameters() if "lora_" not in name}
    assert after == before
    assert sum("lora_" in name for name, _ in decoder.named_parameters()) == 2 * 2 * 3
    assert engine.runner.decoder is decoder
    base = load_decoder(folder, torch.float32, "cpu", weight_dtype=weight_dtype)
    (without_adapter,) = Engine(base, EngineConfig(4, 64, kv_cache_gib=0.01)).generate([request])
    assert with_adapter.logprobs != without_adapter.logprobs


@torch.no_grad()
def test_adapter_adds_the_same_to_an_e4m3_base(folder, adapter_folder):
    """Its matmuls are not quantized: B A x is added to the output of the base."""
    decoder = load_decoder(folder, torch.float32, "cpu", weight_dtype="fp8")
    layer, x = decoder.layers[0], torch.randn(5, 64)
    linear = torch.nn.functional.linear
    (base,) = project([layer.q_proj], x, linear)
    load_adapter(decoder, adapter_folder)
    down, up = layer.q_proj.lora_A, layer.q_proj.lora_B
    (adapted,) = project([layer.q_proj], x, linear)
    torch.testing.assert_close(adapted, base + 2.0 * x @ down.T @ up.T)


def test_training_uses_checkpoint_weights_after_e4m3_sampling(folder):
    models = CheckpointStore(Recipe("r", str(folder), device="cpu", sampler=EngineConfig(weight_dtype="fp8")))
    sampling = models.sampled_student()
    assert sampling.layers[0].q_proj.weight.dtype == E4M3 and models.sampled_student() is sampling
    training = models.student()
    assert {parameter.dtype for parameter in training.parameters()} == {torch.float32}
    assert not any(projection.is_fp8 for _, projection in training.projections())
    assert models.sampled_student().layers[0].q_proj.weight.dtype == E4M3
