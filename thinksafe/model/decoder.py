"""The decoder: embedding, layers, final norm. One class for every family, readable as the equations of the paper.

It works on tokens that lie end to end, [T], and knows nothing of batches, caches or padding: `attention` is given to
it, and is either causal attention within packed sequences (training) or attention against a paged cache (sampling).
A layer is one module with raw parameters, since a sharding engine gathers module by module.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thinksafe.kernels.fp8 import Quantised, quantise
from thinksafe.kernels.frozen_linear import FrozenWeight, frozen_linear
from thinksafe.kernels.rms_norm import add_rms_norm, rms_norm
from thinksafe.kernels.rope import inverse_frequencies
from thinksafe.kernels.row_linear import fp8_linear
from thinksafe.kernels.swiglu import swiglu
from thinksafe.model.activation_checkpointing import Keeping, run_layer
from thinksafe.model.attention import Attention, Rotation
from thinksafe.model.config import ModelConfig
from thinksafe.model.tensor_parallel import WHOLE, Shard

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(x [T, K], weight [N, K], bias [N] or None) -> x Wᵀ + b, [T, N]."""

PRODUCTS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""The projections of a layer, those together that read the same rows."""


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); each projection optionally with a low-rank adapter."""

    def __init__(self, config: ModelConfig, index: int, shard: Shard):
        super().__init__()
        self.config = config
        self.index = index
        self.shard = shard
        self.adapters: dict[str, tuple[float, float]] = {}  # projection -> (scaling, dropout), see lora.py
        self.exponents: dict[str, Tensor] = {}  # projection -> [out] uint8 where its weight is e4m3, see weights.py
        self.frozen: dict[str, FrozenWeight] = {}  # in the place of such weights where gradients pass through
        for name, (out_features, in_features, has_bias) in config.projections.items():
            self.register_parameter(name, nn.Parameter(torch.empty(out_features, in_features)))
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.empty(out_features)) if has_bias else None)
        self.input_norm = nn.Parameter(torch.empty(config.hidden_size))
        self.mlp_norm = nn.Parameter(torch.empty(config.hidden_size))
        self.q_norm = nn.Parameter(torch.empty(config.head_dim)) if config.qk_norm else None
        self.k_norm = nn.Parameter(torch.empty(config.head_dim)) if config.qk_norm else None

    def project(self, name: str, x: Tensor, linear: Linear) -> Tensor:
        """x Wᵀ + b, plus scaling * dropout(x) Aᵀ Bᵀ where the projection carries an adapter."""
        return self.project_all((name,), x, linear)[0]

    def project_all(self, names: tuple[str, ...], x: Tensor, linear: Linear) -> list[Tensor]:
        """`project` for several that read the same rows: these are quantised once, and in inference mode, where the
        weights lie one below the other (`Decoder.stack`), all are columns of one product. A reference in training takes
        the student's way: what another shape rounds otherwise would be a divergence."""
        if self.frozen:
            biases = [self._parameters[f"{name}_bias"] for name in names]
            outs = frozen_linear(x, [self.frozen[name] for name in names], biases)
            return [self._adapted(name, out, x, linear) for name, out in zip(names, outs, strict=True)]
        operands = [self._operands(name) for name in names]
        rows = quantise(x) if self.exponents else x

        def product(weight: Tensor, bias: Tensor | None, exponents: Tensor | None) -> Tensor:
            if exponents is None:
                return linear(rows, weight, bias)
            return fp8_linear(rows, Quantised(weight, exponents), bias, x.dtype)

        if len(names) > 1 and torch.is_inference_mode_enabled() and (whole := _as_one(operands)):
            outs = product(*whole).split([len(weight) for weight, _, _ in operands], -1)
        else:
            outs = [product(*operand) for operand in operands]
        return [self._adapted(name, out, x, linear) for name, out in zip(names, outs, strict=True)]

    def _operands(self, name: str) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Weight, bias, and the weight's exponents."""
        return self._parameters[name], self._parameters[f"{name}_bias"], self.exponents.get(name)

    def _adapted(self, name: str, out: Tensor, x: Tensor, linear: Linear) -> Tensor:
        if name in self.adapters:
            scaling, dropout = self.adapters[name]
            down, up = self._parameters[f"{name}_lora_A"], self._parameters[f"{name}_lora_B"]
            low_rank = linear(F.dropout(x, dropout, self.training), down.to(x.dtype), None)
            out = out + scaling * linear(low_rank, up.to(x.dtype), None)
        return out

    def stack(self) -> None:
        """See `Decoder.stack`."""
        for names in PRODUCTS:
            for parts in zip(*(self._operands(name) for name in names), strict=True):
                if len(parts) > 1 and parts[0] is not None:
                    memory = torch.cat([part.data for part in parts])
                    for part, place in zip(parts, memory.split([len(part) for part in parts]), strict=True):
                        part.data = place

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, attention: Attention, linear: Linear) -> Tensor:
        eps, head_dim = self.config.rms_norm_eps, self.config.head_dim
        x = rms_norm(hidden, self.input_norm, eps)
        q, k, v = (out.unflatten(-1, (-1, head_dim)) for out in self.project_all(PRODUCTS[0], x, linear))
        rotation = Rotation(self.q_norm, self.k_norm, eps, cos, sin)
        mixed = self.project("o_proj", attention(self.index, q, k, v, rotation).flatten(-2), linear)
        x, hidden = add_rms_norm(self.shard.sum(mixed), hidden, self.mlp_norm, eps)
        x = swiglu(*self.project_all(PRODUCTS[2], x, linear))
        return hidden + self.shard.sum(self.project("down_proj", x, linear))


def _as_one(operands: list[tuple[Tensor | None, ...]]) -> list[Tensor | None] | None:
    """One weight, one bias and one vector of exponents over all of them, or None unless they lie so in memory."""
    whole = []
    for parts in zip(*operands, strict=True):
        first = parts[0]
        if first is None:
            whole.append(None)
            continue
        storage, end = first.untyped_storage()._cdata, first.storage_offset()
        for part in parts:
            if part.untyped_storage()._cdata != storage or part.storage_offset() != end or not part.is_contiguous():
                return None
            end += part.numel()
        rows = sum(len(part) for part in parts)
        whole.append(first.as_strided((rows, *first.shape[1:]), first.stride()))
    return whole


class Decoder(nn.Module):
    """A causal language model up to its head.

    The parameters are uninitialised: load a checkpoint (weights.py) or call `initialise`.

    Attributes:
        config: of what this process holds, which is all of the model unless `shard` says otherwise.
    """

    def __init__(self, config: ModelConfig, shard: Shard = WHOLE):
        super().__init__()
        self.config = config = shard.config(config)
        self.shard = shard
        self.lora = None  # the LoraConfig of adapters that are attached, see lora.py
        self.keeping: tuple[Keeping, ...] = ("none",) * config.num_layers  # for the backward pass, by layer
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.layers = nn.ModuleList(DecoderLayer(config, index, shard) for index in range(config.num_layers))
        self.final_norm = nn.Parameter(torch.empty(config.hidden_size))
        if not config.tied_head:
            self.lm_head = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self._angles: Tensor | None = None  # no buffer: .to(bfloat16) must not round it

    @property
    def head(self) -> Tensor:
        """[V, H], the language-model head; the embedding itself where the two are tied."""
        return self.embedding if self.config.tied_head else self.lm_head

    def refuse_e4m3(self) -> None:
        """What is about to happen to the weights needs them as the checkpoint has them.

        Raises:
            ValueError: they were quantised when they were loaded.
        """
        if any(layer.exponents for layer in self.layers):
            raise ValueError("the decoder was loaded with weights in e4m3; load it again without")

    @torch.no_grad()
    def pass_gradients(self) -> None:
        """Let gradients pass through projections that were quantised when they were loaded, which takes a transposed
        copy of each. They are no parameters any more: who shards or casts parameters leaves them alone."""
        for layer in self.layers:
            for name, exponents in layer.exponents.items():
                layer.frozen[name] = FrozenWeight.of(Quantised(layer._parameters[name], exponents))
                layer._parameters[name] = None

    def stack(self) -> None:
        """Lay weights that read the same rows one below the other, in memory that takes the place of theirs: a layer
        then computes q, k and v in one product and gate and up in another. Moved to other memory, they are apart."""
        for layer in self.layers:
            layer.stack()

    def initialise(self, seed: int, std: float = 0.02) -> None:
        """Fill a new model with Gaussian weights, unit gains and zero biases."""
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
        """cos and sin, [T, D/2] fp32 each, from a table made once a device."""
        if self._angles is None or self._angles.device != positions.device:
            config = self.config
            inv_freq = inverse_frequencies(config.head_dim, config.rope_theta, config.llama3_scaling)
            angles = torch.arange(config.max_seq_len, dtype=torch.float32)[:, None] * inv_freq
            self._angles = torch.stack((angles.cos(), angles.sin())).to(positions.device)
        return self._angles[0, positions], self._angles[1, positions]

    def forward(self, input_ids: Tensor, positions: Tensor, attention: Attention, linear: Linear = F.linear) -> Tensor:
        """Hidden states after the final norm.

        Args:
            input_ids, positions: [T] int64; positions count from 0 in each sequence, below config.max_seq_len.
            attention: mixes tokens, see `Attention`.
            linear: how weights that are not in e4m3 are multiplied.

        Returns:
            [T, H]; logits are its product with `head`, left to the caller, who seldom wants all of them.
        """
        cos, sin = self.rotation(positions)
        hidden = F.embedding(input_ids, self.embedding)
        for layer, keeping in zip(self.layers, self.keeping, strict=True):
            hidden = run_layer(layer, keeping, hidden, cos, sin, attention, linear)
        return rms_norm(hidden, self.final_norm, self.config.rms_norm_eps)
