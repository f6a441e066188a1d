"""The decoder: embedding, layers, final norm. One class for every family, readable as the equations of the paper.

It works on tokens that are packed end to end, [T], and knows nothing of batches, caches or padding. The caller passes
`attention`: causal attention within packed sequences (training) or attention to a paged cache (sampling). A sharding
engine must gather the parameters of a layer when it is called: its submodules only hold them.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thinksafe.kernels.rms_norm import add_rms_norm, rms_norm
from thinksafe.kernels.rope import inverse_frequencies
from thinksafe.kernels.swiglu import swiglu
from thinksafe.model.activation_checkpointing import CheckpointMode, run_layer
from thinksafe.model.attention import Attention, Rotation
from thinksafe.model.config import PROJECTION_GROUPS, LoraConfig, ModelConfig
from thinksafe.model.projection import Linear, Projection, fuse, project
from thinksafe.model.tensor_parallel import UNSHARDED, TensorShard


class DecoderLayer(nn.Module):
    """One layer: h = x + o_proj(attention(norm(x))), then h + mlp(norm(h)). Its submodules, the projections in
    `PROJECTIONS` and the norms, hold parameters and are not called. `projection_groups` has the projections in the
    order of `PROJECTION_GROUPS`."""

    def __init__(self, config: ModelConfig, index: int, shard: TensorShard):
        super().__init__()
        self.config, self.index, self.shard = config, index, shard
        for name, sizes in config.projections.items():
            self.add_module(name, Projection(*sizes))
        self.projection_groups = [[self.get_submodule(name) for name in names] for names in PROJECTION_GROUPS]
        self.input_norm, self.mlp_norm = nn.RMSNorm(config.hidden_size), nn.RMSNorm(config.hidden_size)
        if config.qk_norm:
            self.q_norm, self.k_norm = nn.RMSNorm(config.head_dim), nn.RMSNorm(config.head_dim)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, attention: Attention, linear: Linear) -> Tensor:
        """Return the layer's output, [T, H].

        Args:
            hidden: [T, H], output of the layer before.
            cos, sin: [T, D/2] fp32, cosine and sine of the rotary angles at the tokens' positions.
            attention: attention between the tokens, see `Attention`.
            linear: matmul for weights that are not in e4m3.
        """
        config, eps = self.config, self.config.rms_norm_eps
        qkv_projs, o_proj, gate_up_projs, down_proj = self.projection_groups
        qkv = project(qkv_projs, rms_norm(hidden, self.input_norm.weight, eps), linear)
        q, k, v = (out.unflatten(-1, (-1, config.head_dim)) for out in qkv)
        qk_gains = (self.q_norm.weight, self.k_norm.weight) if config.qk_norm else (None, None)
        mixed = attention(self.index, q, k, v, Rotation(*qk_gains, eps, cos, sin)).flatten(-2)
        (out,) = project(o_proj, mixed, linear)
        x, hidden = add_rms_norm(self.shard.all_reduce_sum(out), hidden, self.mlp_norm.weight, eps)
        gate, up = project(gate_up_projs, x, linear)
        (out,) = project(down_proj, swiglu(gate, up), linear)
        return hidden + self.shard.all_reduce_sum(out)


class Decoder(nn.Module):
    """A causal language model without the last matmul: its output are hidden states, which the caller multiplies with
    `head`.

    The parameters are uninitialized: load a checkpoint (weights.py) or call `initialize`.

    Attributes:
        config: configuration of the part of the model that this process holds, by default the whole model.
        shard: which part that is.
        lora: settings of the adapters that are in use; None without adapters, or while they are turned off.
        checkpointing: activation checkpointing of each layer, `none` at first.
        safety_heads: a module that a training may attach, to train it too; it is not saved with the model.
    """

    def __init__(self, config: ModelConfig, shard: TensorShard = UNSHARDED):
        super().__init__()
        self.config = config = shard.shard_config(config)
        self.shard = shard
        self.lora: LoraConfig | None = None
        self.checkpointing: tuple[CheckpointMode, ...] = ("none",) * config.num_layers
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.layers = nn.ModuleList(DecoderLayer(config, index, shard) for index in range(config.num_layers))
        self.final_norm = nn.Parameter(torch.empty(config.hidden_size))
        if not config.tied_head:
            self.lm_head = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.safety_heads: nn.Module | None = None
        self._angles: Tensor | None = None  # not a buffer, because .to(bfloat16) would round it

    @property
    def head(self) -> Tensor:
        """The language-model head, [V, H]; the embedding itself if the two are tied."""
        return self.embedding if self.config.tied_head else self.lm_head

    def projections(self) -> Iterator[tuple[str, Projection]]:
        """Yield (path such as `layers.3.q_proj`, projection) for all projections, layer by layer."""
        for layer in self.layers:
            for name in self.config.projections:
                yield f"layers.{layer.index}.{name}", layer.get_submodule(name)

    def check_not_fp8(self) -> None:
        """Raise a ValueError if projections were quantized to e4m3 when they were loaded: merging and saving need the
        checkpoint's own weights."""
        if any(projection.is_fp8 for _, projection in self.projections()):
            raise ValueError("the decoder was loaded with weights in e4m3; load it again with weight_dtype='auto'")

    @torch.no_grad()
    def prepare_fp8_backward(self) -> None:
        """Let gradients pass through projections that were quantized to e4m3 when they were loaded, to the layers below
        them. Do nothing if none was."""
        for _, projection in self.projections():
            if projection.is_fp8:
                projection.prepare_fp8_backward()

    def fuse_projections(self) -> None:
        """Store weights that read the same input one below the other in new memory, so that in inference mode a layer
        computes q, k and v in one matmul, and gate and up in another. Moving parameters undoes this."""
        for layer in self.layers:
            for group in layer.projection_groups:
                fuse(group)

    def initialize(self, seed: int, std: float = 0.02) -> None:
        """Fill a new model in place: weights and embedding from a normal distribution with standard deviation `std`,
        gains of the norms with 1, biases with 0."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if "norm" in name:
                    parameter.fill_(1.0)
                elif name.endswith("bias"):
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
        """Return the hidden states after the final norm, [T, H]. The caller computes logits as the product with
        `headᵀ`, because few callers need all of them.

        Args:
            input_ids, positions: [T] int64; positions start at 0 in each sequence and stay below config.max_seq_len.
            attention: attention of all layers, called once per layer, see `Attention`.
            linear: matmul for weights that are not in e4m3.
        """
        cos, sin = self.rotation(positions)
        hidden = F.embedding(input_ids, self.embedding)
        for layer, checkpointing in zip(self.layers, self.checkpointing, strict=True):
            hidden = run_layer(layer, checkpointing, hidden, cos, sin, attention, linear)
        return rms_norm(hidden, self.final_norm, self.config.rms_norm_eps)
