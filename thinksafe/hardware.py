"""Rates and memory of GPUs; no other file holds such figures.

Only the H200 was measured: a large copy through torch and a bf16 matmul of 8192 x 8192 matrices reach 0.90 and 0.80 of
the rates in its data sheet. We assume the same shares for the other GPUs.
"""

from dataclasses import dataclass

import torch

from thinksafe.errors import UserError


@dataclass(frozen=True)
class Hardware:
    """Rates and memory of one GPU.

    Attributes:
        name: short name, the value of `--gpu`.
        bytes_per_second: memory rate that a large copy reaches, bytes read plus bytes written.
        flop_per_second: rate that a large bf16 matmul reaches.
        peak_flop_per_second: dense bf16 rate of the data sheet; MFU is a share of it.
        memory_bytes: memory that torch can allocate.
        link_bytes_per_second: rate from neighboring GPUs by the data sheet: NVLink in one direction, or PCIe.
        measured: whether both reached rates were measured.
    """

    name: str
    bytes_per_second: float
    flop_per_second: float
    peak_flop_per_second: float
    memory_bytes: int
    link_bytes_per_second: float
    measured: bool


def _from_data_sheet(name: str, bytes_per_second: float, peak: float, gib: float, link: float) -> Hardware:
    """Return a GPU that reaches the H200's shares of its data sheet's rates; torch can allocate `gib` GiB."""
    rates = (4.3e12 / 4.8e12 * bytes_per_second, 790e12 / 989e12 * peak, peak)
    return Hardware(name, *rates, int(gib * 2**30), link, measured=False)


_GPUS = {
    "NVIDIA H200": Hardware("H200", 4.3e12, 790e12, 989e12, 139 * 2**30, 450e9, measured=True),
    "NVIDIA H100 80GB HBM3": _from_data_sheet("H100", 3.35e12, 989e12, 79, 450e9),
    "NVIDIA A100-SXM4-80GB": _from_data_sheet("A100", 2.039e12, 312e12, 79, 300e9),
    "NVIDIA L40S": _from_data_sheet("L40S", 0.864e12, 362e12, 44, 32e9),
    "NVIDIA GeForce RTX 4090": _from_data_sheet("RTX4090", 1.008e12, 165e12, 23.5, 32e9),
}
"""GPUs by the name that torch reports."""

GPU_NAMES = tuple(hardware.name for hardware in _GPUS.values())
"""Short names of all GPUs in the table, the values of `--gpu`."""


def hardware_of(device: torch.device) -> Hardware | None:
    """Return rates and memory of the device's GPU; None for a CPU and for a GPU that is not in the table."""
    return _GPUS.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def hardware_named(name: str) -> Hardware:
    """Return a GPU of the table by its short name; case, spaces and the words NVIDIA and GeForce do not matter. Raise a
    UserError if the table has no such GPU."""
    short_name = name.upper().replace(" ", "").removeprefix("NVIDIA").removeprefix("GEFORCE")
    for hardware in _GPUS.values():
        if hardware.name == short_name:
            return hardware
    raise UserError(f"--gpu {name}: unknown GPU; choose one of {', '.join(GPU_NAMES)}")
