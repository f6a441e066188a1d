"""Frozen decoders with their projections in e4m3: what they compute, what they refuse, and adapters on top of them."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.checkpoints import FAMILIES, make_checkpoint
from thinksafe.kernels.fp8 import E4M3, dequantise
from thinksafe.model.attention import PackedAttention
from thinksafe.model.lora import LoraConfig, adapter_parameters, attach, load_adapter, merge, save_adapter
from thinksafe.model.weights import load_config, load_decoder, save_decoder
from thinksafe.recipe.schema import Recipe
from thinksafe.run.checkpoints import Models
from thinksafe.sampler.engine import Engine, EngineConfig
from thinksafe.sampler.request import Request, SamplingConfig

LORA = LoraConfig(4, 8.0, 0.0, ("q_proj", "v_proj", "down_proj"))


def logprobs_of(decoder, tokens):
    attention = PackedAttention.of([len(tokens)], "cpu")
    hidden = decoder(tokens, torch.arange(len(tokens)), attention)
    return (hidden @ decoder.head.T).log_softmax(-1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint("qwen3", tmp_path_factory.mktemp("qwen3"), seed=11)


@pytest.fixture
def adapted(folder, tmp_path):
    """A folder with an adapter that does something."""
    decoder = load_decoder(folder, torch.float32, "cpu")
    attach(decoder, LORA, seed=1)
    for parameter in adapter_parameters(decoder).values():
        parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(3))
    save_adapter(decoder, LORA, tmp_path / "adapter", str(folder))
    return tmp_path / "adapter"


@pytest.mark.parametrize("family", FAMILIES)
def test_projections_alone_are_in_e4m3_and_log_probabilities_stay_near_those_of_transformers(tmp_path, family):
    folder = make_checkpoint(family, tmp_path, seed=11)
    decoder = load_decoder(folder, torch.float32, "cpu", weights="fp8")
    kinds = {name: parameter.dtype for name, parameter in decoder.named_parameters()}
    assert {name for name, kind in kinds.items() if kind == E4M3} == {
        f"layers.{layer}.{name}" for layer in range(2) for name in decoder.config.projections
    }
    assert set(kinds.values()) == {E4M3, torch.float32}
    tokens = torch.randint(0, 380, (40,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = AutoModelForCausalLM.from_pretrained(folder)(tokens[None]).logits[0].log_softmax(-1)
        apart = (logprobs_of(decoder, tokens) - exact).abs()
    assert 0.01 < apart.mean() < 0.5, "weights as wide as a test's make errors as wide"


def test_what_stands_for_a_weight_is_within_a_sixteenth_of_it(folder):
    whole, frozen = (load_decoder(folder, torch.float32, "cpu", weights=kind) for kind in ("auto", "fp8"))
    for layer, quantised in zip(whole.layers, frozen.layers, strict=True):
        for name in whole.config.projections:
            weight = getattr(layer, name)
            found = dequantise(getattr(quantised, name), quantised.exponents[name], torch.float32)
            smallest = weight.abs().amax(-1, keepdim=True) * 2.0**-17
            assert ((found - weight).abs() <= weight.abs() / 16 + smallest).all()


def test_a_decoder_in_e4m3_is_neither_merged_nor_saved(folder, adapted, tmp_path):
    decoder = load_decoder(folder, torch.float32, "cpu", weights="fp8")
    load_adapter(decoder, adapted)
    for act in (lambda: merge(decoder), lambda: save_decoder(decoder, load_config(folder)[1], tmp_path / "out")):
        with pytest.raises(ValueError, match="load it again"):
            act()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("weights", ["auto", "fp8"])
def test_sampling_with_an_adapter_copies_no_weight_of_the_base(folder, adapted, weights):
    """Memory does not move, and no tensor of a weight's size is made: all that sampling allocates is activations."""
    decoder = load_decoder(folder, torch.float32, "cpu", weights=weights)
    before = {name: (p.data_ptr(), p._version) for name, p in decoder.named_parameters()}
    load_adapter(decoder, adapted)
    engine = Engine(decoder, EngineConfig(4, 64, kv_cache_gib=0.01))
    request = Request("r", (5, 6, 7), SamplingConfig(temperature=0, max_tokens=8), 0, ())
    (with_adapter,) = engine.generate([request])
    after = {name: (p.data_ptr(), p._version) for name, p in decoder.named_parameters() if "_lora_" not in name}
    assert after == before
    assert sum("_lora_" in name for name, _ in decoder.named_parameters()) == 2 * 2 * 3
    assert engine.runner.decoder is decoder
    base = load_decoder(folder, torch.float32, "cpu", weights=weights)
    (without,) = Engine(base, EngineConfig(4, 64, kv_cache_gib=0.01)).generate([request])
    assert with_adapter.logprobs != without.logprobs


@torch.no_grad()
def test_an_adapter_adds_the_same_to_a_base_in_e4m3(folder, adapted):
    """Its product is not quantised: B A x on top of whatever the base gives."""
    decoder = load_decoder(folder, torch.float32, "cpu", weights="fp8")
    layer, x = decoder.layers[0], torch.randn(5, 64)
    linear = torch.nn.functional.linear
    base = layer.project("q_proj", x, linear)
    load_adapter(decoder, adapted)
    down, up = layer.q_proj_lora_A, layer.q_proj_lora_B
    torch.testing.assert_close(layer.project("q_proj", x, linear), base + 2.0 * x @ down.T @ up.T)


def test_a_student_that_samples_in_e4m3_is_trained_as_the_checkpoint_has_it(folder):
    models = Models(Recipe("r", str(folder), device="cpu", sampler=EngineConfig(weights="fp8")))
    sampling = models.sampled_student()
    assert sampling.layers[0].q_proj.dtype == E4M3 and models.sampled_student() is sampling
    training = models.student()
    assert {parameter.dtype for parameter in training.parameters()} == {torch.float32}
    assert not any(layer.exponents for layer in training.layers)
    assert models.sampled_student().layers[0].q_proj.dtype == E4M3
