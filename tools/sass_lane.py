# SPDX-License-Identifier: BSD-3-Clause
"""One lane of a warp: its registers and predicates, and what an operand of an instruction means.

A value that nothing is known of is None.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

from sass import Kernel

MASK = 0xFFFFFFFF

# Where a launch finds its grid and its parameters in constant bank 0, by architecture.
BLOCK_X, GRID_X, PARAMETERS = {"sm_90": (0x0, 0xC, 0x210)}["sm_90"]


@dataclass(frozen=True)
class Launch:
    """As the host code made it: the emulator records them."""

    kernel: str
    grid: int
    block: int
    shared: int
    parameters: bytes


Value = int | None


def float_of(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits & MASK))[0]


def bits_of(x: float) -> int:
    try:
        return struct.unpack("<I", struct.pack("<f", x))[0]
    except OverflowError:
        return 0x7F800000 if x > 0 else 0xFF800000


def signed(x: int) -> int:
    return x - (1 << 32) if x & 0x80000000 else x


def double_of(bits: int) -> float:
    return struct.unpack("<d", struct.pack("<Q", bits))[0]


def double_bits_of(x: float) -> int:
    return struct.unpack("<Q", struct.pack("<d", x))[0]


class Lane:
    def __init__(
        self,
        kernel: Kernel,
        launch: Launch,
        warp: int,
        block: int,
    ) -> None:
        self.kernel, self.launch, self.warp, self.block = kernel, launch, warp, block
        self.registers: dict[str, Value] = {}
        self.predicates: dict[str, bool | None] = {}

    def read(self, name: str) -> Value:
        """A 32-bit operand, without its sign: register, constant, immediate."""
        name = name.removesuffix(".reuse").split(".")[0] if name[0] in "RUcS" else name
        if name in ("RZ", "URZ", "SRZ"):
            return 0
        if name[0] == "R" or name.startswith("UR"):
            return self.registers.get(name)
        if name.startswith("c["):
            return self.constant(int(name.rsplit("[", 1)[1].rstrip("]"), 16), 4)
        if re.fullmatch(r"-?0x[0-9a-f]+", name):
            return int(name, 16) & MASK
        if name in ("+INF", "INF"):
            return 0x7F800000
        if name == "-INF":
            return 0xFF800000
        if "NAN" in name:
            return 0x7FFFFFFF
        return bits_of(float(name))

    def integer(self, operand: str) -> Value:
        """Not reduced to 32 bits where it is negated, so that a sum tells its carry."""
        if operand[0] == "-" and operand[1:2] in ("R", "U", "c"):
            value = self.read(operand[1:])
            return None if value is None else (1 << 32) - value
        if operand[0] == "~":
            value = self.read(operand[1:])
            return None if value is None else value ^ MASK
        return self.read(operand)

    def number(self, operand: str) -> float | None:
        """A float operand, with its sign and its bars."""
        sign = -1.0 if operand[0] == "-" and operand[1:2] in "RUc|" else 1.0
        bare = operand.lstrip("-") if sign < 0 else operand
        size = bare[0] == "|"
        value = self.read(bare.strip("|"))
        if value is None:
            return None
        x = float_of(value)
        return sign * (abs(x) if size else x)

    def wide(self, operand: str) -> Value:
        """Two registers, 64 bits."""
        name = operand.removesuffix(".reuse").removesuffix(".64")
        if name in ("RZ", "URZ"):
            return 0
        if name.startswith("c["):
            return self.constant(int(name.rsplit("[", 1)[1].rstrip("]"), 16), 8)
        if name[0] == "R" or name.startswith("UR"):
            low, high = self.registers.get(name), self.registers.get(self.next(name))
            return None if low is None or high is None else high << 32 | low
        return int(name, 16) if name.startswith(("0x", "-0x")) else double_bits_of(float(name))

    def wide_number(self, operand: str) -> float | None:
        sign = -1.0 if operand[0] == "-" and operand[1:2] in "RUc|" else 1.0
        bare = operand.lstrip("-") if sign < 0 else operand
        value = self.wide(bare.strip("|"))
        if value is None:
            return None
        x = double_of(value)
        return sign * (abs(x) if bare[0] == "|" else x)

    @staticmethod
    def next(name: str, by: int = 1) -> str:
        letters, number = re.fullmatch(r"([A-Z]+)(\d+)", name).groups()  # type: ignore[union-attr]
        return f"{letters}{int(number) + by}"

    def constant(self, at: int, size: int) -> Value:
        parameters = self.launch.parameters
        if at >= PARAMETERS:
            begin = at - PARAMETERS
            return int.from_bytes(parameters[begin : begin + size], "little")
        if at == BLOCK_X:
            return self.launch.block
        if at == GRID_X:
            return self.launch.grid
        return 0

    def predicate(self, name: str) -> bool | None:
        value: bool | None
        bare = name.lstrip("!")
        value = True if bare in ("PT", "UPT") else self.predicates.get(bare)
        return value if value is None else value != name.startswith("!")

    def write(self, name: str, value: Value) -> None:
        name = name.removesuffix(".reuse").split(".")[0]
        if name not in ("RZ", "URZ"):
            self.registers[name] = None if value is None else value & MASK

    def write_wide(self, name: str, value: Value) -> None:
        name = name.removesuffix(".reuse").split(".")[0]
        if name in ("RZ", "URZ"):
            return
        self.write(name, value)
        self.write(self.next(name), None if value is None else value >> 32)

    def write_predicate(self, name: str, value: bool | None) -> None:
        if name not in ("PT", "UPT"):
            self.predicates[name] = value
