"""FLOPs, memory traffic and memory of a training step, counted from the model's configuration.

Model FLOPs are what the mathematics needs, and MFU follows from them. With a frozen base each weight and token costs 2
FLOP in the forward pass and 2 for the gradient of the activations; full fine-tuning adds 2 for the gradient of the
weights, 6 in all. The language-model head counts response tokens only, attention the (query, key) pairs within the
causal mask.
Recomputation adds time, but no model FLOPs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from thinksafe.hardware import Hardware
from thinksafe.kernels.linear_cross_entropy import CHUNK_ROWS
from thinksafe.model.activation_checkpointing import CHECKPOINT_MODES, CheckpointMode, saved_bytes
from thinksafe.model.config import ModelConfig
from thinksafe.model.decoder import PROJECTION_GROUPS
from thinksafe.model.lora import LoraConfig
from thinksafe.training.cuda_graphs import MAX_GRAPHS, padded_num_tokens
from thinksafe.training.zero_config import ZeroConfig

# Memory traffic of all operations except matmuls and attention, as a multiple of the bytes that a layer saves without
# checkpointing.
_LORA_TRAFFIC, _FULL_TRAFFIC, _RECOMPUTE_TRAFFIC = 5.7, 3.7, 2.2

HOST_SECONDS_PER_LAYER = 1e-3
"""Seconds of one host thread for the forward and backward pass of a layer over a pack; no step without CUDA graphs can
take less. On a CPU the small operations of a layer take 0.9 ms (benchmarks/results/cpu/train.json); we assume that the
73 launches on a GPU cost about the same."""
_ZERO3_HOST_SECONDS_PER_LAYER = 1.4e-3
"""Seconds of the host for a layer that ZeRO-3 adds to those of the other stages: 59 against 21 ms for 28 layers, on a
CPU."""
_HOST_SLOWDOWN = 2
"""Safety factor that multiplies the host's time: another host may be slower, and no work is queued when a step
begins."""
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
    """Costs of training one model with one method, in FLOP, bytes and seconds. The training stage uses them to choose
    memory settings, the loop to report FLOPs, and the estimate to predict a run.

    Attributes:
        model: configuration of the model.
        lora: settings of the adapters, or None for full fine-tuning.
        itemsize: bytes of an element of weights and activations: 2 for bf16, 4 for fp32.
        with_reference: whether some sequences have a KL loss against the untrained student.
        fp8: whether the matmuls with frozen projections are computed in e4m3.
        grouped_heads: whether attention reads keys and values without repeating them for every query head, see
            `supports_grouped_heads`. By default they are repeated, as in torch's own attention.
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
        return self.model.num_layers * sum(
            self.lora.rank * sum(sizes) for sizes in self._adapted_projections().values()
        )

    def _adapted_projections(self) -> dict[str, tuple[int, int]]:
        """Return (out features, in features) of every projection with an adapter; empty for full fine-tuning."""
        names = self.lora.target_modules if self.lora else ()
        return {name: self.model.projections[name][:2] for name in names}

    def model_flops(self, counts: TokenCounts) -> float:
        """Return the FLOPs of forward and backward pass over all tokens in `counts`, without recomputation and without
        the reference.

        Full fine-tuning: 6 FLOP per layer weight and token and per head weight and target, and three times the
        attention of the forward pass. LoRA: 4 FLOP instead of 6 for frozen weights, 6 for adapters. In the first layer,
        the gradients of the inputs of its first adapters, and of all that comes before them, are not counted.
        """
        model, head = self.model, self.model.head_weights * counts.targets
        forward = 2 * model.num_layers * model.layer_weights * counts.tokens
        attention = model.attention_flop(counts.causal_pairs)
        if self.lora is None:
            return 3 * (forward + attention + 2 * head)
        first_group = self._first_adapted_group()
        layers_backward = forward - self._skipped_gradient_flops() * counts.tokens
        attention_backward = 2 * attention * (1 if first_group == 0 else 1 - 1 / model.num_layers)
        rank, adapters = self.lora.rank, 0
        for name, (out_features, in_features) in self._adapted_projections().items():
            # Forward pass, gradients of A and B, gradients of their inputs.
            adapters += 6 * rank * (out_features + in_features) * model.num_layers
            adapters -= 2 * rank * in_features if name in PROJECTION_GROUPS[first_group] else 0
        return forward + layers_backward + adapters * counts.tokens + attention + attention_backward + 4 * head

    def _first_adapted_group(self) -> int:
        """Return the index in PROJECTION_GROUPS of the first group with an adapter. Call it for LoRA only."""
        return next(
            index
            for index, group in enumerate(PROJECTION_GROUPS)
            if any(name in group for name in self._adapted_projections())
        )

    def _skipped_gradient_flops(self) -> int:
        """Return the FLOPs per token that the backward pass leaves out in the first layer, since nothing below its
        first adapter is trained; 0 for full fine-tuning."""
        if self.lora is None:
            return 0
        names = [name for group in PROJECTION_GROUPS[: self._first_adapted_group() + 1] for name in group]
        return sum(2 * self.model.projections[name][0] * self.model.projections[name][1] for name in names)

    def reference_flops(self, counts: TokenCounts) -> float:
        """Return the FLOPs of the reference's forward pass, language-model head included.

        Args:
            counts: counts of the sequences with a KL loss only.
        """
        model = self.model
        layers = 2 * model.num_layers * model.layer_weights * counts.tokens + model.attention_flop(counts.causal_pairs)
        return layers + 2 * model.head_weights * counts.targets

    def recompute_flops(self, checkpointing: Sequence[CheckpointMode], counts: TokenCounts) -> float:
        """Return the FLOPs that the backward pass recomputes for all tokens in `counts`.

        A layer in mode `full` recomputes its forward pass except the last matmul. Layers in the other modes recompute
        no matmul and no attention, and count 0.

        Args:
            checkpointing: mode of each layer.
        """
        model, num_full = self.model, checkpointing.count("full")
        down_weights = model.hidden_size * model.intermediate_size
        matmul_flops = 2 * (model.layer_weights - down_weights) * counts.tokens
        return num_full * (matmul_flops + model.attention_flop(counts.causal_pairs) / model.num_layers)

    def _saved_bytes(self) -> dict[CheckpointMode, int]:
        """Return the bytes per token that one layer saves for the backward pass, by mode."""
        names, rank, dropout = None, 0, 0.0
        if self.lora is not None:
            names, rank, dropout = self.lora.target_modules, self.lora.rank, self.lora.dropout
        return saved_bytes(self.model, names, rank, dropout, self.itemsize, self.grouped_heads)

    def elementwise_bytes(self, checkpointing: Sequence[CheckpointMode], tokens: float) -> float:
        """Return the bytes that operations other than matmuls and attention read from and write to GPU memory, in the
        forward and backward pass of all layers over `tokens` tokens.

        Args:
            checkpointing: mode of each layer.
        """
        traffic = self.model.num_layers * (_FULL_TRAFFIC if self.lora is None else _LORA_TRAFFIC)
        recompute_traffic = _RECOMPUTE_TRAFFIC * (len(checkpointing) - checkpointing.count("none"))
        return (traffic + recompute_traffic) * self._saved_bytes()["none"] * tokens

    def state_bytes(self, zero: ZeroConfig | None = None, world_size: int = 1) -> int:
        """Return the bytes of weights, gradients and AdamW's state on one GPU, the sum of `weight_bytes` and
        `optimizer_bytes`; they do not depend on the step.

        Args:
            zero: sharding with a stage of 1, 2 or 3; None for one process without DeepSpeed.
            world_size: number of ranks that share the state.
        """
        return self.weight_bytes(zero, world_size) + self.optimizer_bytes(zero, world_size)

    def weight_bytes(self, zero: ZeroConfig | None = None, world_size: int = 1) -> int:
        """Return the bytes of the model's weights on one GPU, without adapters; 0 if they are offloaded to the host.

        Args:
            zero: sharding with a stage of 1, 2 or 3; None for one process without DeepSpeed.
            world_size: number of ranks that share the weights in stage 3; otherwise each rank holds all.
        """
        num_bytes = self.model.num_parameters * self.itemsize
        if self.fp8:  # two e4m3 copies, the weight and its transpose, one byte each
            num_bytes += (2 - self.itemsize) * self.model.num_layers * self.model.layer_weights
        if zero is None or zero.stage != 3:
            return num_bytes
        return 0 if zero.offload_parameters else num_bytes // world_size

    def optimizer_bytes(self, zero: ZeroConfig | None = None, world_size: int = 1) -> int:
        """Return the bytes of adapters, gradients, AdamW's state, the KL reference's copy of the weights and the
        buffers in which ZeRO gathers and reduces, on one GPU. What is offloaded to the host does not count.

        Args:
            zero: sharding with a stage of 1, 2 or 3; None for one process without DeepSpeed.
            world_size: number of ranks that share the state.
        """
        trainable, shard = self.num_trainable_parameters, self.num_trainable_parameters // world_size
        # With +KL, full fine-tuning keeps a copy of the initial weights; LoRA turns its adapters off instead.
        reference = self.itemsize * trainable if self.with_reference and self.lora is None else 0
        if zero is not None:
            num_bytes = self.itemsize * (trainable if zero.stage == 1 else shard)  # gradients
            num_bytes += 0 if zero.offload_optimizer else 16 * shard  # fp32 weights, gradients and two moments
            num_bytes += 0 if self.lora is None else self.itemsize * trainable  # adapters
            num_bytes += self.weight_bytes(zero, world_size) if reference else 0
            gathered = self.model.num_parameters if zero.stage == 3 else 0
            return num_bytes + self.itemsize * (
                min(gathered, _MAX_LIVE_PARAMETERS) + min(trainable, _REDUCE_BUCKET_SIZE)
            )
        if self.lora is not None:
            # fp32 adapters, gradients and two moments, and a copy in the activations' dtype.
            return trainable * (16 + self.itemsize)
        # Gradients in the weights' dtype and in fp32, two moments; masters where the weights are not fp32 themselves.
        masters = 0 if self.itemsize == 4 else 4 + self.itemsize
        return trainable * (12 + masters) + reference

    def pack_bytes(self, checkpointing: Sequence[CheckpointMode], tokens: int, targets: int) -> int:
        """Return the peak bytes of activations of a pack: in the loss, or in the backward pass of some layer.

        Args:
            checkpointing: mode of each layer.
            tokens: number of tokens of the pack.
            targets: number of tokens with a loss.
        """
        model, saved, size = self.model, self._saved_bytes(), self.itemsize
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
        return (
            self.pack_bytes(checkpointing, padded_num_tokens(tokens), 0) + gradients + 2 * MAX_GRAPHS * _BYTES_PER_GRAPH
        )

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
        """Return the mode of each layer with which a pack of `tokens` tokens fits and takes the least time.

        One layer after another changes from `none` to `selective`, which costs a few passes over memory, and then from
        `selective` to `full`, which costs a second forward pass, until the pack fits. Return None if it does not even
        fit with `full` in all layers.

        Args:
            free_bytes: GPU memory beside `state_bytes`.
        """
        checkpointing = [CHECKPOINT_MODES[0]] * self.model.num_layers
        for mode in CHECKPOINT_MODES[1:]:
            for layer in range(len(checkpointing)):
                if self.pack_bytes(checkpointing, tokens, tokens) <= free_bytes:
                    return tuple(checkpointing)
                checkpointing[layer] = mode
        return tuple(checkpointing) if self.pack_bytes(checkpointing, tokens, tokens) <= free_bytes else None

    def roofline_seconds(
        self, checkpointing: Sequence[CheckpointMode], counts: TokenCounts, steps: int, hardware: Hardware
    ) -> float:
        """Return the seconds that one GPU needs for all tokens in `counts` at the rates that it reaches: FLOPs of the
        model and of recomputation / FLOP rate + bytes of other operations and of AdamW / memory rate, without launches,
        communication or the reference. Matmuls in e4m3 count half the time.

        Args:
            checkpointing: mode of each layer.
            steps: number of optimizer steps; each reads and writes 16 bytes per trained element.
        """
        flops = self.model_flops(counts) + self.recompute_flops(checkpointing, counts)
        traffic = self.elementwise_bytes(checkpointing, counts.tokens) + 2 * steps * 16 * self.num_trainable_parameters
        seconds = flops / hardware.flop_per_second + traffic / hardware.bytes_per_second
        num_recomputed = checkpointing.count("full")
        down_weights = self.model.hidden_size * self.model.intermediate_size
        matmul_weights = 2 * self.model.num_layers * self.model.layer_weights + num_recomputed * (
            self.model.layer_weights - down_weights
        )
        outputs = sum(out_features for out_features, _, _ in self.model.projections.values())
        quantized = (
            self.model.num_layers * outputs + (self.model.num_layers + num_recomputed) * self._num_projection_inputs()
        )
        return seconds - counts.tokens * self._seconds_saved_by_fp8(
            2 * matmul_weights - self._skipped_gradient_flops(), quantized, hardware
        )

    def reference_seconds(self, counts: TokenCounts, hardware: Hardware) -> float:
        """Return the seconds that one GPU needs for the reference's forward pass, at the rates that it reaches.

        Args:
            counts: counts of the sequences with a KL loss only.
        """
        layers = self.model.num_layers
        saved = self._seconds_saved_by_fp8(
            2 * layers * self.model.layer_weights, layers * self._num_projection_inputs(), hardware
        )
        return self.reference_flops(counts) / hardware.flop_per_second - counts.tokens * saved

    def _num_projection_inputs(self) -> int:
        """Return the number of input elements of a layer's projections; a shared input counts once."""
        return sum(self.model.projections[names[0]][1] for names in PROJECTION_GROUPS)

    def _seconds_saved_by_fp8(self, flops: float, quantized: float, hardware: Hardware) -> float:
        """Return the seconds that e4m3 saves in matmuls of `flops` FLOP, less the time to quantize `quantized`
        elements; negative if quantizing takes longer, and 0 without fp8."""
        if not self.fp8:
            return 0.0
        return flops / 2 / hardware.flop_per_second - quantized * (self.itemsize + 1) / hardware.bytes_per_second
