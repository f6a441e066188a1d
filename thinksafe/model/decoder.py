"""The decoder: embedding, layers, final norm. One class for every family, readable as the equations of the paper.

It works on tokens that are packed end to end, [T], and knows nothing of batches, caches or padding. The caller passes
`attention`: causal attention within packed sequences (training) or attention to a paged cache (sampling). A layer is
one module with raw parameters, because a sharding engine gathers parameters module by module.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thinksafe.kernels.batch_invariant_linear import fp8_linear
from thinksafe.kernels.fp8 import Fp8Tensor, quantize
from thinksafe.kernels.fp8_frozen_linear import Fp8FrozenWeight, fp8_frozen_linear
from thinksafe.kernels.rms_norm import add_rms_norm, rms_norm
from thinksafe.kernels.rope import inverse_frequencies
from thinksafe.kernels.swiglu import swiglu
from thinksafe.model.activation_checkpointing import CheckpointMode, run_layer
from thinksafe.model.attention import Attention, Rotation
from thinksafe.model.config import ModelConfig
from thinksafe.model.tensor_parallel import UNSHARDED, TensorShard

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""A function (x [T, K], weight [N, K], bias [N] or None) -> x weightᵀ + bias, [T, N] in the dtype of x."""

PROJECTION_GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""The projections of a layer, grouped by the input that they read."""


class DecoderLayer(nn.Module):
    """One layer: h = x + o_proj(attention(norm(x))), then h + mlp(norm(h)). Each projection can carry a LoRA adapter.

    Attributes:
        adapters: (alpha / rank, dropout) of each projection that carries an adapter, by its name.
        weight_scales: [out features] uint8 of each projection whose weight is in e4m3, by its name:
            weight = element * 2 ** (scale - 127).
        fp8_weights: e4m3 weights through which gradients can pass, by projection, see `Decoder.prepare_fp8_backward`;
            empty otherwise.
    """

    def __init__(self, config: ModelConfig, index: int, shard: TensorShard):
        super().__init__()
        self.config = config
        self.index = index
        self.shard = shard
        self.adapters: dict[str, tuple[float, float]] = {}  # projection -> (scaling, dropout), see lora.py
        self.weight_scales: dict[str, Tensor] = {}  # projection -> [out] uint8, if its weight is e4m3, see weights.py
        self.fp8_weights: dict[str, Fp8FrozenWeight] = {}  # replace e4m3 weights if gradients pass through them
        for name, (out_features, in_features, has_bias) in config.projections.items():
            self.register_parameter(name, nn.Parameter(torch.empty(out_features, in_features)))
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.empty(out_features)) if has_bias else None)
        self.input_norm = nn.Parameter(torch.empty(config.hidden_size))
        self.mlp_norm = nn.Parameter(torch.empty(config.hidden_size))
        self.q_norm = nn.Parameter(torch.empty(config.head_dim)) if config.qk_norm else None
        self.k_norm = nn.Parameter(torch.empty(config.head_dim)) if config.qk_norm else None

    def project(self, name: str, x: Tensor, linear: Linear) -> Tensor:
        """Return x Wᵀ + b, plus (alpha / rank) * dropout(x) Aᵀ Bᵀ if the projection carries an adapter: [T, out].

        Args:
            name: name of the projection, such as q_proj.
            x: [T, in], input of the projection.
            linear: matmul for weights that are not in e4m3.
        """
        return self.project_all((name,), x, linear)[0]

    def project_all(self, names: tuple[str, ...], x: Tensor, linear: Linear) -> list[Tensor]:
        """Return x Wᵀ + b, plus the adapter's part, for several projections that read the same input x: one tensor
        [T, out features] for each name, in order.

        The input is quantized once for all of them. In inference mode, fused weights (`Decoder.fuse_projections`) are
        multiplied in one matmul. The KL reference of training is not in inference mode, so it uses the same separate
        matmuls as the student: a fused shape would round differently and show up as divergence.
        """
        if self.fp8_weights:
            biases = [self._parameters[f"{name}_bias"] for name in names]
            outs = fp8_frozen_linear(x, [self.fp8_weights[name] for name in names], biases)
            return [self._add_adapter(name, out, x, linear) for name, out in zip(names, outs, strict=True)]
        operands = [self._operands(name) for name in names]
        rows = quantize(x) if self.weight_scales else x

        def matmul(weight: Tensor, bias: Tensor | None, scales: Tensor | None) -> Tensor:
            if scales is None:
                return linear(rows, weight, bias)
            return fp8_linear(rows, Fp8Tensor(weight, scales), bias, x.dtype)

        if len(names) > 1 and torch.is_inference_mode_enabled() and (fused := _fused_operands(operands)):
            outs = matmul(*fused).split([len(weight) for weight, _, _ in operands], -1)
        else:
            outs = [matmul(*operand) for operand in operands]
        return [self._add_adapter(name, out, x, linear) for name, out in zip(names, outs, strict=True)]

    def _operands(self, name: str) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the projection's weight, its bias or None, and the scales of an e4m3 weight or None."""
        return self._parameters[name], self._parameters[f"{name}_bias"], self.weight_scales.get(name)

    def _add_adapter(self, name: str, out: Tensor, x: Tensor, linear: Linear) -> Tensor:
        """Return out + (alpha / rank) * dropout(x) Aᵀ Bᵀ, or `out` itself if the projection carries no adapter."""
        if name in self.adapters:
            scaling, dropout = self.adapters[name]
            down, up = self._parameters[f"{name}_lora_A"], self._parameters[f"{name}_lora_B"]
            low_rank = linear(F.dropout(x, dropout, self.training), down.to(x.dtype), None)
            out = out + scaling * linear(low_rank, up.to(x.dtype), None)
        return out

    def fuse_projections(self) -> None:
        """Store weights, biases and scales of q, k and v one below the other in new memory, and likewise those of gate
        and up; the parameters become views of it."""
        for names in PROJECTION_GROUPS:
            for parts in zip(*(self._operands(name) for name in names), strict=True):
                if len(parts) > 1 and parts[0] is not None:
                    memory = torch.cat([part.data for part in parts])
                    for part, rows in zip(parts, memory.split([len(part) for part in parts]), strict=True):
                        part.data = rows

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, attention: Attention, linear: Linear) -> Tensor:
        """Return the layer's output, [T, H].

        Args:
            hidden: [T, H], output of the layer before.
            cos, sin: [T, D/2] fp32, cosine and sine of the rotary angles at the tokens' positions.
            attention: attention between the tokens, see `Attention`.
            linear: matmul for weights that are not in e4m3.
        """
        eps, head_dim = self.config.rms_norm_eps, self.config.head_dim
        x = rms_norm(hidden, self.input_norm, eps)
        q, k, v = (out.unflatten(-1, (-1, head_dim)) for out in self.project_all(PROJECTION_GROUPS[0], x, linear))
        rotation = Rotation(self.q_norm, self.k_norm, eps, cos, sin)
        mixed = self.project("o_proj", attention(self.index, q, k, v, rotation).flatten(-2), linear)
        x, hidden = add_rms_norm(self.shard.all_reduce_sum(mixed), hidden, self.mlp_norm, eps)
        x = swiglu(*self.project_all(PROJECTION_GROUPS[2], x, linear))
        return hidden + self.shard.all_reduce_sum(self.project("down_proj", x, linear))


def _fused_operands(operands: list[tuple[Tensor | None, ...]]) -> list[Tensor | None] | None:
    """Return one weight, one bias and one vector of scales that cover those of all projections.

    A bias or scales that the projections lack are None in the list. The result is None if the tensors of the
    projections are not adjacent in memory, so that they must be multiplied one by one.

    Args:
        operands: (weight, bias or None, scales or None) of each projection.
    """
    fused = []
    for parts in zip(*operands, strict=True):
        leading = parts[0]
        if leading is None:
            fused.append(None)
            continue
        storage, end = leading.untyped_storage()._cdata, leading.storage_offset()
        for part in parts:
            if part.untyped_storage()._cdata != storage or part.storage_offset() != end or not part.is_contiguous():
                return None
            end += part.numel()
        rows = sum(len(part) for part in parts)
        fused.append(leading.as_strided((rows, *leading.shape[1:]), leading.stride()))
    return fused


class Decoder(nn.Module):
    """A causal language model without the last matmul: its output are hidden states, which the caller multiplies with
    `head`.

    The parameters are uninitialized: load a checkpoint (weights.py) or call `initialize`.

    Attributes:
        config: configuration of the part of the model that this process holds, by default the whole model.
        shard: which part that is.
        lora: settings of the attached adapters; None without adapters.
        checkpointing: activation checkpointing of each layer, `none` at first.
    """

    def __init__(self, config: ModelConfig, shard: TensorShard = UNSHARDED):
        super().__init__()
        self.config = config = shard.shard_config(config)
        self.shard = shard
        self.lora = None  # LoraConfig of the attached adapters, see lora.py
        self.checkpointing: tuple[CheckpointMode, ...] = ("none",) * config.num_layers  # one mode per layer
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.layers = nn.ModuleList(DecoderLayer(config, index, shard) for index in range(config.num_layers))
        self.final_norm = nn.Parameter(torch.empty(config.hidden_size))
        if not config.tied_head:
            self.lm_head = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self._angles: Tensor | None = None  # not a buffer, because .to(bfloat16) would round it

    @property
    def head(self) -> Tensor:
        """The language-model head, [V, H]; the embedding itself if the two are tied."""
        return self.embedding if self.config.tied_head else self.lm_head

    def check_not_fp8(self) -> None:
        """Check that no projection is in e4m3, since merging and saving need the checkpoint's own weights.

        Raises:
            ValueError: the projections were quantized when they were loaded.
        """
        if any(layer.weight_scales for layer in self.layers):
            raise ValueError("the decoder was loaded with weights in e4m3; load it again with weight_dtype='auto'")

    @torch.no_grad()
    def prepare_fp8_backward(self) -> None:
        """Let gradients pass through projections that were quantized to e4m3 when they were loaded, to the layers below
        them. Do nothing if none was.

        This stores a transposed e4m3 copy of each weight. The weights stay frozen and are no longer parameters, so code
        that shards or casts parameters skips them.
        """
        for layer in self.layers:
            for name, scales in layer.weight_scales.items():
                layer.fp8_weights[name] = Fp8FrozenWeight.from_fp8(Fp8Tensor(layer._parameters[name], scales))
                layer._parameters[name] = None

    def fuse_projections(self) -> None:
        """Store weights that read the same input one below the other in new memory, of which the parameters become
        views. In inference mode a layer then computes q, k and v in one matmul, and gate and up in another. Moving the
        parameters to other memory undoes this."""
        for layer in self.layers:
            layer.fuse_projections()

    def initialize(self, seed: int, std: float = 0.02) -> None:
        """Fill a new model in place: weights and embedding from a normal distribution with standard deviation `std`,
        gains of the norms with 1, biases with 0."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if "norm" in name:
                    parameter.fill_(1.0)
                elif name.endswith("_bias"):
                    parameter.zero_()
                else:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)

    def rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosine and sine of the rotary angles, [T, D/2] fp32 each, at `positions` [T] int64. They come from a
        table that is built once per device."""
        if self._angles is None or self._angles.device != positions.device:
            config = self.config
            inv_freq = inverse_frequencies(config.head_dim, config.rope_theta, config.llama3_scaling)
            angles = torch.arange(config.max_seq_len, dtype=torch.float32)[:, None] * inv_freq
            self._angles = torch.stack((angles.cos(), angles.sin())).to(positions.device)
        return self._angles[0, positions], self._angles[1, positions]

    def forward(self, input_ids: Tensor, positions: Tensor, attention: Attention, linear: Linear = F.linear) -> Tensor:
        """Return the hidden states after the final norm.

        Args:
            input_ids, positions: [T] int64; positions start at 0 in each sequence and stay below config.max_seq_len.
            attention: attention of all layers, called once per layer, see `Attention`.
            linear: matmul for weights that are not in e4m3.

        Returns:
            [T, H]. The caller computes logits as the product with `headᵀ`, because few callers need all of them.
        """
        cos, sin = self.rotation(positions)
        hidden = F.embedding(input_ids, self.embedding)
        for layer, checkpointing in zip(self.layers, self.checkpointing, strict=True):
            hidden = run_layer(layer, checkpointing, hidden, cos, sin, attention, linear)
        return rms_norm(hidden, self.final_norm, self.config.rms_norm_eps)
