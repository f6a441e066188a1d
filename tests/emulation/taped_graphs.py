"""CUDA graphs on a CPU: a tape captures the operations of a pass and replays them on the same memory.

As in a real graph, a replay runs these operations and nothing else. Decisions that the host made during capture are
fixed, and an input counts only if it is copied into the tensor that the graph reads. A capture leaves no results: every
floating-point tensor that it created is NaN until the replay, and NaN again after a backward pass. Random operations
draw at relative offsets: a replay draws new numbers, and a recomputation repeats the numbers of its forward pass.

An operation that makes the host wait for the device, because a shape or a decision depends on values, is an error.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from thinksafe.model.decoder import Decoder
from thinksafe.training import cuda_graphs as graphs
from thinksafe.training.cuda_graphs import DecoderGraphs

HOST_SYNC_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


def tensors_in(tree) -> list[Tensor]:
    """Return the tensors in nested lists, tuples and dicts."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def needs_host_sync(op, args) -> bool:
    """Return whether the host must read values of a tensor before it can run `op(*args)`, to know a shape or a number.

    Indexing needs that only with a boolean mask.
    """
    if op is torch.ops.aten.index.Tensor:
        return any(index.dtype == torch.bool for index in tensors_in(args[1]))
    return bool(HOST_SYNC_TAGS & set(op.tags))


def storage_keys(tree) -> set[int]:
    """Return a key for the memory of each tensor in nested lists, tuples and dicts; a view has the key of its base."""
    return {tensor.untyped_storage()._cdata for tensor in tensors_in(tree)}


class Tape(TorchDispatchMode):
    """Mode that stores the torch operations that run inside the block, for `replay`.

    Attributes:
        calls: (operation, arguments, keyword arguments, results, index in `rng_offsets` or None).
        created: {storage key: tensor} that an operation created.
        overwritten: {id: (tensor, copy of its value before)} for tensors from outside that an operation changed.
    """

    def __init__(self, rng_offsets: dict[bytes, int]):
        """Create an empty tape.

        Args:
            rng_offsets: maps each generator state in which a random operation ran to its index, in order of first
                use. The tapes of a forward pass and its backward pass share it.
        """
        super().__init__()
        self.rng_offsets = rng_offsets
        self.calls, self.created, self.overwritten = [], {}, {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert not needs_host_sync(op, args), f"{op} waits for the device"
        rng_offset = None
        if torch.Tag.nondeterministic_seeded in op.tags:
            rng_offset = self.rng_offsets.setdefault(torch.get_rng_state().numpy().tobytes(), len(self.rng_offsets))
        input_storages = storage_keys((args, kwargs))
        if op._schema.is_mutable:
            for value, argument in zip(args, op._schema.arguments, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    for tensor in tensors_in(value):
                        if tensor.untyped_storage()._cdata not in self.created:
                            self.overwritten.setdefault(id(tensor), (tensor, tensor.clone()))
        out = op(*args, **kwargs)
        new_tensors = [tensor for tensor in tensors_in(out) if tensor.untyped_storage()._cdata not in input_storages]
        self.created |= {tensor.untyped_storage()._cdata: tensor.detach() for tensor in new_tensors}
        if new_tensors or op._schema.is_mutable:
            # Detached tensors: the memory without its autograd history.
            self.calls.append((op, *tree_map_only(Tensor, Tensor.detach, (args, kwargs, out)), rng_offset))
        return out

    @torch.no_grad()
    def undo(self) -> None:
        """Restore overwritten tensors and fill created tensors with NaN, as if nothing had been computed."""
        for tensor, saved in self.overwritten.values():
            tensor.copy_(saved)
        self.fill_with_nan()

    @torch.no_grad()
    def fill_with_nan(self) -> None:
        """Fill the floating-point tensors that this tape created with NaN."""
        for tensor in self.created.values():
            if tensor.is_floating_point():
                # .data hides the change from autograd, which has not captured the backward pass yet.
                tensor.data.fill_(torch.nan)

    @torch.no_grad()
    def replay(self, rng_states: dict) -> None:
        """Run the operations again on the same memory.

        Args:
            rng_states: maps (generator state at the start, index from `rng_offsets`) to the generator state of that
                operation. The replays of a forward pass and its backward pass share and fill it, so that a
                recomputation draws the same numbers.
        """
        start = torch.get_rng_state().numpy().tobytes()
        for op, args, kwargs, out, rng_offset in self.calls:
            if rng_offset is not None:
                torch.set_rng_state(rng_states.setdefault((start, rng_offset), torch.get_rng_state()))
            result = op(*args, **kwargs)
            for taped, replayed in zip(tensors_in(out), tensors_in(result), strict=True):
                if taped.untyped_storage()._cdata in self.created and taped.data_ptr() != replayed.data_ptr():
                    taped.copy_(replayed)


class TapedGraphs(DecoderGraphs):
    """DecoderGraphs with tapes instead of CUDA graphs; `use_taped_graphs` makes trainers use them.

    Args:
        hidden: any tensor with the width, dtype and device of hidden states.
        max_tokens: a larger pack runs eagerly.

    Attributes:
        replays: number of replays so far.
        tapes: one tape per captured pass.
    """

    def __init__(self, hidden: Tensor, max_tokens: int):
        super().__init__(hidden, max_tokens)
        self.replays, self.tapes = 0, []
        self._rng_offsets, self._rng_states = {}, {}

    def __call__(self, decoder: Decoder, *inputs) -> Tensor:
        """Run the decoder through the graphs, and mark the gradient edges of its parameters.

        `capture` uses the marks to check that autograd holds no earlier pass. With such a pass autograd would
        accumulate gradients on the stream of that pass, and a graph captures only one stream."""
        self._trainable_parameters = [parameter for parameter in decoder.parameters() if parameter.requires_grad]
        hidden = super().__call__(decoder, *inputs)
        if hidden.requires_grad:
            for parameter in self._trainable_parameters:
                get_gradient_edge(parameter).node.metadata["held by an earlier pass"] = True
        return hidden

    def capture(self, run: Callable):
        """Record a pass on a tape; return its result tensors, which are NaN until a replay, and a replay function.

        Args:
            run: runs the pass; its name is `forward` for a forward pass, otherwise it is a backward pass.
        """
        forward = run.__name__ == "forward"
        if forward:
            self._rng_offsets = {}
            assert not any(get_gradient_edge(parameter).node.metadata for parameter in self._trainable_parameters), (
                "autograd still holds an earlier pass"
            )
        rng_state, tape = torch.get_rng_state(), Tape(self._rng_offsets)
        with tape:
            result = run()
        torch.set_rng_state(rng_state)
        tape.undo()
        self.tapes.append(tape)

        def replay() -> None:
            self.replays += 1
            if forward:
                self._rng_states = {}
            tape.replay(self._rng_states)
            if not forward:
                for earlier_tape in self.tapes:
                    earlier_tape.fill_with_nan()

        return result, replay


def attention_without_host_sync(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """Return causal attention within each sequence, [T, num_heads, D], like `packed_attention`.

    Its operations do not depend on the lengths of the sequences, so the host needs no values of the device.

    Args:
        q: [T, num_heads, D].
        k, v: [T, num_kv_heads, D].
        cu_seqlens: [S + 1] int32, start of each sequence and the end of the last.
        max_seqlen: not used.
    """
    tokens = torch.arange(len(q), device=q.device)
    sequence = torch.searchsorted(cu_seqlens, tokens.int(), right=True)
    visible = (sequence[:, None] == sequence) & (tokens[:, None] >= tokens)
    group_size = q.shape[1] // k.shape[1]
    q, k, v = (x.transpose(0, 1) for x in (q, k.repeat_interleave(group_size, 1), v.repeat_interleave(group_size, 1)))
    scores = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).masked_fill(~visible, -torch.inf)
    return (F.softmax(scores, -1) @ v).transpose(0, 1)


def use_taped_graphs(monkeypatch) -> None:
    """Make every LocalTrainer of this test use tapes where it would use CUDA graphs.

    Args:
        monkeypatch: pytest's fixture; it undoes the change after the test.
    """
    monkeypatch.setattr("thinksafe.model.attention.packed_attention", attention_without_host_sync)
    monkeypatch.setattr("thinksafe.training.local_trainer.DecoderGraphs", TapedGraphs)
    monkeypatch.setattr(graphs, "get_random_state", lambda device: torch.get_rng_state())
    monkeypatch.setattr(graphs, "set_random_state", lambda state, device: torch.set_rng_state(state))
