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
        cycles_per_second: clock of the core, to turn cycles of a static schedule into time; None if it is not known.
    """

    name: str
    platform: str
    flops_per_second: float
    hbm_bytes_per_second: float
    hbm_bytes: int
    interconnect_bytes_per_second: float
    source: str
    cycles_per_second: float | None = None


# The clock of v5e follows from its peak: four units of 128×128 multiply-adds, 197e12 / (4·128·128·2) per second.
# The memory of a GPU is what its driver reports for the card of 80 GB.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip('v5e', 'tpu', 197e12, 819e9, 16 * GIB, 200e9, 'https://docs.cloud.google.com/tpu/docs/v5e', 1.5e9),
        Chip('v5p', 'tpu', 459e12, 2765e9, 95 * GIB, 600e9, 'https://docs.cloud.google.com/tpu/docs/v5p-training'),
        Chip('v6e', 'tpu', 918e12, 1638e9, 32 * GIB, 400e9, 'https://docs.cloud.google.com/tpu/docs/v6e'),
        Chip('h100', 'cuda', 989.4e12, 3.35e12, 84_942_979_072, 450e9, 'https://www.nvidia.com/en-us/data-center/h100'),
        Chip('a100', 'cuda', 312e12, 2.039e12, 85_100_068_864, 300e9, 'https://www.nvidia.com/en-us/data-center/a100'),
    )
}


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
