"""FLOPs, memory traffic and memory of a training step, counted from the model's configuration.

Model FLOPs, from which MFU follows, are those without recomputation. A weight costs 2 FLOP per token in the forward
pass, 2 for the gradient of the activations and, if it is trained, 2 for its own gradient. The language-model head
counts response tokens only, attention the (query, key) pairs within the causal mask.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from thinksafe.hardware import Hardware
from thinksafe.kernels.linear_cross_entropy import CHUNK_ROWS
from thinksafe.model.activation_checkpointing import CHECKPOINT_MODES, CheckpointMode, saved_bytes
from thinksafe.model.config import PROJECTION_GROUPS, LoraConfig, ModelConfig
from thinksafe.training.config import ZeroConfig
from thinksafe.training.cuda_graphs import MAX_GRAPHS, padded_num_tokens

# Memory traffic except that of matmuls and attention, as a multiple of what a layer saves without checkpointing.
_LORA_TRAFFIC, _FULL_TRAFFIC, _RECOMPUTE_TRAFFIC = 5.7, 3.7, 2.2

HOST_SECONDS_PER_LAYER = 1e-3
"""Seconds of one host thread for the forward and backward pass of a layer over a pack without CUDA graphs. On a CPU the
small operations take 0.9 ms (benchmarks/results/cpu/train.json); we assume about the same for 73 launches on a GPU."""
_ZERO3_HOST_SECONDS_PER_LAYER = 1.4e-3
"""Seconds of the host that ZeRO-3 adds for a layer: 59 instead of 21 ms for 28 layers, on a CPU."""
_HOST_SLOWDOWN = 2
"""Safety factor of the host's time: another host may be slower, and no work is queued when a step begins."""
_BYTES_PER_GRAPH = 2**24
"""Bytes of GPU memory for the launch list of one CUDA graph."""
_MAX_LIVE_PARAMETERS, _REDUCE_BUCKET_SIZE = 1_000_000_000, 500_000_000
"""Largest number of gathered weights under ZeRO-3, and of gradients that are reduced at once: DeepSpeed's defaults."""


def causal_pairs(lengths: Sequence[int]) -> int:
    """Return the number of (query, key) pairs within the causal mask, the sum of length * (length + 1) / 2."""
    return sum(length * (length + 1) // 2 for length in lengths)


@dataclass(frozen=True)
class TokenCounts:
    """Token counts of one step, or of a run.

    Attributes:
        tokens: number of tokens of prompts and responses.
        targets: number of tokens with a loss, those of responses.
        causal_pairs: number of (query, key) pairs within the causal mask, see `causal_pairs`.
    """

    tokens: float
    targets: float
    causal_pairs: float


@dataclass(frozen=True)
class TrainingCosts:
    """Costs of training one model with one method, in FLOP, bytes and seconds.

    In all methods `checkpointing` is the mode of each layer, and `zero` the sharding over `world_size` ranks, with a
    stage of 1, 2 or 3, or None for one process without DeepSpeed.

    Attributes:
        lora: settings of the adapters, or None for full fine-tuning.
        itemsize: bytes of an element of weights and activations: 2 for bf16, 4 for fp32.
        with_reference: whether some sequences have a KL loss against the untrained student.
        fp8: whether the matmuls with frozen projections are computed in e4m3.
        grouped_heads: whether attention reads keys and values without repeating them for every query head, see
            `supports_grouped_heads`. By default they are repeated, as before torch 2.12.
    """

    model: ModelConfig
    lora: LoraConfig | None
    itemsize: int = 2
    with_reference: bool = False
    fp8: bool = False
    grouped_heads: bool = False

    @property
    def num_trainable_parameters(self) -> int:
        """Number of trained elements: those of the adapters, or all of the model in full fine-tuning."""
        if self.lora is None:
            return self.model.num_parameters
        widths = sum(out_features + in_features for out_features, in_features in self._adapted_projections.values())
        return self.model.num_layers * self.lora.rank * widths

    def forward_flops(self, counts: TokenCounts) -> float:
        """Return the FLOPs of a forward pass without adapters, as the reference computes it for sequences with a KL
        loss, language-model head included."""
        model = self.model
        layers = 2 * model.num_layers * model.layer_weights * counts.tokens + model.attention_flop(counts.causal_pairs)
        return layers + 2 * model.head_weights * counts.targets

    def model_flops(self, counts: TokenCounts) -> float:
        """Return the FLOPs of forward and backward pass, without recomputation and the reference: three times the
        forward pass, but twice for frozen weights. In the first layer, the gradients of the inputs of its first
        adapters, and of all that comes before them, are not counted."""
        forward = self.forward_flops(counts)
        if self.lora is None:
            return 3 * forward
        model, rank, without_gradient = self.model, self.lora.rank, self._projections_without_input_gradient
        adapters = 6 * self.num_trainable_parameters
        adapters -= sum(
            2 * rank * self._adapted_projections[n][1] for n in without_gradient if n in self._adapted_projections
        )
        attention = model.attention_flop(counts.causal_pairs)
        if "o_proj" in without_gradient:
            attention *= 1 - 2 / model.num_layers
        return 2 * forward + attention + (adapters - self._skipped_gradient_flops) * counts.tokens

    def recompute_flops(self, checkpointing: Sequence[CheckpointMode], counts: TokenCounts) -> float:
        """Return the FLOPs that the backward pass recomputes. A layer in mode `full` recomputes its forward pass except
        the last matmul; the other modes recompute no matmul and no attention."""
        matmul_flops = 2 * self._recomputed_weights * counts.tokens
        attention_flops = self.model.attention_flop(counts.causal_pairs) / self.model.num_layers
        return checkpointing.count("full") * (matmul_flops + attention_flops)

    def elementwise_bytes(self, checkpointing: Sequence[CheckpointMode], tokens: float) -> float:
        """Return the bytes that operations other than matmuls and attention read from and write to GPU memory, in the
        forward and backward pass of all layers."""
        traffic = self.model.num_layers * (_FULL_TRAFFIC if self.lora is None else _LORA_TRAFFIC)
        recompute_traffic = _RECOMPUTE_TRAFFIC * (len(checkpointing) - checkpointing.count("none"))
        return (traffic + recompute_traffic) * self._saved_bytes["none"] * tokens

    def state_bytes(self, zero: ZeroConfig | None = None, world_size: int = 1) -> int:
        """Return `weight_bytes` + `optimizer_bytes`, the bytes on one GPU that do not depend on the step."""
        return self.weight_bytes(zero, world_size) + self.optimizer_bytes(zero, world_size)

    def weight_bytes(self, zero: ZeroConfig | None = None, world_size: int = 1) -> int:
        """Return the bytes of the model's weights on one GPU, without adapters. Stage 3 alone shards or offloads
        them."""
        num_bytes = self.model.num_parameters * self.itemsize
        if self.fp8:  # two e4m3 copies, the weight and its transpose, one byte each
            num_bytes += (2 - self.itemsize) * self.model.num_layers * self.model.layer_weights
        if zero is None or zero.stage != 3:
            return num_bytes
        return 0 if zero.offload_parameters else num_bytes // world_size

    def optimizer_bytes(self, zero: ZeroConfig | None = None, world_size: int = 1) -> int:
        """Return the bytes of adapters, gradients, AdamW's state, the KL reference's copy of the weights and the
        buffers in which ZeRO gathers and reduces, on one GPU. What is offloaded to the host does not count."""
        trainable, size = self.num_trainable_parameters, self.itemsize
        shard = trainable // world_size
        # With +KL, full fine-tuning keeps a copy of the initial weights; LoRA turns its adapters off instead.
        has_copy = self.with_reference and self.lora is None
        if zero is not None:
            num_bytes = size * (trainable if zero.stage == 1 else shard)  # gradients
            num_bytes += 0 if zero.offload_optimizer else 16 * shard  # fp32 weights, gradients and two moments
            num_bytes += 0 if self.lora is None else size * trainable  # adapters
            num_bytes += self.weight_bytes(zero, world_size) if has_copy else 0
            gathered = min(self.model.num_parameters, _MAX_LIVE_PARAMETERS) if zero.stage == 3 else 0
            return num_bytes + size * (gathered + min(trainable, _REDUCE_BUCKET_SIZE))
        if self.lora is not None:
            # fp32 adapters, gradients and two moments, and a copy in the activations' dtype.
            return trainable * (16 + size)
        # Gradients in the weights' dtype and in fp32, two moments; masters where the weights are not fp32 themselves.
        masters = 0 if size == 4 else 4 + size
        return trainable * (12 + masters + (size if has_copy else 0))

    def pack_bytes(self, checkpointing: Sequence[CheckpointMode], tokens: int, targets: int) -> int:
        """Return the peak bytes of activations of a pack with `targets` tokens with a loss: in the loss, or in the
        backward pass of some layer."""
        model, saved, size = self.model, self._saved_bytes, self.itemsize
        saved_so_far, peak = 0, 0
        for mode in checkpointing:
            saved_so_far += saved[mode]
            # Layers above have freed their activations. This layer has recomputed what it did not save, and holds the
            # gradients of its gate.
            peak = max(peak, saved_so_far + saved["none"] - saved[mode] + 3 * size * model.intermediate_size)
        # Logits of one chunk, [rows, V]. KL holds two such arrays, with half the rows.
        loss = min(targets, CHUNK_ROWS) * (size * model.vocab_size + 8 * model.hidden_size)
        if self.lora is None:
            loss += 8 * model.head_weights  # the head's gradient in fp32, and one chunk's part of it
        # Output of the layers, rows with a target, the gradients of both, rotary embedding.
        outside_layers = 2 * size * model.hidden_size * (tokens + targets) + 4 * model.head_dim * tokens
        return int(outside_layers + max(saved_so_far * tokens + loss, peak * tokens))

    def cuda_graph_bytes(self, checkpointing: Sequence[CheckpointMode], tokens: int) -> int:
        """Return the bytes that CUDA graphs of passes of up to `tokens` tokens hold for the whole run: the activations
        of the largest pass, the gradients it computes, the buffers it adds them to, and the launch lists."""
        gradients = 2 * (self.itemsize if self.lora is None else 4) * self.num_trainable_parameters
        launch_lists = 2 * MAX_GRAPHS * _BYTES_PER_GRAPH
        return self.pack_bytes(checkpointing, padded_num_tokens(tokens), 0) + gradients + launch_lists

    def launch_bound_tokens(self, hardware: Hardware) -> int:
        """Return the number of tokens up to which a pack may be launch-bound: its launches may take the host longer
        than the GPU's roofline time."""
        checkpointing = ("none",) * self.model.num_layers
        seconds_per_token = self.roofline_seconds(checkpointing, TokenCounts(1, 1, 0), 0, hardware)
        return int(_HOST_SLOWDOWN * self.model.num_layers * HOST_SECONDS_PER_LAYER / seconds_per_token)

    def all_gather_seconds(self, world_size: int, hardware: Hardware) -> tuple[float, float]:
        """Return (seconds of the link, seconds of the host) in which ZeRO-3 gathers all weights for the forward and the
        backward pass of one pack. Matmuls overlap with the link's time, but not with the host's."""
        gathered = 2 * (1 - 1 / world_size) * self.weight_bytes()
        return gathered / hardware.link_bytes_per_second, self.model.num_layers * _ZERO3_HOST_SECONDS_PER_LAYER

    def checkpointing_within(self, free_bytes: float, tokens: int) -> tuple[CheckpointMode, ...] | None:
        """Return the mode of each layer with which a pack of `tokens` tokens fits into `free_bytes`, the GPU memory
        beside `state_bytes`, and takes the least time; None if it does not even fit with `full` in all layers. One
        layer after another changes from `none` to `selective`, and then to `full`, until the pack fits."""
        checkpointing = [CHECKPOINT_MODES[0]] * self.model.num_layers
        changes = [(layer, mode) for mode in CHECKPOINT_MODES[1:] for layer in range(len(checkpointing))]
        while self.pack_bytes(checkpointing, tokens, tokens) > free_bytes:
            if not changes:
                return None
            layer, mode = changes.pop(0)
            checkpointing[layer] = mode
        return tuple(checkpointing)

    def roofline_seconds(
        self, checkpointing: Sequence[CheckpointMode], counts: TokenCounts, steps: int, hardware: Hardware
    ) -> float:
        """Return the seconds that one GPU needs at the rates that it reaches, without launches, communication and the
        reference: FLOPs with recomputation / FLOP rate + bytes of other operations / memory rate. Matmuls in e4m3 count
        half the time, and AdamW reads and writes 16 bytes per trained element."""
        model, num_full = self.model, checkpointing.count("full")
        flops = self.model_flops(counts) + self.recompute_flops(checkpointing, counts)
        traffic = self.elementwise_bytes(checkpointing, counts.tokens) + 2 * steps * 16 * self.num_trainable_parameters
        weights = 2 * model.num_layers * model.layer_weights + num_full * self._recomputed_weights
        outputs = sum(out_features for out_features, _, _ in model.projections.values())
        quantized = model.num_layers * outputs + (model.num_layers + num_full) * self._num_projection_inputs
        saved = self._seconds_saved_by_fp8(2 * weights - self._skipped_gradient_flops, quantized, hardware)
        return flops / hardware.flop_per_second + traffic / hardware.bytes_per_second - counts.tokens * saved

    def reference_seconds(self, counts: TokenCounts, hardware: Hardware) -> float:
        """Return the seconds that one GPU needs for the reference's forward pass, at the rates that it reaches."""
        layers = self.model.num_layers
        flops, quantized = 2 * layers * self.model.layer_weights, layers * self._num_projection_inputs
        saved = self._seconds_saved_by_fp8(flops, quantized, hardware)
        return self.forward_flops(counts) / hardware.flop_per_second - counts.tokens * saved

    def _seconds_saved_by_fp8(self, flops: float, quantized: float, hardware: Hardware) -> float:
        """Return the seconds that e4m3 saves in matmuls of `flops` FLOP, less the time to quantize `quantized`
        elements; negative if quantizing takes longer, and 0 without fp8."""
        if not self.fp8:
            return 0.0
        return flops / 2 / hardware.flop_per_second - quantized * (self.itemsize + 1) / hardware.bytes_per_second

    @property
    def _saved_bytes(self) -> dict[CheckpointMode, int]:
        """Bytes per token that one layer saves for the backward pass, by mode."""
        names, rank, dropout = None, 0, 0.0
        if self.lora is not None:
            names, rank, dropout = self.lora.target_modules, self.lora.rank, self.lora.dropout
        return saved_bytes(self.model, names, rank, dropout, self.itemsize, self.grouped_heads)

    @property
    def _adapted_projections(self) -> dict[str, tuple[int, int]]:
        """(out features, in features) of every projection with an adapter; empty for full fine-tuning."""
        return {name: self.model.projections[name][:2] for name in (self.lora.target_modules if self.lora else ())}

    @property
    def _projections_without_input_gradient(self) -> list[str]:
        """Projections of the first layer whose inputs need no gradient, since nothing below the first group with an
        adapter is trained; empty for full fine-tuning."""
        names: list[str] = []
        for group in PROJECTION_GROUPS if self.lora else ():
            names += group
            if not self._adapted_projections.keys().isdisjoint(group):
                break
        return names

    @property
    def _skipped_gradient_flops(self) -> int:
        """FLOPs per token that the backward pass of the first layer leaves out."""
        sizes = [self.model.projections[name] for name in self._projections_without_input_gradient]
        return sum(2 * out_features * in_features for out_features, in_features, _ in sizes)

    @property
    def _recomputed_weights(self) -> int:
        """Weights of a layer's matmuls that mode `full` recomputes: all but the last one's."""
        return self.model.layer_weights - self.model.hidden_size * self.model.intermediate_size

    @property
    def _num_projection_inputs(self) -> int:
        """Number of input elements of a layer's projections; a shared input counts once."""
        return sum(self.model.projections[names[0]][1] for names in PROJECTION_GROUPS)
