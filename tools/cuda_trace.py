# SPDX-License-Identifier: BSD-3-Clause
"""What one warp of a kernel issues, from its machine code: the trace that the timing model replays.

The first lane's integers, predicates and addresses are computed as the device would, so that every
branch goes where it goes; what a load returns is made up (weights of 1, logits of 0), and what a
number's value does not decide is not followed further than it must be. A branch on something that
is not known is an error, never a guess. Other lanes are taken to go where the first one goes.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass

from sass import Instruction, Kernel
from sass_lane import (
    MASK,
    Lane,
    Launch,
    Value,
    bits_of,
    double_bits_of,
    double_of,
    float_of,
    signed,
)

RETURN = re.compile(r"R(\d+)")


@dataclass(frozen=True)
class Step:
    instruction: Instruction
    taken: bool  # its predicate held
    address: int | None = None  # of a load or a store


COMPARE: dict[str, Callable[[float, float], bool]] = {
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b and a == a and b == b,
    "LTU": lambda a, b: not a >= b,
    "LEU": lambda a, b: not a > b,
    "GTU": lambda a, b: not a <= b,
    "GEU": lambda a, b: not a < b,
    "NEU": lambda a, b: a != b,
    "NUM": lambda a, b: a == a and b == b,
    "NAN": lambda a, b: a != a or b != b,
}


class Warp(Lane):
    """Runs the first lane of a warp."""

    def __init__(
        self,
        kernel: Kernel,
        launch: Launch,
        warp: int,
        block: int,
        load: Callable[[int, int], int],  # (address, bytes): what a load finds
        shared: dict[int, Value],  # the words of the block's shared memory
    ) -> None:
        super().__init__(kernel, launch, warp, block)
        self.load, self.shared = load, shared
        self.steps: list[Step] = []

    def run(self, most: int = 1_000_000) -> list[Step]:
        at = 0
        while at is not None and len(self.steps) < most:
            if at >= len(self.kernel.code):
                break
            instruction = self.kernel.code[at]
            taken = True
            if instruction.predicate:
                found = self.predicate(instruction.predicate)
                if found is None and instruction.base in ("BRA", "EXIT", "RET", "CALL", "BAR"):
                    raise SystemExit(
                        f"cuda_trace: {self.kernel.name}: cannot tell whether @"
                        f"{instruction.predicate} {instruction.opcode} (instruction {at}) is taken"
                    )
                taken = found is not False
            following: int | None = at + 1
            address = None
            if taken:
                if instruction.base == "EXIT":
                    following = None
                elif instruction.base == "BRA":
                    following = self.branch(instruction, at)
                elif instruction.base == "CALL":
                    following = self.kernel.target(instruction)
                elif instruction.base == "RET":
                    following = self.returned(instruction)
                else:
                    address = self.execute(instruction)
            self.steps.append(Step(instruction, taken, address))
            if following is None:
                break
            at = following
        return self.steps

    def branch(self, instruction: Instruction, at: int) -> int:
        target = self.kernel.target(instruction)
        assert target is not None, instruction
        if ".DIV" in instruction.opcode:  # taken where lanes of the warp have gone apart
            return at + 1
        for operand in instruction.operands[:-1]:  # BRA P0, label: a second condition
            found = self.predicate(operand)
            if found is None:
                raise SystemExit(f"cuda_trace: {self.kernel.name}: cannot tell {instruction}")
            if not found:
                return at + 1
        return target

    def returned(self, instruction: Instruction) -> int:
        found = RETURN.match(instruction.operands[0])
        assert found is not None
        value = self.registers.get(found[0])
        if value is None:
            raise SystemExit(
                f"cuda_trace: {self.kernel.name}: cannot tell where {instruction} goes"
            )
        return value // 16

    def execute(self, i: Instruction) -> int | None:
        """Does what it does to registers and predicates; the address of a load or a store."""
        if i.base in ("LDG", "STG", "LDS", "STS", "LD", "ST", "LDL", "STL", "ATOMG", "RED"):
            return self.memory(i)
        method = getattr(self, "do_" + i.base.removeprefix("U").lower(), None)
        if method is None:
            method = getattr(self, "do_" + i.base.lower(), None)
        if method is not None:
            method(i, list(i.operands))
        elif i.operands and re.match(r"U?R\d", i.operands[0]):
            self.forget(i)
        elif i.operands and re.match(r"U?P\d", i.operands[0]):
            self.write_predicate(i.operands[0], None)
        return None

    def forget(self, i: Instruction) -> None:
        """Floats in halves and the like: nothing branches on them."""
        self.write(i.operands[0], None)
        if i.base.startswith("D") or ".64" in i.opcode or "WIDE" in i.opcode:
            self.write_wide(i.operands[0], None)

    def memory(self, i: Instruction) -> int | None:
        place = next(x for x in i.operands if "[" in x and not x.startswith("c["))
        inside = place.rsplit("[", 1)[1].rstrip("]")
        total: Value = 0
        for term in inside.split("+"):
            if term.startswith("-0x") or term.startswith("0x"):
                part: Value = int(term, 16)
            else:
                part = self.wide(term) if ".64" in term else self.read(term.split(".")[0])
            total = None if total is None or part is None else total + part
        parts = i.opcode.split(".")
        size = 16 if "128" in parts else 8 if "64" in parts else 2 if "U16" in parts else 4
        size = 1 if "U8" in parts or "S8" in parts else size
        words = range(max(1, size // 4))
        if i.base.startswith("LD"):
            name = i.operands[0].removesuffix(".reuse")
            found: list[Value] = [None for _ in words]
            if i.base == "LDG" and total is not None:
                loaded = self.load(total, size)
                found = [loaded >> 32 * k & MASK for k in words]
            elif i.base == "LDS" and total is not None:
                found = [self.shared.get(total + 4 * k) for k in words]
            for k, word in enumerate(found):
                if name != "RZ":
                    self.write(self.next(name, k), word)
        elif i.base == "STS" and total is not None:
            name = i.operands[-1].removesuffix(".reuse")
            for k in words:
                word = 0 if name == "RZ" else self.registers.get(self.next(name, k))
                self.shared[total + 4 * k] = word
        return total

    @staticmethod
    def split(o: list[str]) -> tuple[str, list[str], list[str]]:
        """The register that is written, the predicates written beside it, the rest."""
        written = []
        rest = o[1:]
        while rest and re.fullmatch(r"U?P[0-9T]", rest[0]):
            written.append(rest.pop(0))
        return o[0], written, rest

    def do_mov(self, i: Instruction, o: list[str]) -> None:
        self.write(o[0], self.read(o[1]))

    def do_umov(self, i: Instruction, o: list[str]) -> None:
        self.do_mov(i, o)

    def do_r2ur(self, i: Instruction, o: list[str]) -> None:
        self.write(o[0], self.read(o[-1]))

    def do_cs2r(self, i: Instruction, o: list[str]) -> None:
        self.write_wide(o[0], 0 if o[1] == "SRZ" else None)

    def do_s2r(self, i: Instruction, o: list[str]) -> None:
        special = {"SR_TID.X": self.warp * 32, "SR_CTAID.X": self.block, "SR_LANEID": 0}
        special |= {"SR_CgaCtaId": 0}
        self.write(o[0], special.get(o[1], 0))

    do_s2ur = do_s2r

    def do_ldc(self, i: Instruction, o: list[str]) -> None:
        place = o[1].replace("[RZ]", "[0x0]")
        at = re.fullmatch(r"c\[0x0\]\[(?:U?R\d+\+)?(0x[0-9a-f]+)\]", place)
        if at is None:
            return self.forget(i)
        parts = i.opcode.split(".")
        if "64" in parts:
            return self.write_wide(o[0], self.constant(int(at[1], 16), 8))
        size = 1 if "U8" in parts or "S8" in parts else 2 if "U16" in parts else 4
        return self.write(o[0], self.constant(int(at[1], 16), size))

    def do_ldcu(self, i: Instruction, o: list[str]) -> None:
        self.do_ldc(i, o)

    def do_iadd3(self, i: Instruction, o: list[str]) -> None:
        register, carries, rest = self.split(o)
        terms = [self.integer(x) for x in rest[:3]]
        if ".X" in i.opcode:
            terms += [None if (p := self.predicate(x)) is None else int(p) for x in rest[3:]]
        known = [t for t in terms if t is not None]
        total = sum(known) if len(known) == len(terms) else None
        # ~x counts as a whole number here and carries what it carries
        self.write(register, total)
        for k, name in enumerate(carries):
            self.write_predicate(name, None if total is None else total >> 32 > k)

    def do_viadd(self, i: Instruction, o: list[str]) -> None:
        a, b = self.integer(o[1]), self.integer(o[2])
        self.write(o[0], None if a is None or b is None else a + b)

    def do_imad(self, i: Instruction, o: list[str]) -> None:
        register, carries, rest = self.split(o)
        parts = i.opcode.split(".")
        a, b = self.integer(rest[0]), self.integer(rest[1])
        c = self.wide(rest[2]) if "WIDE" in parts or "HI" in parts else self.integer(rest[2])
        carry = self.predicate(rest[3]) if "X" in parts and len(rest) > 3 else False
        total: Value = None
        if a is not None and b is not None and c is not None and carry is not None:
            a, b = a & MASK, b & MASK
            if "U32" not in parts:
                a, b = signed(a), signed(b)
            total = a * b + c + int(carry)
        if "WIDE" in parts:
            self.write_wide(register, total)
        elif "HI" in parts:
            self.write(register, None if total is None else total >> 32)
        else:
            self.write(register, total)
        if carries:
            overflow = None if total is None else not 0 <= total < 1 << 64
            self.write_predicate(carries[0], overflow)

    def do_lea(self, i: Instruction, o: list[str]) -> None:
        register, carries, rest = self.split(o)
        parts = i.opcode.split(".")
        a, b = self.integer(rest[0]), self.integer(rest[1])
        carry: bool | None = False
        if "X" in parts:
            carry = self.predicate(rest[-1])
            rest = rest[:-1]
        shift = self.read(rest[-1])
        high: Value = 0
        if "HI" in parts:
            if "SX32" in parts:
                high = None if a is None else MASK if a & 0x80000000 else 0
            else:
                high = self.integer(rest[2]) if len(rest) > 3 else 0
        if a is None or b is None or shift is None or carry is None or high is None:
            self.write(register, None)
            total = None
        elif "HI" in parts:
            total = ((high << 32 | a & MASK) << shift >> 32 & MASK) + b + int(carry)
        else:
            total = ((a & MASK) << shift & MASK) + b + int(carry)
        self.write(register, total)
        if carries:
            self.write_predicate(carries[0], None if total is None else total >> 32 > 0)

    def do_shf(self, i: Instruction, o: list[str]) -> None:
        """A shift of the 64 bits high:low; the upper half of it, or the lower one."""
        parts = i.opcode.split(".")
        low, shift, high = (self.integer(x) for x in o[1:4])
        both_halves = "W" in parts or "U64" in parts or "S64" in parts
        if "R" in parts and "HI" in parts and not both_halves:
            low = 0  # takes no part
        elif "L" in parts and "HI" not in parts and not both_halves:
            high = 0
        if low is None or shift is None or high is None:
            return self.write(o[0], None)
        high &= MASK
        if "S32" in parts or "S64" in parts:
            high = signed(high)
        both = high << 32 | low & MASK
        both = both << min(shift, 64) if "L" in parts else both >> min(shift, 64)
        return self.write(o[0], both >> 32 if "HI" in parts else both)

    def do_lop3(self, i: Instruction, o: list[str]) -> None:
        predicate = o.pop(0) if re.fullmatch(r"U?P[0-9T]", o[0]) else None
        a, b, c = (self.integer(x) for x in o[1:4])
        table = int(o[4], 16)
        result: Value = 0
        for k in range(8):
            if table >> k & 1 and result is not None:
                term = MASK
                for bit, value in ((4, a), (2, b), (1, c)):
                    if value is None:
                        # known after all where the table does not ask
                        if (table >> (k ^ bit) & 1) == 1:
                            continue
                        term = None  # type: ignore[assignment]
                        break
                    term &= value if k & bit else value ^ MASK
                result = None if term is None else result | term
        self.write(o[0], result)
        if predicate is not None:
            self.write_predicate(predicate, None if result is None else result & MASK != 0)

    def combine(self, i: Instruction, o: list[str], result: bool | None) -> None:
        """P0, P1 = result and (or) what the last predicate says."""
        other = self.predicate(o[4]) if len(o) > 4 else True
        either = "OR" in i.opcode.split(".")
        if result is None or other is None:
            decided = other is True if either else other is False
            value = (either and result is not False) if decided else None
            if result is either:
                value = either
        else:
            value = (result or other) if either else (result and other)
        self.write_predicate(o[0], value)
        if o[1] not in ("PT", "UPT"):
            self.write_predicate(o[1], None)

    def do_isetp(self, i: Instruction, o: list[str]) -> None:
        parts = i.opcode.split(".")
        a, b = self.integer(o[2]), self.integer(o[3])
        result: bool | None = None
        if a is not None and b is not None:
            a, b = a & MASK, b & MASK
            if "U32" not in parts:
                a, b = signed(a), signed(b)
            name = next(p for p in parts[1:] if p in COMPARE)
            result = COMPARE[name](a, b)
            if "EX" in parts:
                lower = self.predicate(o[5])
                if name == "NE":
                    result = True if a != b else lower
                else:
                    result = lower if a == b else (False if name == "EQ" else result)
        self.combine(i, o, result)

    def do_fsetp(self, i: Instruction, o: list[str]) -> None:
        a, b = self.number(o[2]), self.number(o[3])
        name = next(p for p in i.opcode.split(".")[1:] if p in COMPARE)
        self.combine(i, o, None if a is None or b is None else COMPARE[name](a, b))

    def do_dsetp(self, i: Instruction, o: list[str]) -> None:
        a, b = self.wide_number(o[2]), self.wide_number(o[3])
        name = next(p for p in i.opcode.split(".")[1:] if p in COMPARE)
        self.combine(i, o, None if a is None or b is None else COMPARE[name](a, b))

    def do_plop3(self, i: Instruction, o: list[str]) -> None:
        values = [self.predicate(x) for x in o[2:5]]
        if any(v is None for v in values):
            return self.write_predicate(o[0], None)
        index = sum(int(bool(v)) << (2 - k) for k, v in enumerate(values))
        return self.write_predicate(o[0], bool(int(o[5], 16) >> index & 1))

    def do_sel(self, i: Instruction, o: list[str]) -> None:
        chosen = self.predicate(o[3])
        a, b = self.integer(o[1]), self.integer(o[2])
        self.write(o[0], (a if a == b else None) if chosen is None else a if chosen else b)

    do_fsel = do_sel

    def do_vimnmx(self, i: Instruction, o: list[str]) -> None:
        a, b, least = self.integer(o[1]), self.integer(o[2]), self.predicate(o[-1])
        if a is None or b is None or least is None:
            return self.write(o[0], None)
        key = (lambda x: x) if "U32" in i.opcode else signed
        pick = min if least else max
        return self.write(o[0], pick(a & MASK, b & MASK, key=key))

    do_imnmx = do_vimnmx

    def do_hmnmx2(self, i: Instruction, o: list[str]) -> None:
        """The larger of halves: ordered as integers are, but for the sign."""
        values = [self.integer(x.split(".H")[0]) for x in o[1:] if "P" not in x]
        if any(v is None for v in values):
            return self.write(o[0], None)
        least = self.predicate(next(x for x in o[1:] if "P" in x))

        def key(half: int) -> int:
            return -(half & 0x7FFF) if half & 0x8000 else half

        pick = min if least else max
        low, high = (
            pick((v >> s & 0xFFFF for v in values if v is not None), key=key) for s in (0, 16)
        )
        return self.write(o[0], high << 16 | low)

    do_vhmnmx = do_hmnmx2

    def do_prmt(self, i: Instruction, o: list[str]) -> None:
        a, selector, b = (self.integer(x) for x in o[1:4])
        if selector is None or (a is None and b is None):
            return self.write(o[0], None)
        # A register that was never written gets its halves one by one.
        a, b = a or 0, b or 0
        both = (b & MASK) << 32 | a & MASK
        result = 0
        for k in range(4):
            choice = selector >> 4 * k & 15
            byte = both >> 8 * (choice & 7) & 255
            result |= (
                (255 if byte & 128 else 0 if choice & 8 else byte) << 8 * k
                if choice & 8
                else byte << 8 * k
            )
        return self.write(o[0], result)

    def do_hfma2(self, i: Instruction, o: list[str]) -> None:
        """HFMA2 R, -RZ, RZ, high, low: how a constant is loaded."""
        if o[1] != "-RZ" or o[2] != "RZ" or len(o) < 5:
            return self.write(o[0], None)
        high, low = (struct.unpack("<H", struct.pack("<e", float(x)))[0] for x in o[3:5])
        return self.write(o[0], high << 16 | low)

    def arithmetic(self, o: list[str], function: Callable[..., float]) -> None:
        values = [self.number(x) for x in o[1:]]
        if any(v is None for v in values):
            return self.write(o[0], None)
        try:
            return self.write(o[0], bits_of(function(*values)))
        except (ValueError, OverflowError, ZeroDivisionError):
            return self.write(o[0], 0x7FFFFFFF)

    def do_fadd(self, i: Instruction, o: list[str]) -> None:
        self.arithmetic(o, lambda a, b: a + b)

    def do_fmul(self, i: Instruction, o: list[str]) -> None:
        self.arithmetic(o[:3], lambda a, b: a * b)

    def do_ffma(self, i: Instruction, o: list[str]) -> None:
        self.arithmetic(o[:4], lambda a, b, c: a * b + c)

    def do_fmnmx(self, i: Instruction, o: list[str]) -> None:
        least = self.predicate(o[3])
        self.arithmetic(o[:3], min if least else max)

    def do_fchk(self, i: Instruction, o: list[str]) -> None:
        """Whether a division needs the slow way: of subnormal numbers alone."""
        self.write_predicate(o[0], False)

    def do_mufu(self, i: Instruction, o: list[str]) -> None:
        if i.opcode == "MUFU.RCP64H":  # from the upper half of a double to that of about 1/x
            high = self.read(o[1])
            x = None if high is None else double_of(high << 32)
            return self.write(o[0], double_bits_of(1 / x) >> 32 if x else None)
        functions: dict[str, Callable[[float], float]] = {
            "EX2": lambda x: 2.0**x if x < 128 else math.inf,
            "RCP": lambda x: 1 / x if x else math.inf,
            "LG2": lambda x: math.log2(x) if x > 0 else -math.inf,
        }
        function = functions.get(i.opcode.split(".")[1])
        if function is None:
            return self.write(o[0], None)
        return self.arithmetic(o[:2], function)

    def do_i2f(self, i: Instruction, o: list[str]) -> None:
        if "64" in i.opcode:
            return self.forget(i)
        a = self.integer(o[1])
        if a is None:
            return self.write(o[0], None)
        a &= MASK
        # .RP: up, so that a reciprocal is never too large
        x = float(a if "U32" in i.opcode else signed(a))
        bits = bits_of(x)
        return self.write(o[0], bits + 1 if ".RP" in i.opcode and float_of(bits) < x else bits)

    do_i2fp = do_i2f

    def do_f2i(self, i: Instruction, o: list[str]) -> None:
        if "64" in i.opcode:
            return self.forget(i)
        a = self.number(o[1])
        if a is None or a != a or abs(a) == math.inf:
            return self.write(o[0], None)
        return self.write(o[0], max(0, min(MASK, int(a))) if "U32" in i.opcode else int(a))

    def do_f2f(self, i: Instruction, o: list[str]) -> None:
        if "F64.F32" in i.opcode:
            a = self.number(o[1])
            return self.write_wide(o[0], None if a is None else double_bits_of(a))
        if "F32.F64" in i.opcode:
            a = self.wide_number(o[1])
            return self.write(o[0], None if a is None else bits_of(a))
        return self.write(o[0], None)

    def wide_arithmetic(self, o: list[str], function: Callable[..., float]) -> None:
        values = [self.wide_number(x) for x in o[1:]]
        if any(v is None for v in values):
            return self.write_wide(o[0], None)
        try:
            return self.write_wide(o[0], double_bits_of(function(*values)))
        except (ValueError, OverflowError):
            return self.write_wide(o[0], None)

    def do_dadd(self, i: Instruction, o: list[str]) -> None:
        self.wide_arithmetic(o, lambda a, b: a + b)

    def do_dmul(self, i: Instruction, o: list[str]) -> None:
        self.wide_arithmetic(o, lambda a, b: a * b)

    def do_dfma(self, i: Instruction, o: list[str]) -> None:
        self.wide_arithmetic(o, lambda a, b, c: a * b + c)

    def do_shfl(self, i: Instruction, o: list[str]) -> None:
        """All lanes are taken to hold the same."""
        self.write_predicate(o[0], True)
        self.write(o[1], self.read(o[2]))
