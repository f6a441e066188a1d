"""Activation checkpointing: what a layer saves for its backward pass, and what it recomputes instead.

`none` saves everything. `selective` saves what is expensive to compute, which is the matmuls with the weights and
attention, and recomputes the rest: norms, the adapters' inputs, rotation, the gate. A matmul with inner dimension K
costs K FLOP per byte saved in bf16, and attention costs one FLOP per byte for every token of context. Everything else
costs a few FLOP per byte, but occupies as much memory. `full` saves only the layer's input and recomputes the whole
layer. All three give the same gradients.
"""

from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from thinksafe.kernels import fp8_frozen_linear  # noqa: F401 - registers its operator
from thinksafe.model.config import PROJECTION_GROUPS, ModelConfig

CheckpointMode = Literal["none", "selective", "full"]
CHECKPOINT_MODES: tuple[CheckpointMode, ...] = get_args(CheckpointMode)
"""The modes in order: each saves less memory than the one before it and recomputes more."""

_MIN_SAVED_INNER_DIM = 128
"""Matmuls with an inner dimension (FLOP per byte) of at most this are recomputed. The limit concerns an adapter's B,
whose inner dimension is the rank."""

_ATTENTION_NAMESPACES = ("torch_attn", "flash_attn")
"""Operator namespaces in which torch and the package flash-attn register variable-length attention."""


def run_layer(layer: nn.Module, checkpointing: CheckpointMode, *inputs) -> Tensor:
    """Return the layer's output for the arguments of its `forward`; with gradients, save activations by the mode."""
    if checkpointing == "none" or not torch.is_grad_enabled():
        return layer(*inputs)
    if checkpointing == "full":
        return checkpoint(layer, *inputs, use_reentrant=False)
    contexts = partial(create_selective_checkpoint_contexts, partial(_policy, layer.config.intermediate_size))
    return checkpoint(layer, *inputs, use_reentrant=False, context_fn=contexts)


def _policy(last_inner_dim: int, context, op, *args, **kwargs) -> CheckpointPolicy:
    """Return whether the mode `selective` saves the output of an operation: of attention and of matmuls with an inner
    dimension above `_MIN_SAVED_INNER_DIM`, but not of the layer's last matmul, which nothing reads again.

    Args:
        last_inner_dim: inner dimension of that last matmul, the intermediate size.
    """
    if op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.thinksafe.fp8_frozen_linear.default):
        inner_dim = args[0].shape[1] if op.namespace == "thinksafe" else args[-1].shape[0]
        is_expensive = _MIN_SAVED_INNER_DIM < inner_dim != last_inner_dim
    else:
        is_expensive = op.namespace in _ATTENTION_NAMESPACES
    return CheckpointPolicy.MUST_SAVE if is_expensive else CheckpointPolicy.PREFER_RECOMPUTE


def saved_bytes(
    config: ModelConfig,
    adapters: tuple[str, ...] | None,
    rank: int,
    dropout: float,
    itemsize: int,
    grouped_heads: bool = False,
) -> dict[CheckpointMode, int]:
    """Return the bytes per token that one layer saves on a GPU, by mode.

    Args:
        adapters: names of the projections that carry an adapter; None if every weight is trained.
        rank, dropout: settings of the adapters, see `LoraConfig`; 0 without adapters.
        itemsize: bytes per element of the activations.
        grouped_heads: whether attention reads keys and values without repeating them for every query head.
    """
    projections = config.projections
    hidden, inner = config.hidden_size, config.intermediate_size
    q, kv = projections["q_proj"][0], projections["k_proj"][0]
    log_sum_exp = 4 * config.num_heads
    adapter_width = rank * len(adapters or ())
    # The layer's input and the sum after attention, each with the norm's reciprocal root; queries, keys and values in
    # the form that attention reads; its output; gate and up.
    keys = kv if grouped_heads else q
    all_bytes = itemsize * (2 * hidden + 2 * q + 2 * keys + 2 * inner) + 2 * 4 + log_sum_exp
    if config.qk_norm:
        all_bytes += itemsize * (q + kv) + 4 * (config.num_heads + config.num_kv_heads)
    if adapters is None:  # inputs of the weights' gradients; attention's output is already counted
        all_bytes += itemsize * (2 * hidden + inner)
    elif dropout:  # each adapter has a separate mask, one byte per element
        input_width = sum(projections[name][1] for name in adapters)
        all_bytes += itemsize * (input_width + adapter_width) + input_width
    else:  # adapters of the same input share it
        # Attention's output, the input of o_proj, is already counted.
        groups = [names for names in PROJECTION_GROUPS if set(names) & set(adapters) and names != ("o_proj",)]
        all_bytes += itemsize * (sum(projections[names[0]][1] for names in groups) + adapter_width)
    # The layer's input, q, k, v, attention's output, o, gate and up.
    matmul_width = 2 * hidden + 2 * q + 2 * kv + 2 * inner + adapter_width
    return {"none": all_bytes, "selective": itemsize * matmul_width + log_sum_exp, "full": itemsize * hidden}
