"""Argument checks that the operations share. An error names the argument, what it must be and what was found.

Shapes, dtypes, devices and strides are known while torch.compile traces, so their checks leave nothing in the graph.
Values and addresses of tensors are checked inside registered operators, which torch.compile does not trace. On a GPU a
device-side assert checks the values: if the host read them, it would have to wait for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor


def check_tensor(
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    allow_strided: bool = True,
) -> None:
    """Check that a tensor has exactly this shape, dtype and device.

    Args:
        name: name of the argument in error messages.
        allow_strided: accept any strides; False requires a contiguous tensor.

    Raises:
        TypeError: `tensor` is not a tensor.
        ValueError: the shape, dtype or device differs, or the tensor is not contiguous although it must be.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, found {type(tensor).__name__}")
    if tensor.shape != shape or tensor.dtype != dtype or tensor.device != device:
        raise ValueError(
            f"{name} must be {dtype} {list(shape)} on {device}; "
            f"found {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
        )
    if not (allow_strided or tensor.is_contiguous()):
        raise ValueError(f"{name} must be contiguous; found strides {list(tensor.stride())} of {list(tensor.shape)}")


def check_floating(name: str, tensor: Tensor) -> None:
    """Check that an argument is a tensor of a floating-point dtype, of any shape.

    Args:
        name: name of the argument in error messages.

    Raises:
        TypeError: `tensor` is not a tensor.
        ValueError: its dtype is not floating point.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, found {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise ValueError(f"{name} must be floating point, found {tensor.dtype}")


def check_number(name: str, value: float, low: float, high: float = float("inf"), integer: bool = False) -> None:
    """Check that a value is a Python int or float with low <= value < high.

    With the default `high` every finite value from `low` on is valid, and infinity is not.

    Args:
        name: name of the argument in error messages.
        integer: require an int; a float such as 2.0 is then invalid.

    Raises:
        TypeError: `value` is a bool, or no int or float (no int if `integer`).
        ValueError: `value` is outside the range or NaN.
    """
    if isinstance(value, bool) or not isinstance(value, int if integer else (int, float)):
        raise TypeError(f"{name} must be a {'whole ' if integer else ''}number, found {_type_name(value)}")
    if not low <= value < high:
        raise ValueError(f"{name} must lie in [{low}, {high}), found {value}")


def check_choice(name: str, value: str | bool | None, *choices: str | bool | None) -> None:
    """Check that a value equals one of the choices and has the type of that choice, so 1 is not True.

    Args:
        name: name of the argument in error messages.
        choices: two or more valid values.

    Raises:
        ValueError: no choice has this value and type.
    """
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        names = [choice if isinstance(choice, str) else repr(choice) for choice in choices]
        raise ValueError(f"{name} must be {', '.join(names[:-1])} or {names[-1]}, found {value!r}")


def check_head(x: Tensor, weight: Tensor, x_name: str = "x", weight_name: str = "weight") -> None:
    """Check that hidden states x and the weight matrix of a language-model head fit together.

    Args:
        x: must be [T, H] in bf16 or fp32; T may be 0, and any strides are valid.
        weight: must be [V, H], V and H at least 1, contiguous, in the dtype and on the device of x.
        x_name, weight_name: names of the two arguments in error messages.

    Raises:
        TypeError: an argument is not a tensor; if weight is a module, the message says what to pass instead.
        ValueError: a shape, dtype, device or stride is invalid.
    """
    if isinstance(weight, torch.nn.Module):
        if any("lora_" in key or "adapter" in key for key, _ in weight.named_parameters()):
            raise TypeError(f"{weight_name} is a head with an adapter, so its logits are not x Wᵀ: merge the adapter")
        raise TypeError(f"{weight_name} must be the head's [V, H] tensor, found {type(weight).__name__}: pass .weight")
    for name, tensor in ((x_name, x), (weight_name, weight)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, found {type(tensor).__name__}")
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


def check_token_ids(name: str, token_ids: Tensor, x: Tensor, shape: tuple[int, ...]) -> None:
    """Check dtype, shape and device of token ids. `check_token_id_range` checks their values.

    Args:
        name: name of the argument in error messages.
        token_ids: must be int64, on the device of x.
        shape: required shape, [T] or [T, K] with K at least 1; T may be 0.

    Raises:
        TypeError: `token_ids` is not a tensor.
        ValueError: the shape, dtype or device differs, or K is 0.
    """
    check_tensor(name, token_ids, shape, torch.int64, x.device)
    if 0 in shape[1:]:
        raise ValueError(f"{name} must hold at least one token id per row; found {list(shape)}")


def row_weights(token_weight: Tensor | None, x: Tensor) -> Tensor:
    """Return the loss weight of each row of x, [T] fp32: a checked copy of `token_weight`, or ones if it is None.

    Args:
        token_weight: [T] in a floating-point dtype, on the device of x, finite, not negative, without gradient.
        x: [T, H] hidden states; only their number and device are read.

    Raises:
        TypeError: `token_weight` is not a floating-point tensor.
        ValueError: its shape or device is wrong, it requires a gradient, or it holds a negative, infinite or NaN
            element. On a GPU a device-side assert checks the elements instead.
    """
    if token_weight is None:
        return x.new_ones(len(x), dtype=torch.float32)
    if not isinstance(token_weight, Tensor) or not token_weight.is_floating_point():
        raise TypeError(f"token_weight must be a floating-point tensor, found {_type_name(token_weight)}")
    check_tensor("token_weight", token_weight, x.shape[:1], token_weight.dtype, x.device)
    if token_weight.requires_grad:
        raise ValueError("token_weight is a constant and gets no gradient: detach it, or use reduction='none'")
    return row_weights_op(token_weight)


def _type_name(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def check_no_second_derivative(operation: str, *grads_of_gradients: Tensor | None) -> None:
    """Check that no gradient flows into those outputs of an operator that are gradients themselves.

    An operator that returns its own gradients calls this in its backward pass, because it has no second derivative.

    Args:
        operation: name of the operation in the error message.
        grads_of_gradients: what autograd passes for each of these outputs; None if no gradient flows into it.

    Raises:
        RuntimeError: one of them is not None, so a second derivative is requested.
    """
    if any(gradient is not None for gradient in grads_of_gradients):
        raise RuntimeError(f"{operation} can be differentiated once: its gradient has no gradient")


@torch.library.custom_op("thinksafe::row_weights", mutates_args=())
def row_weights_op(token_weight: Tensor) -> Tensor:
    weights = token_weight.to(torch.float32, copy=True)
    is_valid = torch.isfinite(weights) & (weights >= 0)
    _require(is_valid.all(), "token_weight must be finite and not negative; for other weights use reduction='none'")
    return weights


@row_weights_op.register_fake
def _(token_weight):
    return torch.empty_like(token_weight, dtype=torch.float32)


def check_token_id_range(name: str, token_ids: Tensor, vocab_size: int) -> None:
    """Check that every id is in [0, vocab_size). Call it inside registered operators only.

    Args:
        name: name of the argument in the error message.
        token_ids: int64, any shape.

    Raises:
        ValueError: an id is outside. On a GPU a device-side assert fails instead, and the host does not wait.
    """
    is_valid = ((token_ids >= 0) & (token_ids < vocab_size)).all()
    _require(is_valid, f"{name} holds a token id outside [0, {vocab_size})")


def _require(condition: Tensor, message: str) -> None:
    if condition.is_cuda:
        torch._assert_async(condition, message)
    elif not condition:
        raise ValueError(message)


def check_tma_alignment(**tensors: Tensor) -> None:
    """Check that the tensor memory accelerator (TMA) can read each matrix. Call it inside registered operators only.

    The base address and the bytes of a row must be multiples of 16.

    Args:
        tensors: name of an argument in error messages -> its matrix, contiguous.

    Raises:
        ValueError: TMA cannot read a tensor; the message names it.
    """
    for name, tensor in tensors.items():
        H = tensor.shape[1]
        if H * tensor.element_size() % 16:
            raise ValueError(f"a row of {name} must be a multiple of 16 bytes; found H = {H} in {tensor.dtype}")
        if tensor.data_ptr() % 16:
            raise ValueError(f"{name} must start at a multiple of 16 bytes; this view does not: pass a clone")
