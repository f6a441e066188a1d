"""What a layer keeps for its backward pass, and what it computes again instead.

`none` keeps everything. `selective` keeps what is dear to compute, the products with the weights and attention, and
computes the rest again: norms, adapters' inputs, rotation, the gate. A product with inner dimension K costs K FLOP for
each byte kept in bf16, attention one for every token of context; all else costs a few, but takes as many bytes. `full`
keeps the layer's input alone and computes the whole layer again. All three give the same gradients.
"""

from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from thinksafe.kernels import frozen_linear  # noqa: F401 - registers its operator
from thinksafe.model.config import ModelConfig

Keeping = Literal["none", "selective", "full"]
KEEPING: tuple[Keeping, ...] = get_args(Keeping)
"""From most memory to most time."""

_CHEAP = 128
"""FLOP a byte below which a product is computed again: that of an adapter's B, whose inner dimension is the rank."""

_ATTENTION = ("torch_attn", "flash_attn")
"""Namespaces in which torch and the package flash-attn register variable-length attention."""


def run_layer(layer: nn.Module, keeping: Keeping, *inputs) -> Tensor:
    """The layer's output, with so much kept for its backward pass."""
    if keeping == "none" or not torch.is_grad_enabled():
        return layer(*inputs)
    if keeping == "full":
        return checkpoint(layer, *inputs, use_reentrant=False)
    contexts = partial(create_selective_checkpoint_contexts, partial(_policy, layer.config.intermediate_size))
    return checkpoint(layer, *inputs, use_reentrant=False, context_fn=contexts)


def _policy(last_inner: int, context, op, *args, **kwargs) -> CheckpointPolicy:
    """Keep the products, apart from the layer's last, which nothing reads again."""
    if op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.thinksafe.frozen_linear.default):
        inner = args[0].shape[1] if op.namespace == "thinksafe" else args[-1].shape[0]
        dear = _CHEAP < inner != last_inner
    else:
        dear = op.namespace in _ATTENTION
    return CheckpointPolicy.MUST_SAVE if dear else CheckpointPolicy.PREFER_RECOMPUTE


def kept_bytes(
    config: ModelConfig,
    adapters: tuple[str, ...] | None,
    rank: int,
    dropout: float,
    itemsize: int,
    grouped_heads: bool = False,
) -> dict[Keeping, int]:
    """Bytes that one layer keeps for a token on a GPU.

    Args:
        adapters: projections that carry one; None where every weight is trained.
        rank, dropout: of the adapters.
        itemsize: of activations.
        grouped_heads: whether attention reads keys and values as they are, not repeated for every query head.
    """
    projections = config.projections
    hidden, inner = config.hidden_size, config.intermediate_size
    q, kv = projections["q_proj"][0], projections["k_proj"][0]
    log_sum_exp = 4 * config.num_heads
    low_rank = rank * len(adapters or ())
    # The layer's input and the sum after attention, each with a reciprocal root; queries, keys and values as attention
    # reads them; its output; gate and up.
    keys = kv if grouped_heads else q
    plain = itemsize * (2 * hidden + 2 * q + 2 * keys + 2 * inner) + 2 * 4 + log_sum_exp
    if config.qk_norm:
        plain += itemsize * (q + kv) + 4 * (config.num_heads + config.num_kv_heads)
    if adapters is None:  # what the weights' gradients are formed from; attention's output is there already
        plain += itemsize * (2 * hidden + inner)
    elif dropout:  # each adapter draws its own mask, a byte an element
        inputs = sum(projections[name][1] for name in adapters)
        plain += itemsize * (inputs + low_rank) + inputs
    else:  # adapters share their input
        shared = {"q_proj": "attention", "k_proj": "attention", "v_proj": "attention", "gate_proj": "mlp"}
        read = {shared.get(name, "mlp" if name == "up_proj" else name): projections[name][1] for name in adapters}
        read.pop("o_proj", None)  # attention's output
        plain += itemsize * (sum(read.values()) + low_rank)
    products = 2 * hidden + 2 * q + 2 * kv + 2 * inner + low_rank  # the input, q k v, attention, o, gate and up
    return {"none": plain, "selective": itemsize * products + log_sum_exp, "full": itemsize * hidden}
