"""What a GPU computes, moves and holds: the one place for such figures.

Only the H200 has been measured: a large copy through torch, and a bf16 product of 8192 x 8192 matrices. They reach 0.90
and 0.80 of what its data sheet promises, and of the others the same shares are expected.
"""

from dataclasses import dataclass

import torch

from thinksafe.errors import UserError

_GIB = 2**30
_REACHED_BANDWIDTH, _REACHED_FLOP = 4.3e12 / 4.8e12, 790e12 / 989e12


@dataclass(frozen=True)
class Hardware:
    """One GPU.

    Attributes:
        name: as `--gpu` takes it.
        bytes_per_second, flop_per_second: what a copy and a bf16 product reach.
        peak_flop_per_second: dense bf16 of the data sheet, which MFU is a share of.
        memory_bytes: that torch can allocate.
        link_bytes_per_second: from its neighbours, by the data sheet: NVLink one way, or PCIe.
        measured: whether the rates were measured, or expected from the data sheet.
    """

    name: str
    bytes_per_second: float
    flop_per_second: float
    peak_flop_per_second: float
    memory_bytes: int
    link_bytes_per_second: float
    measured: bool


def _from_data_sheet(name: str, bytes_per_second: float, flop_per_second: float, gib: float, link: float) -> Hardware:
    rates = (_REACHED_BANDWIDTH * bytes_per_second, _REACHED_FLOP * flop_per_second)
    return Hardware(name, *rates, flop_per_second, int(gib * _GIB), link, measured=False)


_GPUS = {
    "NVIDIA H200": Hardware("H200", 4.3e12, 790e12, 989e12, int(139 * _GIB), 450e9, measured=True),
    "NVIDIA H100 80GB HBM3": _from_data_sheet("H100", 3.35e12, 989e12, 79, 450e9),
    "NVIDIA A100-SXM4-80GB": _from_data_sheet("A100", 2.039e12, 312e12, 79, 300e9),
    "NVIDIA L40S": _from_data_sheet("L40S", 0.864e12, 362e12, 44, 32e9),
    "NVIDIA GeForce RTX 4090": _from_data_sheet("RTX4090", 1.008e12, 165e12, 23.5, 32e9),
}
"""By the name that torch gives."""

GPU_NAMES = tuple(hardware.name for hardware in _GPUS.values())


def hardware_of(device: torch.device) -> Hardware | None:
    """The device's figures; None for a CPU and for a GPU that is not in the table."""
    return _GPUS.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def hardware_named(name: str) -> Hardware:
    """A GPU by its short name, in whatever case.

    Raises:
        UserError: it is not in the table.
    """
    wanted = name.upper().replace(" ", "").removeprefix("NVIDIA").removeprefix("GEFORCE")
    for hardware in _GPUS.values():
        if hardware.name == wanted:
            return hardware
    raise UserError(f"--gpu {name}: its figures are not known; choose one of {', '.join(GPU_NAMES)}")
