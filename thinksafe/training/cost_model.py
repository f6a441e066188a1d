"""What a training step multiplies, moves and holds, counted from the model's shape.

The useful FLOP are what the textbook needs, the source of MFU: with a frozen base 2 for each weight and token forward
and 2 for the activations' gradient, but none for the weights', where full fine-tuning takes 6; the head for response
tokens alone; attention by the pairs of tokens that see each other. What is computed again to save memory does not count
as useful, only as time.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from thinksafe.hardware import Hardware
from thinksafe.kernels.linear_cross_entropy import CHUNK
from thinksafe.model.activation_checkpointing import KEEPING, Keeping, kept_bytes
from thinksafe.model.config import ModelConfig
from thinksafe.model.lora import LoraConfig
from thinksafe.training.cuda_graphs import MOST_GRAPHS, bucket
from thinksafe.training.zero_config import ZeroConfig

_FLOW = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""Projections in the order in which a layer applies them."""

# Bytes that all but products and attention read and write, as multiples of what a layer keeps that keeps everything.
_MOVED_BY_LORA, _MOVED_BY_FULL, _MOVED_AGAIN = 5.7, 3.7, 2.2

HOST_SECONDS_PER_LAYER = 1e-3
"""Of one thread of the host, for a pack's forward and backward pass: no step that is not recorded can take less. The
small operations of a CPU take 0.9 ms (benchmarks/results/cpu/train.json); a GPU's 73 launches are taken to cost about
as much."""
_GATHERING_SECONDS_PER_LAYER = 1.4e-3
"""Of the host, what ZeRO-3 takes longer than the other stages: 59 against 21 ms for 28 layers, on a CPU."""
_SLOWER_HOST = 2
"""A host may take so many times as long, and has no work queued when a step begins."""
_GRAPH_BYTES = 2**24
"""What a GPU holds of the launches of one graph."""

_GATHERED, _REDUCED = 1_000_000_000, 500_000_000
"""Weights that ZeRO-3 has gathered at most, and gradients that are reduced at once: DeepSpeed's own settings."""


def causal_pairs(lengths: Sequence[int]) -> int:
    """Pairs of a query and a key that it sees, itself among them."""
    return sum(length * (length + 1) // 2 for length in lengths)


@dataclass(frozen=True)
class Work:
    """What is trained on in a step, or in a run: tokens, those with a target, and pairs that see each other."""

    tokens: float
    targets: float
    pairs: float


@dataclass(frozen=True)
class TrainingCosts:
    """Of one model and method.

    Attributes:
        model: the shape.
        lora: the adapters, or None where every weight is trained.
        itemsize: of weights and activations, in bytes.
        with_reference: whether some sequences are compared with the untrained student.
        fp8: whether the frozen projections are multiplied in e4m3.
        grouped_heads: whether attention keeps keys and values as they are, see `keeps_grouped_heads`; by default a pair
            for every query head, as torch's own does.
    """

    model: ModelConfig
    lora: LoraConfig | None
    itemsize: int = 2
    with_reference: bool = False
    fp8: bool = False
    grouped_heads: bool = False

    @property
    def trained_parameters(self) -> int:
        """How many numbers the optimiser moves."""
        if self.lora is None:
            return self.model.num_parameters
        return self.model.num_layers * sum(self.lora.rank * sum(sizes) for sizes in self._adapted().values())

    def _adapted(self) -> dict[str, tuple[int, int]]:
        """Projections with an adapter: (out features, in features)."""
        names = self.lora.target_modules if self.lora else ()
        return {name: self.model.projections[name][:2] for name in names}

    def useful_flop(self, work: Work) -> float:
        """Forward and backward, nothing twice."""
        model, head = self.model, self.model.head_weights * work.targets
        forward = 2 * model.num_layers * model.layer_weights * work.tokens
        attention = model.attention_flop(work.pairs)
        if self.lora is None:
            return 3 * (forward + attention + 2 * head)
        first = self._first_adapted()
        into_layers = forward - self._unneeded() * work.tokens
        into_attention = 2 * attention * (1 if first == 0 else 1 - 1 / model.num_layers)
        rank, adapters = self.lora.rank, 0
        for name, (out_features, in_features) in self._adapted().items():
            # Forward, the gradients of A and B, and those of their inputs.
            adapters += 6 * rank * (out_features + in_features) * model.num_layers
            adapters -= 2 * rank * in_features if name in _FLOW[first] else 0
        return forward + into_layers + adapters * work.tokens + attention + into_attention + 4 * head

    def _first_adapted(self) -> int:
        """Where in _FLOW the first adapters are."""
        return next(place for place, names in enumerate(_FLOW) if any(name in names for name in self._adapted()))

    def _unneeded(self) -> int:
        """FLOP a token: nothing below the first layer's first adapter is trained, so no gradient flows there."""
        if self.lora is None:
            return 0
        names = [name for names in _FLOW[: self._first_adapted() + 1] for name in names]
        return sum(2 * self.model.projections[name][0] * self.model.projections[name][1] for name in names)

    def reference_flop(self, work: Work) -> float:
        """A forward pass and the head, of sequences that are compared with the reference."""
        model = self.model
        layers = 2 * model.num_layers * model.layer_weights * work.tokens + model.attention_flop(work.pairs)
        return layers + 2 * model.head_weights * work.targets

    def repeated_flop(self, keeping: Sequence[Keeping], work: Work) -> float:
        """What layers that keep only their input compute again: all but their last product."""
        model, full = self.model, keeping.count("full")
        down = model.hidden_size * model.intermediate_size
        products = 2 * (model.layer_weights - down) * work.tokens
        return full * (products + model.attention_flop(work.pairs) / model.num_layers)

    def _kept(self) -> dict[Keeping, int]:
        names, rank, dropout = None, 0, 0.0
        if self.lora is not None:
            names, rank, dropout = self.lora.target_modules, self.lora.rank, self.lora.dropout
        return kept_bytes(self.model, names, rank, dropout, self.itemsize, self.grouped_heads)

    def moved_bytes(self, keeping: Sequence[Keeping], tokens: float) -> float:
        """Through the GPU's memory, outside products and attention."""
        once = self.model.num_layers * (_MOVED_BY_FULL if self.lora is None else _MOVED_BY_LORA)
        again = _MOVED_AGAIN * (len(keeping) - keeping.count("none"))
        return (once + again) * self._kept()["none"] * tokens

    def state_bytes(self, zero: ZeroConfig | None = None, ranks: int = 1) -> int:
        """Weights, gradients and AdamW's state, which are there whatever the step: what one GPU holds of them.

        Args:
            zero: how they are sharded, the stage decided; None for one process without DeepSpeed.
            ranks: over how many.
        """
        return self.weight_bytes(zero, ranks) + self.optimizer_bytes(zero, ranks)

    def weight_bytes(self, zero: ZeroConfig | None = None, ranks: int = 1) -> int:
        """The model's own weights, without adapters, as `state_bytes` counts them."""
        whole = self.model.num_parameters * self.itemsize
        if self.fp8:  # in both directions, one byte each
            whole += (2 - self.itemsize) * self.model.num_layers * self.model.layer_weights
        if zero is None or zero.stage != 3:
            return whole
        return 0 if zero.offload_parameters else whole // ranks

    def optimizer_bytes(self, zero: ZeroConfig | None = None, ranks: int = 1) -> int:
        """The state without the model's own weights, and the room in which ZeRO gathers and reduces."""
        trained, shard = self.trained_parameters, self.trained_parameters // ranks
        # +KL's copy of the weights; adapters are turned off instead.
        reference = self.itemsize * trained if self.with_reference and self.lora is None else 0
        if zero is not None:
            held = self.itemsize * (trained if zero.stage == 1 else shard)  # gradients
            held += 0 if zero.offload_optimizer else 16 * shard  # fp32 weights, gradients and two moments
            held += 0 if self.lora is None else self.itemsize * trained  # adapters
            held += self.weight_bytes(zero, ranks) if reference else 0
            room = self.model.num_parameters if zero.stage == 3 else 0
            return held + self.itemsize * (min(room, _GATHERED) + min(trained, _REDUCED))
        if self.lora is not None:
            # fp32 adapters, gradients and two moments, and a copy in the activations' dtype.
            return trained * (16 + self.itemsize)
        # Gradients in the weights' dtype and in fp32, two moments; masters where the weights are not fp32 themselves.
        masters = 0 if self.itemsize == 4 else 4 + self.itemsize
        return trained * (12 + masters) + reference

    def step_bytes(self, keeping: Sequence[Keeping], tokens: int, targets: int) -> int:
        """What a pack takes at its peak, beside the state: in the loss, or in some layer's backward pass."""
        model, kept, size = self.model, self._kept(), self.itemsize
        up_to_here, most = 0, 0
        for one in keeping:
            up_to_here += kept[one]
            # Layers above have let go of theirs; this one has again what it did not keep, and gradients of its gate.
            most = max(most, up_to_here + kept["none"] - kept[one] + 3 * size * model.intermediate_size)
        # A chunk's rows by the vocabulary; a divergence takes two such tables, of half as many rows.
        loss = min(targets, CHUNK) * (size * model.vocab_size + 8 * model.hidden_size)
        if self.lora is None:
            loss += 8 * model.head_weights  # the head's gradient in fp32, and a chunk's part of it
        # The layers' output, the rows that have a target and their gradients, the rotation.
        ends = 2 * size * model.hidden_size * (tokens + targets) + 4 * model.head_dim * tokens
        return int(ends + max(up_to_here * tokens + loss, most * tokens))

    def graph_bytes(self, keeping: Sequence[Keeping], tokens: int) -> int:
        """What recorded passes hold for good, up to so many tokens: the largest one's activations, the gradients that
        it forms and where it adds them, and lists of launches."""
        gradients = 2 * (self.itemsize if self.lora is None else 4) * self.trained_parameters
        return self.step_bytes(keeping, bucket(tokens), 0) + gradients + 2 * MOST_GRAPHS * _GRAPH_BYTES

    def launch_bound_tokens(self, hardware: Hardware) -> int:
        """Up to which a pack may be bound by its launches: the host might take longer for them than the GPU at best."""
        keeping = ("none",) * self.model.num_layers
        a_token = self.least_seconds(keeping, Work(1, 1, 0), 0, hardware)
        return int(_SLOWER_HOST * self.model.num_layers * HOST_SECONDS_PER_LAYER / a_token)

    def gathering_seconds(self, ranks: int, hardware: Hardware) -> tuple[float, float]:
        """Of a pack in ZeRO-3: on the link, which other work hides, all weights for either pass; and of the host."""
        gathered = 2 * (1 - 1 / ranks) * self.weight_bytes()
        return gathered / hardware.link_bytes_per_second, self.model.num_layers * _GATHERING_SECONDS_PER_LAYER

    def choose(self, free_bytes: float, tokens: int) -> tuple[Keeping, ...] | None:
        """What each layer keeps, so that a pack of so many tokens takes the least time that memory allows.

        Layers turn from `none` to `selective`, which costs a few passes over memory, then to `full`, which costs a
        second forward pass, one after another until the pack fits. None where even that is too much.
        """
        keeping = [KEEPING[0]] * self.model.num_layers
        for mode in KEEPING[1:]:
            for layer in range(len(keeping)):
                if self.step_bytes(keeping, tokens, tokens) <= free_bytes:
                    return tuple(keeping)
                keeping[layer] = mode
        return tuple(keeping) if self.step_bytes(keeping, tokens, tokens) <= free_bytes else None

    def least_seconds(self, keeping: Sequence[Keeping], work: Work, steps: int, hardware: Hardware) -> float:
        """At the rates that the hardware reaches, were nothing in the way."""
        flop = self.useful_flop(work) + self.repeated_flop(keeping, work)
        moved = self.moved_bytes(keeping, work.tokens) + 2 * steps * 16 * self.trained_parameters
        seconds = flop / hardware.flop_per_second + moved / hardware.bytes_per_second
        again = keeping.count("full")
        down = self.model.hidden_size * self.model.intermediate_size
        products = 2 * self.model.num_layers * self.model.layer_weights + again * (self.model.layer_weights - down)
        outputs = sum(out_features for out_features, _, _ in self.model.projections.values())
        rounded = self.model.num_layers * outputs + (self.model.num_layers + again) * self._inputs()
        return seconds - work.tokens * self._saved_by_fp8(2 * products - self._unneeded(), rounded, hardware)

    def reference_seconds(self, work: Work, hardware: Hardware) -> float:
        """Of `reference_flop`, at the same rates."""
        layers = self.model.num_layers
        saved = self._saved_by_fp8(2 * layers * self.model.layer_weights, layers * self._inputs(), hardware)
        return self.reference_flop(work) / hardware.flop_per_second - work.tokens * saved

    def _inputs(self) -> int:
        """Numbers that a layer's projections read, those that several share once."""
        return sum(self.model.projections[names[0]][1] for names in _FLOW)

    def _saved_by_fp8(self, flop: float, rounded: float, hardware: Hardware) -> float:
        """Seconds that products of so many FLOP take less in e4m3, with so many numbers of their operands rounded."""
        if not self.fp8:
            return 0.0
        return flop / 2 / hardware.flop_per_second - rounded * (self.itemsize + 1) / hardware.bytes_per_second
