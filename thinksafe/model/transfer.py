"""Copies between host and device during which neither waits for the other."""

import numpy as np
import torch
from torch import Tensor


def upload(values: np.ndarray | Tensor, device: torch.device | str) -> Tensor:
    """Return host data as a tensor on the device, without waiting for the copy; on a CPU it may share their memory.
    torch would copy a strided view through memory that is not pinned, so it is made contiguous first."""
    tensor = torch.as_tensor(values).contiguous()
    tensor = tensor.pin_memory() if torch.device(device).type == "cuda" else tensor
    return tensor.to(device, non_blocking=True)


class PendingOutput:
    """Tensors that are being copied to the host; `wait` returns them."""

    def __init__(self, *tensors: Tensor):
        self._event = None
        self._tensors = tensors
        if tensors[0].is_cuda:
            self._tensors = [torch.empty_like(t, device="cpu", pin_memory=True) for t in tensors]
            for host, tensor in zip(self._tensors, tensors, strict=True):
                host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> list[np.ndarray]:
        """Wait until the copies are done, and return them as arrays, in the order of the constructor's arguments."""
        if self._event is not None:
            self._event.synchronize()
        return [tensor.numpy() for tensor in self._tensors]
