"""Published peaks of accelerators, and the time below which a program cannot finish on them."""

from typing import NamedTuple

GIB = 2**30


class Chip(NamedTuple):
    """One accelerator: a TPU chip or a GPU.

    Attributes:
        name: in targets, such as 'v5e'.
        platform: JAX's name of its compiler's platform, 'tpu' or 'cuda'.
        flops_per_second: bfloat16, dense.
        hbm_bytes_per_second: bandwidth of the memory.
        hbm_bytes: size of the memory.
        interconnect_bytes_per_second: sent to other chips of the slice, in one direction: half of the bidirectional
            bandwidth that vendors publish.
        source: of these values.
        device_kinds: JAX's names of devices that have this peak of arithmetic.
        cycles_per_second: clock of the core, to turn cycles of a static schedule into time; None if it is not known.
    """

    name: str
    platform: str
    flops_per_second: float
    hbm_bytes_per_second: float
    hbm_bytes: int
    interconnect_bytes_per_second: float
    source: str
    device_kinds: tuple[str, ...]
    cycles_per_second: float | None = None


_TPU = 'https://docs.cloud.google.com/tpu/docs'
_GPU = 'https://www.nvidia.com/en-us/data-center'
_HOPPER = ('NVIDIA H100 80GB HBM3', 'NVIDIA H200')  # H200: another memory
_AMPERE = ('NVIDIA A100-SXM4-80GB', 'NVIDIA A100-SXM4-40GB', 'NVIDIA A100-PCIE-40GB', 'NVIDIA A100 80GB PCIe')

# The clock of v5e follows from its peak: four units of 128×128 multiply-adds, 197e12 / (4·128·128·2) per second.
# The memory of a GPU is what its driver reports for the card of 80 GB.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip('v5e', 'tpu', 197e12, 819e9, 16 * GIB, 200e9, f'{_TPU}/v5e', ('TPU v5 lite', 'TPU v5e'), 1.5e9),
        Chip('v5p', 'tpu', 459e12, 2765e9, 95 * GIB, 600e9, f'{_TPU}/v5p-training', ('TPU v5', 'TPU v5p')),
        Chip('v6e', 'tpu', 918e12, 1638e9, 32 * GIB, 400e9, f'{_TPU}/v6e', ('TPU v6 lite', 'TPU v6e')),
        Chip('h100', 'cuda', 989.4e12, 3.35e12, 84_942_979_072, 450e9, f'{_GPU}/h100', _HOPPER),
        Chip('a100', 'cuda', 312e12, 2.039e12, 85_100_068_864, 300e9, f'{_GPU}/a100', _AMPERE),
    )
}


def peak_of(device_kind: str) -> float | None:
    """Returns the FLOPs per second, bfloat16 and dense, of a device by JAX's name; None if it is not in the table."""
    return next((chip.flops_per_second for chip in CHIPS.values() if device_kind in chip.device_kinds), None)


class Roofline(NamedTuple):
    """Seconds that a program needs at least for each resource of a chip; the longest binds."""

    compute: float
    hbm: float
    interconnect: float

    @property
    def seconds(self) -> float:
        """The longest of the three: no schedule is faster."""
        return max(self)

    @property
    def bound(self) -> str:
        """The resource that takes the longest."""
        return max(self._fields, key=lambda name: getattr(self, name))


def roofline(chip: Chip, *, flops: int, hbm_bytes: int, sent_bytes: int = 0) -> Roofline:
    """Returns the times of a program on a chip at its published peaks."""
    return Roofline(
        flops / chip.flops_per_second,
        hbm_bytes / chip.hbm_bytes_per_second,
        sent_bytes / chip.interconnect_bytes_per_second,
    )
