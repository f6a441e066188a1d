"""CUDA graphs as a CPU can have them: the operations of a pass are taped, and run again on the same memory.

As in a real graph nothing but these operations is run again: what the host decided while it recorded is decided for
good, and what lay in a tensor that was not copied to where the graph reads is lost. Recording leaves no results behind:
everything that was formed is NaN until it is replayed, and again once a backward pass is over. Random numbers are drawn
as far from the generator's state at a replay as they were from that at the recording.

An operation that waits for the device, since the shape or a decision depends on values, is refused.
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

WAITS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


def tensors_in(tree) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def waits(op, args) -> bool:
    """Whether the host must see values to go on. An index is safe unless it is a mask."""
    if op is torch.ops.aten.index.Tensor:
        return any(index.dtype == torch.bool for index in tensors_in(args[1]))
    return bool(WAITS & set(op.tags))


def storages_of(tree) -> set[int]:
    return {tensor.untyped_storage()._cdata for tensor in tensors_in(tree)}


class Tape(TorchDispatchMode):
    """Records what runs inside of it; see `replay`."""

    def __init__(self, offsets: dict[bytes, int]):
        """offsets: the generator's states at draws so far, each with its distance from where graphs start."""
        super().__init__()
        self.offsets = offsets
        self.calls, self.formed, self.changed = [], {}, {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert not waits(op, args), f"{op} waits for the device"
        offset = None
        if torch.Tag.nondeterministic_seeded in op.tags:
            offset = self.offsets.setdefault(torch.get_rng_state().numpy().tobytes(), len(self.offsets))
        given = storages_of((args, kwargs))
        if op._schema.is_mutable:
            for value, argument in zip(args, op._schema.arguments, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    for tensor in tensors_in(value):
                        if tensor.untyped_storage()._cdata not in self.formed:
                            self.changed.setdefault(id(tensor), (tensor, tensor.clone()))
        out = op(*args, **kwargs)
        made = [one for one in tensors_in(out) if one.untyped_storage()._cdata not in given]
        self.formed |= {one.untyped_storage()._cdata: one.detach() for one in made}
        if made or op._schema.is_mutable:
            # The memory, without what autograd hangs on it.
            self.calls.append((op, *tree_map_only(Tensor, Tensor.detach, (args, kwargs, out)), offset))
        return out

    @torch.no_grad()
    def forget(self) -> None:
        """Nothing was computed yet."""
        for tensor, before in self.changed.values():
            tensor.copy_(before)
        self.spoil()

    @torch.no_grad()
    def spoil(self) -> None:
        """What was formed is not there any more."""
        for tensor in self.formed.values():
            if tensor.is_floating_point():
                tensor.data.fill_(torch.nan)  # unseen by autograd, which has yet to record the way back

    @torch.no_grad()
    def replay(self, drawn: dict) -> None:
        """drawn: (the generator's state at the start, distance) -> its state at that draw, of this pass so far."""
        start = torch.get_rng_state().numpy().tobytes()
        for op, args, kwargs, out, offset in self.calls:
            if offset is not None:
                torch.set_rng_state(drawn.setdefault((start, offset), torch.get_rng_state()))
            found = op(*args, **kwargs)
            for fixed, new in zip(tensors_in(out), tensors_in(found), strict=True):
                if fixed.untyped_storage()._cdata in self.formed and fixed.data_ptr() != new.data_ptr():
                    fixed.copy_(new)


class TapedGraphs(DecoderGraphs):
    """Recorded passes on a CPU.

    Attributes:
        replays: how many there were.
        tapes: of every pass that was recorded.
    """

    def __init__(self, hidden: Tensor, most_tokens: int):
        super().__init__(hidden, most_tokens)
        self.replays, self.tapes = 0, []
        self._offsets, self._drawn = {}, {}

    def __call__(self, decoder: Decoder, *inputs) -> Tensor:
        """Nothing may be recorded while autograd holds a pass that ran directly: it would add gradients on the stream
        of that pass, and a graph holds one stream."""
        self._trained = [one for one in decoder.parameters() if one.requires_grad]
        hidden = super().__call__(decoder, *inputs)
        if hidden.requires_grad:
            for one in self._trained:
                get_gradient_edge(one).node.metadata["of an earlier pass"] = True
        return hidden

    def record(self, work: Callable):
        forward = work.__name__ == "forward"
        if forward:
            self._offsets = {}
            assert not any(get_gradient_edge(one).node.metadata for one in self._trained), "an earlier pass is alive"
        state, tape = torch.get_rng_state(), Tape(self._offsets)
        with tape:
            result = work()
        torch.set_rng_state(state)
        tape.forget()
        self.tapes.append(tape)

        def replay() -> None:
            self.replays += 1
            if forward:
                self._drawn = {}
            tape.replay(self._drawn)
            if not forward:
                for other in self.tapes:
                    other.spoil()

        return result, replay


def attention_without_waiting(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """`packed_attention` whose operations are the same whatever the sequences' lengths."""
    tokens = torch.arange(len(q), device=q.device)
    sequence = torch.searchsorted(cu_seqlens, tokens.int(), right=True)
    sees = (sequence[:, None] == sequence) & (tokens[:, None] >= tokens)
    group = q.shape[1] // k.shape[1]
    q, k, v = (x.transpose(0, 1) for x in (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)))
    scores = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).masked_fill(~sees, -torch.inf)
    return (F.softmax(scores, -1) @ v).transpose(0, 1)


def tape_passes(monkeypatch) -> None:
    """From here on an engine that is to record passes records them on tapes."""
    monkeypatch.setattr("thinksafe.model.attention.packed_attention", attention_without_waiting)
    monkeypatch.setattr("thinksafe.training.local_engine.DecoderGraphs", TapedGraphs)
    monkeypatch.setattr(graphs, "random_state", lambda device: torch.get_rng_state())
    monkeypatch.setattr(graphs, "set_random_state", lambda state, device: torch.set_rng_state(state))
