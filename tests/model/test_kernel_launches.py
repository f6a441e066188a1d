"""What a layer launches on a GPU for a decode pass, kernel by kernel: found on meta tensors, without one."""

from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.emulation.gpu_on_meta import on_gpu_path

pytest.importorskip("triton")

from triton.runtime.jit import KernelInterface

from thinksafe.kernels.fp8 import E4M3
from thinksafe.kernels.row_linear import row_linear
from thinksafe.model.config import ModelConfig
from thinksafe.model.decoder import Decoder
from thinksafe.model.lora import LoraConfig, attach
from thinksafe.model.public_configs import PUBLIC
from thinksafe.sampler.kv_cache import CacheFormat, PageCache
from thinksafe.sampler.model_runner import DecodeAttention

ROWS, PAGES = 8, 4
ATTENTION = ["norm_rope_write", "decode", "combine"]


class Launches(TorchDispatchMode):
    """Names of kernels: operations of torch that compute or copy, and ours, launched within an operation or alone."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        fresh = bool(_storages(out) - _storages((args, kwargs)))
        name = op._schema.name.split("::")[1]
        if (fresh or op._schema.is_mutable) and "empty" not in name:
            self.names.append(name)
        return out

    def launch(self, kernel, grid):
        return lambda *args, **kwargs: self.names.append(kernel.__name__.strip("_").removesuffix("_kernel"))

    def __enter__(self):
        self._patched = patch.object(KernelInterface, "__getitem__", lambda kernel, grid: self.launch(kernel, grid))
        self._patched.start()
        return super().__enter__()

    def __exit__(self, *exception):
        self._patched.stop()
        return super().__exit__(*exception)


def _storages(tree) -> set[int]:
    return {leaf.untyped_storage()._cdata for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)}


def decoder_on_meta(model: str, weights: str = "auto") -> Decoder:
    """As `load_decoder` makes it, with two layers."""
    config = ModelConfig.from_hugging_face(PUBLIC[model] | {"num_hidden_layers": 2}, model)
    with torch.device("meta"):
        decoder = Decoder(config).to(torch.bfloat16).requires_grad_(False).eval()
        for layer in decoder.layers if weights == "fp8" else ():
            for name in config.projections:
                layer._parameters[name] = nn.Parameter(layer._parameters[name].to(E4M3), requires_grad=False)
                layer.exponents[name] = torch.empty(len(layer._parameters[name]), dtype=torch.uint8)
    decoder.stack()
    return decoder


@torch.inference_mode()
def launches(decoder: Decoder, linear=F.linear) -> list[str]:
    """Of one layer for one new token a row."""
    config, device = decoder.config, torch.device("meta")
    cache = PageCache(config, CacheFormat.of(config, torch.bfloat16, "auto"), PAGES, 64, device)
    with (
        on_gpu_path(),
        patch("thinksafe.kernels.row_linear.INTERPRETED", True),
        patch("thinksafe.kernels.paged_decode.INTERPRETED", True),
        torch.device(device),
        Launches() as found,
    ):
        positions = torch.empty(ROWS, dtype=torch.int64)
        attention = DecodeAttention(cache, torch.empty(ROWS, PAGES, dtype=torch.int64), positions)
        cos = sin = torch.empty(ROWS, config.head_dim // 2)
        hidden = torch.empty(ROWS, config.hidden_size, dtype=torch.bfloat16)
        found.names.clear()
        decoder.layers[0](hidden, cos, sin, attention, linear)
    return found.names


def test_a_layer_in_bf16_launches_eleven_kernels():
    assert launches(decoder_on_meta("Qwen/Qwen3-0.6B")) == [
        "rms_norm", "linear", *ATTENTION, "linear", "rms_norm", "linear", "swiglu", "linear", "add",
    ]  # fmt: skip


def test_biases_cost_no_launch():
    biased, plain = (decoder_on_meta(f"deepseek-ai/DeepSeek-R1-Distill-{name}") for name in ("Qwen-7B", "Llama-8B"))
    assert launches(biased) == launches(plain)


def test_the_batch_invariant_mode_launches_as_many():
    assert launches(decoder_on_meta("Qwen/Qwen3-0.6B"), row_linear) == [
        "rms_norm", "row_linear", *ATTENTION, "row_linear", "rms_norm", "row_linear", "swiglu", "row_linear", "add",
    ]  # fmt: skip


def test_with_weights_in_e4m3_every_input_is_quantised_once():
    product = ["quantise", "row_linear"]
    assert launches(decoder_on_meta("Qwen/Qwen3-0.6B", "fp8")) == [
        "rms_norm", *product, *ATTENTION, *product, "rms_norm", *product, "swiglu", *product, "add",
    ]  # fmt: skip


@pytest.mark.parametrize("weights", ["auto", "fp8"])
def test_an_adapter_adds_its_own_and_no_others(weights):
    """Two products, the scaled sum with what is adapted, and two casts of what is kept in fp32."""
    decoder = decoder_on_meta("Qwen/Qwen3-0.6B", weights)
    plain = launches(decoder)
    with torch.device("meta"):
        attach(decoder, LoraConfig(dropout=0.0), seed=0)
    assert sorted(launches(decoder)) == sorted(plain + 2 * ["to", "linear", "to", "linear", "mul", "add"])
