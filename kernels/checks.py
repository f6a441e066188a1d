"""What operations ask of their input, in one place: a message names the argument, what it is, and what it should be.

Shapes, dtypes, devices and layout are known while torch.compile traces, and these checks vanish from the graph. What
lies in a tensor, or where it lies, is looked at inside registered operators, where nothing is traced: on a GPU the
device itself asserts values, since a wait for it would cost a step its run-ahead.
"""

from __future__ import annotations

import torch
from torch import Tensor


def check_tensor(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, strided: bool = True
) -> None:
    """Exactly this shape, dtype and device; contiguous unless it may be `strided`.

    Raises:
        TypeError: no tensor.
        ValueError: naming what it is and what it should be.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, found {type(tensor).__name__}")
    if tensor.shape != shape or tensor.dtype != dtype or tensor.device != device:
        raise ValueError(
            f"{name} must be {dtype} {list(shape)} on {device}; "
            f"found {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
        )
    if not (strided or tensor.is_contiguous()):
        raise ValueError(f"{name} must be contiguous; found strides {list(tensor.stride())} of {list(tensor.shape)}")


def check_floating(name: str, tensor: Tensor) -> None:
    """A tensor of floating-point numbers, of whatever shape.

    Raises:
        TypeError: no tensor.
        ValueError: of another kind.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, found {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise ValueError(f"{name} must be floating point, found {tensor.dtype}")


def check_number(name: str, value: float, least: float, below: float = float("inf"), whole: bool = False) -> None:
    """A plain number in [least, below), whole where it must be.

    Raises:
        TypeError: no number.
        ValueError: outside, NaN included.
    """
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        raise TypeError(f"{name} must be a {'whole ' if whole else ''}number, found {_described(value)}")
    if not least <= value < below:
        raise ValueError(f"{name} must lie in [{least}, {below}), found {value}")


def check_choice(name: str, value: str | bool | None, *choices: str | bool | None) -> None:
    """One of these very values.

    Raises:
        ValueError: another.
    """
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        listed = [choice if isinstance(choice, str) else repr(choice) for choice in choices]
        raise ValueError(f"{name} must be {', '.join(listed[:-1])} or {listed[-1]}, found {value!r}")


def check_head(x: Tensor, weight: Tensor, x_name: str = "x", weight_name: str = "weight") -> None:
    """Hidden states [T, H] and the language-model head [V, H] that reads them.

    Raises:
        TypeError: no tensors; for a module, what to pass instead.
        ValueError: naming the first thing that does not fit.
    """
    if isinstance(weight, torch.nn.Module):
        if any("lora_" in key or "adapter" in key for key, _ in weight.named_parameters()):
            raise TypeError(f"{weight_name} is a head with an adapter on it, whose logits are not x Wᵀ: merge it first")
        raise TypeError(f"{weight_name} must be the head's [V, H] tensor, found {type(weight).__name__}: pass .weight")
    for name, tensor in ((x_name, x), (weight_name, weight)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, found {type(tensor).__name__}")
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1] or 0 in weight.shape:
        raise ValueError(
            f"{x_name} must be [T, H] and {weight_name} [V, H] with H and V at least 1; "
            f"found {list(x.shape)} and {list(weight.shape)}"
        )
    # exp(z - z_y) passes the largest float16 when one logit is 11 nats above the target's.
    if x.dtype not in (torch.bfloat16, torch.float32) or weight.dtype != x.dtype:
        raise ValueError(
            f"{x_name} and {weight_name} must both be bfloat16 or both float32; found {x.dtype} and {weight.dtype}"
        )
    if x.device != weight.device:
        raise ValueError(f"{x_name} is on {x.device}, {weight_name} on {weight.device}")
    if not weight.is_contiguous():
        raise ValueError(f"{weight_name} must be contiguous; a view of a larger tensor cannot be the head")


def check_token_ids(name: str, token_ids: Tensor, x: Tensor, shape: tuple[int, ...]) -> None:
    """int64 of this shape beside x; one id a row at least.

    Raises:
        TypeError, ValueError: as `check_tensor`.
    """
    check_tensor(name, token_ids, shape, torch.int64, x.device)
    if 0 in shape[1:]:
        raise ValueError(f"{name} must name at least one token a row; found {list(shape)}")


def row_weights(token_weight: Tensor | None, x: Tensor) -> Tensor:
    """The loss's weight of each row of x, [T] fp32: token_weight, or ones.

    Raises:
        TypeError, ValueError: it is no constant of one finite, non-negative number a row.
    """
    if token_weight is None:
        return x.new_ones(len(x), dtype=torch.float32)
    if not isinstance(token_weight, Tensor) or not token_weight.is_floating_point():
        raise TypeError(f"token_weight must be a floating-point tensor, found {_described(token_weight)}")
    check_tensor("token_weight", token_weight, x.shape[:1], token_weight.dtype, x.device)
    if token_weight.requires_grad:
        raise ValueError("token_weight is a constant and gets no gradient: detach it, or weight reduction='none'")
    return _row_weights(token_weight)


def _described(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def check_once(operation: str, *grad_gradients: Tensor | None) -> None:
    """For the backward pass of operators whose outputs include their own gradients: those are constants.

    Raises:
        RuntimeError: somebody differentiates them.
    """
    if any(gradient is not None for gradient in grad_gradients):
        raise RuntimeError(f"{operation} can be differentiated once: its gradient has no gradient")


@torch.library.custom_op("thinksafe::row_weights", mutates_args=())
def _row_weights(token_weight: Tensor) -> Tensor:
    weights = token_weight.to(torch.float32, copy=True)
    fine = torch.isfinite(weights) & (weights >= 0)
    _require(fine.all(), "token_weight must be finite and not negative; reduction='none' takes any weight")
    return weights


@_row_weights.register_fake
def _(token_weight):
    return torch.empty_like(token_weight, dtype=torch.float32)


def check_range(name: str, token_ids: Tensor, vocab_size: int) -> None:
    """Every id a row of the head. For the inside of operators.

    Raises:
        ValueError: an id outside [0, vocab_size); on a GPU the device asserts it.
    """
    fine = ((token_ids >= 0) & (token_ids < vocab_size)).all()
    _require(fine, f"{name} holds a token id outside [0, {vocab_size})")


def _require(fine: Tensor, message: str) -> None:
    if fine.is_cuda:
        torch._assert_async(fine, message)
    elif not fine:
        raise ValueError(message)


def check_tma(**tensors: Tensor) -> None:
    """What the tensor memory accelerator asks of a matrix: base and rows at multiples of 16 bytes. For the inside of
    operators.

    Raises:
        ValueError: naming the tensor.
    """
    for name, tensor in tensors.items():
        H = tensor.shape[1]
        if H * tensor.element_size() % 16:
            raise ValueError(f"a row of {name} must be a multiple of 16 bytes; H is {H} of {tensor.dtype}")
        if tensor.data_ptr() % 16:
            raise ValueError(f"{name} must start at a multiple of 16 bytes; it is a view: pass a clone")
