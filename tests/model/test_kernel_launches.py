"""The kernels that a layer launches on a GPU in a decode pass, one by one.

The test records them on meta tensors, without a GPU.
"""

from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.emulation.gpu_on_meta import on_gpu_path

pytest.importorskip("triton")

from triton.runtime.jit import KernelInterface

from thinksafe.kernels.batch_invariant_linear import batch_invariant_linear
from thinksafe.model.config import LoraConfig, ModelConfig
from thinksafe.model.decoder import Decoder
from thinksafe.model.lora import attach
from thinksafe.model.public_configs import PUBLIC_CONFIGS
from thinksafe.sampler.kv_cache import CacheFormat, PageCache
from thinksafe.sampler.model_runner import DecodeAttention

ROWS, PAGES = 8, 4
ATTENTION = ["norm_rope_write", "decode", "combine"]


class Launches(TorchDispatchMode):
    """A recorder of kernel names: torch operations that compute or copy, and all of our kernels."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        is_new = bool(_storages(out) - _storages((args, kwargs)))
        name = op._schema.name.split("::")[1]
        if (is_new or op._schema.is_mutable) and "empty" not in name:
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


def decoder_on_meta(model: str, weight_dtype: str = "auto") -> Decoder:
    """Return a decoder as `load_decoder` does, with two layers on the meta device."""
    config = ModelConfig.from_hugging_face(PUBLIC_CONFIGS[model] | {"num_hidden_layers": 2}, model)
    with torch.device("meta"):
        decoder = Decoder(config).to(torch.bfloat16).requires_grad_(False).eval()
        for _, projection in decoder.projections() if weight_dtype == "fp8" else ():
            projection.allocate_fp8()
    decoder.fuse_projections()
    return decoder


@torch.inference_mode()
def launches(decoder: Decoder, linear=F.linear) -> list[str]:
    """Return the kernels of one layer for one new token per row."""
    config, device = decoder.config, torch.device("meta")
    cache = PageCache(config, CacheFormat.of(config, torch.bfloat16, "auto"), PAGES, 64, device)
    with (
        on_gpu_path(),
        patch("thinksafe.kernels.batch_invariant_linear.INTERPRETED", True),
        patch("thinksafe.kernels.matmul_tile.INTERPRETED", True),
        patch("thinksafe.kernels.paged_decode.INTERPRETED", True),
        torch.device(device),
        Launches() as recorder,
    ):
        positions = torch.empty(ROWS, dtype=torch.int64)
        attention = DecodeAttention(cache, torch.empty(ROWS, PAGES, dtype=torch.int64), positions)
        cos = sin = torch.empty(ROWS, config.head_dim // 2)
        hidden = torch.empty(ROWS, config.hidden_size, dtype=torch.bfloat16)
        recorder.names.clear()
        decoder.layers[0](hidden, cos, sin, attention, linear)
    return recorder.names


def test_bf16_layer_launches_eleven_kernels():
    assert launches(decoder_on_meta("Qwen/Qwen3-0.6B")) == [
        "rms_norm", "linear", *ATTENTION, "linear", "rms_norm", "linear", "swiglu", "linear", "add",
    ]  # fmt: skip


def test_biases_add_no_launch():
    biased, plain = (decoder_on_meta(f"deepseek-ai/DeepSeek-R1-Distill-{name}") for name in ("Qwen-7B", "Llama-8B"))
    assert launches(biased) == launches(plain)


def test_batch_invariant_mode_adds_no_launch():
    linear = "batch_invariant_linear"
    assert launches(decoder_on_meta("Qwen/Qwen3-0.6B"), batch_invariant_linear) == [
        "rms_norm", linear, *ATTENTION, linear, "rms_norm", linear, "swiglu", linear, "add",
    ]  # fmt: skip


def test_e4m3_weights_quantize_every_input_once():
    matmul = ["quantize", "batch_invariant_linear"]
    assert launches(decoder_on_meta("Qwen/Qwen3-0.6B", "fp8")) == [
        "rms_norm", *matmul, *ATTENTION, *matmul, "rms_norm", *matmul, "swiglu", *matmul, "add",
    ]  # fmt: skip


@pytest.mark.parametrize("weight_dtype", ["auto", "fp8"])
def test_adapter_adds_only_its_own_launches(weight_dtype):
    """These are two matmuls, the scaled sum with the projection, and two casts of the fp32 parameters."""
    decoder = decoder_on_meta("Qwen/Qwen3-0.6B", weight_dtype)
    plain = launches(decoder)
    with torch.device("meta"):
        attach(decoder, LoraConfig(dropout=0.0), seed=0)
    assert sorted(launches(decoder)) == sorted(plain + 2 * ["to", "linear", "to", "linear", "mul", "add"])
