"""Argument checks that the operations share. An error names the argument, what it must be and what was found.

A check takes the name of the argument first, and raises TypeError for a wrong Python type, else ValueError. Shapes,
dtypes, devices and strides are known while torch.compile traces, so their checks leave nothing in the graph. Values and
addresses of tensors are checked inside registered operators, which torch.compile does not trace. On a GPU a device-side
assert checks the values: if the host read them, it would have to wait for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _check_is_tensor(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, found {type(tensor).__name__}")


def check_tensor(
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    allow_strided: bool = True,
) -> None:
    """Check that a tensor has exactly this shape, dtype and device and, without `allow_strided`, is contiguous."""
    _check_is_tensor(name, tensor)
    if tensor.shape != shape or tensor.dtype != dtype or tensor.device != device:
        raise ValueError(
            f"{name} must be {dtype} {list(shape)} on {device}; "
            f"found {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
        )
    if not (allow_strided or tensor.is_contiguous()):
        raise ValueError(f"{name} must be contiguous; found strides {list(tensor.stride())} of {list(tensor.shape)}")


def check_floating(name: str, tensor: Tensor) -> None:
    """Check that an argument is a tensor of a floating-point dtype, of any shape."""
    _check_is_tensor(name, tensor)
    if not tensor.is_floating_point():
        raise ValueError(f"{name} must be floating point, found {tensor.dtype}")


def check_number(name: str, value: float, low: float) -> None:
    """Check that a value is a finite Python int or float, not a bool, and at least `low`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, found {type(value).__name__}")
    if not low <= value < float("inf"):
        raise ValueError(f"{name} must lie in [{low}, inf), found {value}")


def check_choice(name: str, value: str, *choices: str) -> None:
    """Check that a value is one of two or more choices."""
    if value not in choices:
        raise ValueError(f"{name} must be {', '.join(choices[:-1])} or {choices[-1]}, found {value!r}")


def check_head(x: Tensor, weight: Tensor, x_name: str = "x", weight_name: str = "weight") -> None:
    """Check hidden states [T, H] and a language-model head's weight matrix [V, H], contiguous, with H and V at least 1.

    Both must be in bf16 or both in fp32, on one device. If weight is a module, the message says what to pass instead.
    """
    if isinstance(weight, torch.nn.Module):
        if any("lora_" in key or "adapter" in key for key, _ in weight.named_parameters()):
            raise TypeError(f"{weight_name} is a head with an adapter, so its logits are not x Wᵀ: merge the adapter")
        raise TypeError(f"{weight_name} must be the head's [V, H] tensor, found {type(weight).__name__}: pass .weight")
    _check_is_tensor(x_name, x)
    _check_is_tensor(weight_name, weight)
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1] or 0 in weight.shape:
        raise ValueError(
            f"{x_name} must be [T, H] and {weight_name} [V, H] with H and V at least 1; "
            f"found {list(x.shape)} and {list(weight.shape)}"
        )
    # float16 is excluded: exp(z - z_y) overflows when one logit is 11 nats above the target's logit.
    if x.dtype not in (torch.bfloat16, torch.float32) or weight.dtype != x.dtype:
        raise ValueError(
            f"{x_name} and {weight_name} must both be bfloat16 or both float32; found {x.dtype} and {weight.dtype}"
        )
    if x.device != weight.device:
        raise ValueError(f"{x_name} is on {x.device}, {weight_name} on {weight.device}")
    if not weight.is_contiguous():
        raise ValueError(f"{weight_name} must be contiguous; found strides {list(weight.stride())}: pass a copy")


def check_token_id_range(name: str, token_ids: Tensor, vocab_size: int) -> None:
    """Check that every id is in [0, vocab_size); call it inside registered operators only."""
    is_valid = ((token_ids >= 0) & (token_ids < vocab_size)).all()
    message = f"{name} holds a token id outside [0, {vocab_size})"
    if is_valid.is_cuda:
        torch._assert_async(is_valid, message)
    elif not is_valid:
        raise ValueError(message)


def check_tma_alignment(**tensors: Tensor) -> None:
    """Check that the tensor memory accelerator (TMA) can read contiguous matrices, given by the name of the argument.

    The base address and the bytes of a row must be multiples of 16. Call it inside registered operators only.
    """
    for name, tensor in tensors.items():
        H = tensor.shape[1]
        if H * tensor.element_size() % 16:
            raise ValueError(f"a row of {name} must be a multiple of 16 bytes; found H = {H} in {tensor.dtype}")
        if tensor.data_ptr() % 16:
            raise ValueError(f"{name} must start at a multiple of 16 bytes; this view does not: pass a clone")
