"""Accelerators as data: peaks, memory and links as their makers publish them. Nothing here is measured speed."""

import math
import re
from dataclasses import dataclass

from exaone_jax.errors import ConfigError

_GIB, _MIB = 2**30, 2**20


@dataclass(frozen=True)
class Chip:
    """One accelerator.

    Attributes:
        flops: dense bfloat16 peak, FLOP/s.
        hbm_bytes: what a program may use. TPU: the limit that libtpu 0.0.48.1 states when a program is too large for it.
            GPU: total memory as nvidia-smi reports it; driver and CUDA context take a few hundred MiB of it.
        hbm_bandwidth: bytes/s.
        link_bandwidth: bytes/s that the chip can send to its neighbours over all links at once (ICI, NVLink), one way: half
            of the bidirectional figure that makers publish.
        dcn_bandwidth: bytes/s that the chip's share of its host's network cards sends to other slices, one way; of a v5e and
            a v6e that of a pod over its 256 chips. 0 for a GPU: of those there are no slices here.
        devices: jax devices on a chip. They share the figures above evenly.
        dimensions: of the torus, 0 for a GPU.
        max_chips: of the largest slice.
    """

    name: str
    flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    link_bandwidth: float
    dcn_bandwidth: float
    source: str
    devices: int = 1
    dimensions: int = 0
    max_chips: int = 0

    @property
    def hbm_bytes_per_device(self) -> int:
        return self.hbm_bytes // self.devices


_TPU = "docs.cloud.google.com/tpu/docs/"
_NVIDIA = "NVIDIA data sheet, SXM, dense: "

CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", 197e12, int(15.75 * _GIB), 819e9, 200e9, 25e9 / 8, _TPU + "v5e", dimensions=2, max_chips=256),
        Chip("v5p", 459e12, int(95.73 * _GIB), 2765e9, 600e9, 50e9 / 8, _TPU + "v5p", dimensions=3, max_chips=6144),
        Chip("v6e", 918e12, int(31.24 * _GIB), 1638e9, 400e9, 100e9 / 8, _TPU + "v6e", dimensions=2, max_chips=256),
        Chip(
            "tpu7x",
            2307e12,
            int(189.48 * _GIB),
            7380e9,
            600e9,
            100e9 / 8,
            _TPU + "tpu7x",
            2,
            dimensions=3,
            max_chips=9216,
        ),
        Chip("a100-40", 312e12, 40960 * _MIB, 1555e9, 300e9, 0, _NVIDIA + "A100 40GB"),
        Chip("a100-80", 312e12, 81920 * _MIB, 2039e9, 300e9, 0, _NVIDIA + "A100 80GB"),
        Chip("h100", 989e12, 81559 * _MIB, 3350e9, 450e9, 0, _NVIDIA + "H100"),
        Chip("h200", 989e12, 143771 * _MIB, 4800e9, 450e9, 0, _NVIDIA + "H200"),
        Chip("b200", 2250e12, 183359 * _MIB, 8000e9, 900e9, 0, _NVIDIA + "HGX B200"),
    )
}


def chip_named(name: str) -> Chip:
    """Raises ConfigError that lists the chips known."""
    if name not in CHIPS:
        raise ConfigError(f"chip: found {name!r}, expected one of {', '.join(CHIPS)}")
    return CHIPS[name]


@dataclass(frozen=True)
class Topology:
    """A slice of TPU chips, `v5p:4x4x8`, or several that a data-centre network joins, `4xv6e:16x16`."""

    chip: Chip
    sides: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        """Of all slices."""
        return self.slices * math.prod(self.sides)

    @property
    def devices(self) -> int:
        return self.chips * self.chip.devices

    @property
    def one_slice(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.sides))}"

    def __str__(self) -> str:
        return f"{self.slices}x{self.one_slice}" if self.slices > 1 else self.one_slice

    @classmethod
    def parse(cls, text: str) -> "Topology":
        """Raises ConfigError that says which topologies exist."""
        kind, _, shape = text.partition(":")
        count, name = ("1", kind) if kind in CHIPS else kind.partition("x")[::2]
        tpus = [chip.name for chip in CHIPS.values() if chip.dimensions]
        if name not in tpus or not re.fullmatch("[1-9][0-9]{0,3}", count):
            raise ConfigError(
                f"topology: found {text!r}, expected TPU:SHAPE or SLICESxTPU:SHAPE with a TPU of {', '.join(tpus)} and at "
                "least one slice: v5p:4x4x4, 4xv6e:16x16"
            )
        chip = CHIPS[name]
        sides = tuple(map(int, shape.split("x"))) if re.fullmatch(r"\d+(x\d+)+", shape) else ()
        if sides not in topologies(chip):
            known = [str(cls(chip, known)) for known in topologies(chip)]
            shown = known if len(known) <= 16 else [*known[:12], "…", *known[-2:]]
            raise ConfigError(f"topology: {text!r} does not exist; {name} has {', '.join(shown)}{_rule(chip)}")
        return cls(chip, sides, int(count))


def topologies(chip: Chip) -> list[tuple[int, ...]]:
    """The slices of a TPU that exist and fill whole hosts, smallest first."""
    if chip.dimensions == 2:
        return [(2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)]
    cubes = range(4, 33, 4)
    large = [(a, b, c) for a in cubes for b in cubes for c in cubes if a <= b <= c and a * b * c <= chip.max_chips]
    return [(2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), *sorted(large, key=lambda sides: (math.prod(sides), sides[-1]))]


def _rule(chip: Chip) -> str:
    if chip.dimensions == 2:
        return ""
    return f": from 4x4x4 on, sides in order, each a multiple of 4, at most {chip.max_chips:,} chips"
