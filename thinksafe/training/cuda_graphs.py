"""CUDA graphs of a decoder's passes over packs: two launches instead of about two thousand.

The host needs about 0.9 ms for the forward and backward pass of a layer, for any number of tokens: 25 ms for 28 layers.
In that time an H200 computes 5k tokens of Qwen3-0.6B, so smaller packs are launch-bound.

A graph has fixed shapes and addresses. A pack is therefore padded to one of a few sizes by one sequence that nothing
reads, at most an eighth of the pack, and copied to the graph's buffers. The number of rows with a target differs from
pack to pack too, so everything after the decoder (the loss) runs eagerly, between the graphs of the forward and the
backward pass.

A size runs eagerly the first time, which compiles kernels, and is captured the second time. Both ways launch the same
kernels on the same shapes, so the result of a step does not depend on earlier captures, and a resumed run can capture
again. All graphs share one memory pool: the activations of a pack are freed before those of the next pack are computed.

Graphs work in one process without DeepSpeed only: DeepSpeed's hooks gather weights and reduce gradients within a pass.
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

MAX_GRAPHS = 32
"""Largest number of captured sizes; the launch list of each takes some megabytes of GPU memory."""
_MIN_BUCKET_STEP = 128
_MIN_SEQUENCES = 16


def padded_num_tokens(num_tokens: int) -> int:
    """Return the padded number of tokens for a pack of `num_tokens`: a multiple of 128 up to 1,024, above that one of
    eight sizes per power of two."""
    step = max(_MIN_BUCKET_STEP, 1 << max(0, (num_tokens - 1).bit_length() - 4))
    return -(-num_tokens // step) * step


def _padded_num_sequences(num_sequences: int) -> int:
    """Return the number of sequences of the graph for a pack of `num_sequences` and at least one sequence of padding: a
    power of two from 16 on. Unused sequences are empty."""
    return max(_MIN_SEQUENCES, 1 << num_sequences.bit_length())


class DecoderGraphs:
    """A function that runs a decoder over a pack, with CUDA graphs for packs of up to `max_tokens` tokens.

    It keeps graphs for each decoder, size, and state of training mode, adapters and gradients. The weights must stay at
    their addresses.
    """

    def __init__(self, hidden: Tensor, max_tokens: int):
        """Allocate the buffers that all graphs share.

        Args:
            hidden: any tensor with the width, dtype and device of hidden states.
            max_tokens: a larger pack runs eagerly.
        """
        self.max_tokens = max_tokens
        self.device = hidden.device
        self._hidden = hidden.new_empty(padded_num_tokens(max_tokens), hidden.shape[-1])
        self._grad_hidden = torch.empty_like(self._hidden)
        self._computed: set[Hashable] = set()
        self._captured: dict[Hashable, _CapturedPass] = {}
        self._grad_buffers: dict[nn.Parameter, Tensor] = {}
        self._pool = torch.cuda.graph_pool_handle() if hidden.is_cuda else None
        self.num_passes = 0

    def __call__(self, decoder: Decoder, input_ids: Tensor, positions: Tensor, attention: PackedAttention) -> Tensor:
        """Return the hidden states of T tokens, followed by those of the padding: [at least T, H].

        The next call overwrites them. Copy what you need, and run the backward pass, before it. A pack of more than
        `max_tokens` tokens runs eagerly, without padding.

        Args:
            decoder: the decoder to run: the student, or a copy of it as the reference.
            input_ids, positions: [T] int64, the tokens of a pack and their positions in their sequences.
            attention: bounds of the pack's sequences.

        Raises:
            UserError: CUDA cannot capture a pass.
        """
        num_tokens, num_sequences = len(input_ids), len(attention.cu_seqlens) - 1
        if num_tokens > self.max_tokens:
            return decoder(input_ids, positions, attention)
        padded_tokens, padded_sequences = padded_num_tokens(num_tokens), _padded_num_sequences(num_sequences)
        # The padding repeats a token of the pack, so it has no NaN that the pack does not have.
        padding = input_ids[:1].expand(padded_tokens - num_tokens)
        input_ids = torch.cat((input_ids, padding))
        positions = F.pad(positions, (0, padded_tokens - num_tokens))
        cu_seqlens = F.pad(attention.cu_seqlens, (0, padded_sequences - num_sequences), value=padded_tokens)
        has_adapters = any(layer.adapters for layer in decoder.layers)
        key = (decoder, decoder.training, has_adapters, torch.is_grad_enabled(), padded_tokens, padded_sequences)
        if key not in self._captured:
            if key not in self._computed or len(self._captured) == MAX_GRAPHS:
                self._computed.add(key)
                return decoder(input_ids, positions, PackedAttention(cu_seqlens, padded_tokens))
            self._captured[key] = _CapturedPass(self, decoder, padded_tokens, padded_sequences)
        return self._captured[key](input_ids, positions, cu_seqlens)

    def capture(self, run: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """Capture `run` as a CUDA graph. Return what `run` returns, whose tensors hold no values yet, and a function
        that computes these values at every call.

        No eager pass may be alive: autograd would continue to add gradients on that pass's stream, not on the graph's.

        Raises:
            UserError: CUDA cannot capture `run`.
            torch.OutOfMemoryError: the GPU's memory does not suffice.
        """
        gc.collect()  # reference cycles would keep the memory of an earlier capture
        try:
            graph = torch.cuda.CUDAGraph()
            # Other threads may call CUDA meanwhile: one of them pins the next step's packs.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                result = run()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise UserError(f"training.cuda_graphs: CUDA cannot capture a pass ({reason}); set it to none") from error
        return result, graph.replay

    def gradient_buffers(self, parameters: list[nn.Parameter]) -> list[Tensor]:
        """Return the buffers to which captured backward passes add the gradient of each parameter, in order. All passes
        share them; a new buffer is zero."""
        for parameter in parameters:
            if parameter not in self._grad_buffers:
                self._grad_buffers[parameter] = torch.zeros_like(parameter)
        return [self._grad_buffers[parameter] for parameter in parameters]


class _CapturedPass:
    """Graphs of one decoder for one number of tokens and sequences: forward and, with gradients enabled, backward.

    A call takes a padded pack and returns its hidden states, [tokens, H], in a buffer that the next pass overwrites.
    """

    def __init__(self, graphs: DecoderGraphs, decoder: Decoder, tokens: int, sequences: int):
        device = graphs.device
        self.graphs = graphs
        self.input_ids, self.positions = torch.zeros(2, tokens, dtype=torch.int64, device=device)
        self.cu_seqlens = torch.full((sequences + 1,), tokens, dtype=torch.int32, device=device)
        self.hidden, self.grad_hidden = graphs._hidden[:tokens], graphs._grad_hidden[:tokens]
        with_gradients = torch.is_grad_enabled()
        self.parameters = [  # an untied head gets its gradient from the loss
            parameter
            for name, parameter in decoder.named_parameters()
            if with_gradients and parameter.requires_grad and name != "lm_head"
        ]
        self.grad_buffers = graphs.gradient_buffers(self.parameters)

        def forward() -> Tensor:
            hidden = decoder(self.input_ids, self.positions, PackedAttention(self.cu_seqlens, tokens))
            self.hidden.copy_(hidden.detach())
            return hidden

        def backward() -> None:
            gradients = torch.autograd.grad(hidden, self.parameters, self.grad_hidden)
            torch._foreach_add_(self.grad_buffers, gradients)

        hidden, self.forward = graphs.capture(forward)
        if self.parameters:
            _, self.backward = graphs.capture(backward)
            self._anchor = torch.zeros((), device=device, requires_grad=True)

    def __call__(self, input_ids: Tensor, positions: Tensor, cu_seqlens: Tensor) -> Tensor:
        static = (self.input_ids, self.positions, self.cu_seqlens)
        for buffer, value in zip(static, (input_ids, positions, cu_seqlens), strict=True):
            buffer.copy_(value)
        if self.parameters:
            return _Replay.apply(self, self._anchor)
        self.forward()
        return self.hidden

    def attach_grad_buffers(self) -> None:
        """Make the buffers the parameters' gradients (`grad`), and set them to the gradients that exist already, or to
        zero if there are none."""
        without_gradient = []
        for parameter, buffer in zip(self.parameters, self.grad_buffers, strict=True):
            if parameter.grad is None:
                without_gradient.append(buffer)
            elif parameter.grad is not buffer:
                buffer.copy_(parameter.grad)
            parameter.grad = buffer
        if without_gradient:
            torch._foreach_zero_(without_gradient)


class _Replay(torch.autograd.Function):
    """The forward and the backward graph of a pass as one autograd node. Autograd does not see the parameters: the
    backward graph itself adds to their gradients."""

    @staticmethod
    def forward(ctx, captured: _CapturedPass, anchor: Tensor) -> Tensor:
        ctx.captured, ctx.random_state = captured, random_state(anchor.device)
        captured.graphs.num_passes += 1
        ctx.pass_number = captured.graphs.num_passes
        captured.forward()
        return captured.hidden.detach()

    @staticmethod
    def backward(ctx, grad_hidden: Tensor) -> tuple[None, None]:
        captured, device = ctx.captured, grad_hidden.device
        if captured.graphs.num_passes != ctx.pass_number:
            raise RuntimeError("the memory of this pass is reused: another pass, or this backward pass, has run since")
        captured.graphs.num_passes += 1
        captured.grad_hidden.copy_(grad_hidden)
        captured.attach_grad_buffers()
        # Recomputed layers must draw the dropout masks of the forward pass, so both graphs start at the same state.
        current_state = random_state(device)
        set_random_state(ctx.random_state, device)
        captured.backward()
        set_random_state(current_state, device)
        return None, None


def random_state(device: torch.device) -> Tensor:
    """Return the state of the GPU's random number generator, a tensor on the host, without waiting for the GPU."""
    return torch.cuda.get_rng_state(device)


def set_random_state(state: Tensor, device: torch.device) -> None:
    """Set the GPU's random number generator to a state that `random_state` returned."""
    torch.cuda.set_rng_state(state, device)
