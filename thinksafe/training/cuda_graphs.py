"""CUDA graphs of a decoder's passes over packs: two launches instead of about two thousand.

The host needs about 25 ms for the forward and backward pass of 28 layers, in which an H200 computes 5k tokens of
Qwen3-0.6B: smaller packs are launch-bound. A graph has fixed shapes and addresses, so a pack is padded to one of a few
sizes, by at most an eighth, with one sequence that nothing reads, and copied to the graph's buffers. The number of rows
with a target varies, so the loss runs eagerly, between the graphs of the forward and the backward pass.

A size runs eagerly the first time, which compiles kernels, and is captured the second time. Both ways launch the same
kernels on the same shapes, so the result of a step does not depend on earlier captures, and a resumed run can capture
again. DeepSpeed's hooks cannot be captured, so graphs work without it only.
"""

import gc
from collections.abc import Callable, Hashable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thinksafe.errors import UserError
from thinksafe.model.attention import PackedAttention
from thinksafe.model.cuda_graphs import T, capture
from thinksafe.model.decoder import Decoder

MAX_GRAPHS = 32
"""Largest number of captured sizes; the launch list of each takes some megabytes of GPU memory."""


def padded_num_tokens(num_tokens: int) -> int:
    """Return the padded number of tokens for a pack of `num_tokens`: a multiple of 128 up to 1,024, above that one of
    eight sizes per power of two."""
    step = max(128, 1 << max(0, (num_tokens - 1).bit_length() - 4))
    return -(-num_tokens // step) * step


class DecoderGraphs:
    """A function that runs a decoder over a pack, with CUDA graphs for packs of up to `max_tokens` tokens.

    It keeps graphs for each decoder, size, and state of training mode, adapters and gradients. The weights must stay at
    their addresses. All graphs share one memory pool: the activations of a pack are freed before the next pack.
    """

    def __init__(self, hidden: Tensor, max_tokens: int):
        """Allocate the buffers that all graphs share; `hidden` has the width, dtype and device of hidden states."""
        self.max_tokens, self.num_passes = max_tokens, 0
        self.hidden = hidden.new_empty(padded_num_tokens(max_tokens), hidden.shape[-1])
        self.grad_hidden = torch.empty_like(self.hidden)
        self.grad_buffers: dict[nn.Parameter, Tensor] = {}  # all captured backward passes add their gradients to these
        self._computed: set[Hashable] = set()
        self._captured: dict[Hashable, _CapturedPass] = {}
        self._pool = torch.cuda.graph_pool_handle() if hidden.is_cuda else None

    def __call__(self, decoder: Decoder, input_ids: Tensor, positions: Tensor, attention: PackedAttention) -> Tensor:
        """Return the hidden states of the T tokens of a pack, followed by those of the padding: [at least T, H]. The
        next call overwrites them, so copy what you need, and run the backward pass, before it.

        Raises:
            UserError: CUDA cannot capture a pass.
        """
        num_tokens, num_sequences = len(input_ids), len(attention.cu_seqlens) - 1
        if num_tokens > self.max_tokens:
            return decoder(input_ids, positions, attention)
        # At least one sequence is padding; unused sequences are empty.
        padded_tokens, padded_sequences = padded_num_tokens(num_tokens), max(16, 1 << num_sequences.bit_length())
        # The padding repeats a token of the pack, so it has no NaN that the pack does not have.
        input_ids = torch.cat((input_ids, input_ids[:1].expand(padded_tokens - num_tokens)))
        positions = F.pad(positions, (0, padded_tokens - num_tokens))
        cu_seqlens = F.pad(attention.cu_seqlens, (0, padded_sequences - num_sequences), value=padded_tokens)
        state = decoder.training, decoder.lora is not None, torch.is_grad_enabled()
        key = (decoder, *state, padded_tokens, padded_sequences)
        if key not in self._captured:
            if key not in self._computed or len(self._captured) == MAX_GRAPHS:
                self._computed.add(key)
                return decoder(input_ids, positions, PackedAttention(cu_seqlens, padded_tokens))
            self._captured[key] = _CapturedPass(self, decoder, input_ids, positions, cu_seqlens)
        return self._captured[key](input_ids, positions, cu_seqlens)

    def capture(self, run: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """Capture half a pass as `capture` in model/cuda_graphs.py does; a failure other than a lack of memory is a
        UserError. No eager pass may be alive: autograd would continue to add gradients on that pass's stream."""
        gc.collect()  # reference cycles would keep the memory of an earlier capture
        try:
            return capture(run, self._pool)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise UserError(f"training.cuda_graphs: CUDA cannot capture a pass ({reason}); set it to none") from error


class _CapturedPass:
    """Graphs of one decoder for one padded size: forward and, with gradients enabled, backward.

    A call takes a padded pack and returns its hidden states, [tokens, H], in a buffer that the next pass overwrites.
    """

    def __init__(self, graphs: DecoderGraphs, decoder: Decoder, *pack: Tensor):
        self.graphs, self.inputs = graphs, [tensor.clone() for tensor in pack]
        input_ids, positions, cu_seqlens = self.inputs
        self.hidden, self.grad_hidden = graphs.hidden[: len(input_ids)], graphs.grad_hidden[: len(input_ids)]
        trained = {name: p for name, p in decoder.named_parameters() if torch.is_grad_enabled() and p.requires_grad}
        trained.pop("lm_head", None)  # an untied head gets its gradient from the loss
        self.parameters = list(trained.values())
        for parameter in self.parameters:
            if parameter not in graphs.grad_buffers:
                graphs.grad_buffers[parameter] = torch.zeros_like(parameter)
        self.grad_buffers = [graphs.grad_buffers[parameter] for parameter in self.parameters]

        def forward() -> Tensor:
            hidden = decoder(input_ids, positions, PackedAttention(cu_seqlens, len(input_ids)))
            self.hidden.copy_(hidden.detach())
            return hidden

        def backward() -> None:
            gradients = torch.autograd.grad(hidden, self.parameters, self.grad_hidden)
            torch._foreach_add_(self.grad_buffers, gradients)

        hidden, self.forward = graphs.capture(forward)
        if self.parameters:
            _, self.backward = graphs.capture(backward)
            self._anchor = torch.zeros((), device=hidden.device, requires_grad=True)

    def __call__(self, *pack: Tensor) -> Tensor:
        for buffer, value in zip(self.inputs, pack, strict=True):
            buffer.copy_(value)
        if self.parameters:
            return _Replay.apply(self, self._anchor)
        self.forward()
        return self.hidden

    def attach_grad_buffers(self) -> None:
        """Make the buffers the parameters' `grad`, with the gradients that exist already, or zero."""
        pairs = list(zip(self.parameters, self.grad_buffers, strict=True))
        if new_buffers := [buffer for parameter, buffer in pairs if parameter.grad is None]:
            torch._foreach_zero_(new_buffers)
        for parameter, buffer in pairs:
            if parameter.grad is not None and parameter.grad is not buffer:
                buffer.copy_(parameter.grad)
            parameter.grad = buffer


class _Replay(torch.autograd.Function):
    """The forward and the backward graph of a pass as one autograd node. Autograd does not see the parameters: the
    backward graph itself adds to their gradients."""

    @staticmethod
    def forward(ctx, captured: _CapturedPass, anchor: Tensor) -> Tensor:
        ctx.captured, ctx.random_state = captured, get_random_state(anchor.device)
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
        current_state = get_random_state(device)
        set_random_state(ctx.random_state, device)
        captured.backward()
        set_random_state(current_state, device)
        return None, None


# The state of the GPU's random number generator is on the host, so reading and setting it does not wait for the GPU.
get_random_state, set_random_state = torch.cuda.get_rng_state, torch.cuda.set_rng_state
