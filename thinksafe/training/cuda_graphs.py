"""A decoder's passes over packs of tokens as CUDA graphs: two launches in the place of some two thousand.

A layer's forward and backward pass takes the host about 0.9 ms whatever the number of tokens: 25 ms for 28 layers, in
which an H200 computes as much as 5k tokens of Qwen3-0.6B take. A graph has fixed shapes and addresses, so a pack is
filled up to one of a few sizes by a sequence that nothing reads, at most an eighth of the pack, and copied to where the
graph reads. The rows that have a target differ from pack to pack too, so what comes after the decoder, the loss, runs
between the graphs of forward and backward pass as it always does.

A size is computed directly when it comes for the first time, which compiles kernels, and recorded when it comes again.
Both ways launch the same kernels on the same shapes, so what a step computes does not depend on what was recorded
before, and a run that goes on after a kill records anew. Graphs share their memory: one pack's activations are gone
before the next one's are formed.

Only for one process without DeepSpeed, whose hooks gather weights and reduce gradients in the middle of a pass.
"""

import gc
from collections.abc import Callable, Hashable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thinksafe.errors import UserError
from thinksafe.model.attention import PackedAttention
from thinksafe.model.decoder import Decoder

T = TypeVar("T")

MOST_GRAPHS = 32
"""Sizes that are recorded; each takes some megabytes on the GPU for its list of launches."""
_SMALLEST_STEP = 128
_FEWEST_SEQUENCES = 16


def bucket(num_tokens: int) -> int:
    """Tokens of the graph that serves so many: eight sizes an octave, above 1,024 tokens."""
    step = max(_SMALLEST_STEP, 1 << max(0, (num_tokens - 1).bit_length() - 4))
    return -(-num_tokens // step) * step


def _sequences(num_sequences: int) -> int:
    """Sequences of the graph that serves so many and the one that fills up; those left over are empty."""
    return max(_FEWEST_SEQUENCES, 1 << num_sequences.bit_length())


class DecoderGraphs:
    """Runs decoders, whose weights stay where they are, over packs of up to so many tokens."""

    def __init__(self, hidden: Tensor, most_tokens: int):
        """hidden: anything of a hidden state's width, dtype and device."""
        self.most_tokens = most_tokens
        self.device = hidden.device
        self._hidden = hidden.new_empty(bucket(most_tokens), hidden.shape[-1])
        self._grad_hidden = torch.empty_like(self._hidden)
        self._seen: set[Hashable] = set()
        self._recorded: dict[Hashable, _RecordedPass] = {}
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._memory = torch.cuda.graph_pool_handle() if hidden.is_cuda else None
        self.passes = 0

    def __call__(self, decoder: Decoder, input_ids: Tensor, positions: Tensor, attention: PackedAttention) -> Tensor:
        """Hidden states of these tokens, and behind them of those that fill up: [at least T, H].

        They lie in memory that the next call writes to, so take what you need of them, and run backward before.

        Args:
            input_ids, positions, attention: a pack's, as in `Decoder.forward`.
        """
        num_tokens, num_sequences = len(input_ids), len(attention.cu_seqlens) - 1
        if num_tokens > self.most_tokens:
            return decoder(input_ids, positions, attention)
        tokens, sequences = bucket(num_tokens), _sequences(num_sequences)
        # Of the pack's own tokens, so that nothing in it can be NaN that is not in the pack.
        filler = input_ids[:1].expand(tokens - num_tokens)
        input_ids = torch.cat((input_ids, filler))
        positions = F.pad(positions, (0, tokens - num_tokens))
        cu_seqlens = F.pad(attention.cu_seqlens, (0, sequences - num_sequences), value=tokens)
        adapted = any(layer.adapters for layer in decoder.layers)
        key = (decoder, decoder.training, adapted, torch.is_grad_enabled(), tokens, sequences)
        if key not in self._recorded:
            if key not in self._seen or len(self._recorded) == MOST_GRAPHS:
                self._seen.add(key)
                return decoder(input_ids, positions, PackedAttention(cu_seqlens, tokens))
            self._recorded[key] = _RecordedPass(self, decoder, tokens, sequences)
        return self._recorded[key](input_ids, positions, cu_seqlens)

    def record(self, work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """What the work returns, not computed yet, and what computes it, again and again.

        No pass that ran directly may be alive: autograd would go on adding gradients on its stream, not on the graph's.

        Raises:
            UserError: CUDA does not record it.
        """
        gc.collect()  # what cycles hold of an earlier recording would keep its memory
        try:
            graph = torch.cuda.CUDAGraph()
            # Other threads go on: one of them pins the next step's packs.
            with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
                result = work()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise UserError(f"training.cuda_graphs: a pass cannot be recorded ({reason}); set it to none") from error
        return result, graph.replay

    def sums_of(self, parameters: list[nn.Parameter]) -> list[Tensor]:
        """Where recorded backward passes add the gradients of each."""
        for parameter in parameters:
            if parameter not in self._sums:
                self._sums[parameter] = torch.zeros_like(parameter)
        return [self._sums[parameter] for parameter in parameters]


class _RecordedPass:
    """Forward and, with gradients, backward pass of one decoder over one number of tokens and sequences."""

    def __init__(self, graphs: DecoderGraphs, decoder: Decoder, tokens: int, sequences: int):
        device = graphs.device
        self.graphs = graphs
        self.input_ids, self.positions = torch.zeros(2, tokens, dtype=torch.int64, device=device)
        self.cu_seqlens = torch.full((sequences + 1,), tokens, dtype=torch.int32, device=device)
        self.hidden, self.grad_hidden = graphs._hidden[:tokens], graphs._grad_hidden[:tokens]
        trained = torch.is_grad_enabled()
        self.parameters = [  # a head of its own gets its gradient from the loss
            one for name, one in decoder.named_parameters() if trained and one.requires_grad and name != "lm_head"
        ]
        self.sums = graphs.sums_of(self.parameters)

        def forward() -> Tensor:
            hidden = decoder(self.input_ids, self.positions, PackedAttention(self.cu_seqlens, tokens))
            self.hidden.copy_(hidden.detach())
            return hidden

        def backward() -> None:
            gradients = torch.autograd.grad(hidden, self.parameters, self.grad_hidden)
            torch._foreach_add_(self.sums, gradients)

        hidden, self.forward = graphs.record(forward)
        if self.parameters:
            _, self.backward = graphs.record(backward)
            self._anchor = torch.zeros((), device=device, requires_grad=True)

    def __call__(self, input_ids: Tensor, positions: Tensor, cu_seqlens: Tensor) -> Tensor:
        for fixed, given in ((self.input_ids, input_ids), (self.positions, positions), (self.cu_seqlens, cu_seqlens)):
            fixed.copy_(given)
        if self.parameters:
            return _Replay.apply(self, self._anchor)
        self.forward()
        return self.hidden

    def attach_sums(self) -> None:
        """Make the sums the parameters' gradients, with what was there before."""
        new = []
        for parameter, total in zip(self.parameters, self.sums, strict=True):
            if parameter.grad is None:
                new.append(total)
            elif parameter.grad is not total:
                total.copy_(parameter.grad)
            parameter.grad = total
        if new:
            torch._foreach_zero_(new)


class _Replay(torch.autograd.Function):
    """The two graphs as one node of autograd's, which knows nothing of the parameters: the graph adds to their
    gradients itself."""

    @staticmethod
    def forward(ctx, recorded: _RecordedPass, anchor: Tensor) -> Tensor:
        ctx.recorded, ctx.random_state = recorded, random_state(anchor.device)
        recorded.graphs.passes += 1
        ctx.number = recorded.graphs.passes
        recorded.forward()
        return recorded.hidden.detach()

    @staticmethod
    def backward(ctx, grad_hidden: Tensor) -> tuple[None, None]:
        recorded, device = ctx.recorded, grad_hidden.device
        if recorded.graphs.passes != ctx.number:
            raise RuntimeError("another pass has run since, or this one's backward already: its memory is gone")
        recorded.graphs.passes += 1
        recorded.grad_hidden.copy_(grad_hidden)
        recorded.attach_sums()
        # Layers that are computed again draw the masks of the forward pass: as far from where the graph starts.
        now = random_state(device)
        set_random_state(ctx.random_state, device)
        recorded.backward()
        set_random_state(now, device)
        return None, None


def random_state(device: torch.device) -> Tensor:
    """Of the device's generator: on the host, so that nothing waits."""
    return torch.cuda.get_rng_state(device)


def set_random_state(state: Tensor, device: torch.device) -> None:
    """Take the device's generator back to where it was."""
    torch.cuda.set_rng_state(state, device)
