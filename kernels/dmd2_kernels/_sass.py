"""Statistics of a compiled kernel from its cubin: registers, spills, and memory instructions by width."""

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import triton

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[0-9T]+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)
_BITS = re.compile(r"\.(?:[US]?(8|16|32|64|128|256))(?:\.|$)")
_DOUBLE = re.compile(r"^(DADD|DMUL|DFMA|DSETP|DMNMX|MUFU\.\w+64\w*|F2F\.F64\S*|F2F\.\S*F64|[IU]2F\.F64\S*)")


class Statistics(NamedTuple):
    """Counts of one kernel's machine code; loads and stores are global ones, as {bits: instructions}."""

    registers: int
    shared_bytes: int
    spills: int  # local loads and stores
    loads: dict[int, int]
    stores: dict[int, int]
    doubles: int
    atomics: int
    instructions: int


def _run(tool: str, *args: str) -> str:
    return subprocess.run([str(_TOOLS / tool), *args], check=True, capture_output=True, text=True).stdout


def _widths(opcodes: Counter[str], name: str) -> dict[int, int]:
    """The number of instructions `name` by bits per thread; without a suffix 32."""
    widths: Counter[int] = Counter()
    for opcode, count in opcodes.items():
        if opcode.split(".")[0] == name:
            found = _BITS.search(opcode)
            widths[int(found.group(1)) if found else 32] += count
    return dict(sorted(widths.items()))


def statistics(cubin: bytes) -> Statistics:
    """Read a cubin with the tools bundled with triton."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _run("cuobjdump", "--dump-resource-usage", str(path))
        text = _run("nvdisasm", "-c", str(path))
    opcodes = Counter(_INSTRUCTION.findall(text))
    if not opcodes:
        raise RuntimeError("nvdisasm printed no instruction that _sass.py recognises; its format has changed")
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    return Statistics(
        registers=used["REG"],
        shared_bytes=used["SHARED"],
        spills=sum(n for o, n in opcodes.items() if o.split(".")[0] in ("LDL", "STL")),
        loads=_widths(opcodes, "LDG"),
        stores=_widths(opcodes, "STG"),
        doubles=sum(n for o, n in opcodes.items() if _DOUBLE.match(o)),
        atomics=sum(n for o, n in opcodes.items() if o.split(".")[0] in ("ATOM", "ATOMG", "RED", "REDG")),
        instructions=sum(n for o, n in opcodes.items() if not o.startswith("NOP")),
    )


MAX_REGISTERS = 128
INSTRUCTIONS_PER_SPILL = 200
"""ptxas 13.3 moves a loop invariant or two out of a full register file for sm_100: 2 to 8 of 2,000 instructions."""


class Compiled(NamedTuple):
    """One kernel compiled for one call; read_bytes and written_bytes are the minimum traffic of one program's tile."""

    case: str
    kernel: str
    dtype: str
    arch: int
    num_warps: int
    read_bytes: int
    written_bytes: int
    moved_bytes: int  # by the whole launch: each tensor once, or twice if it is read twice
    code: Statistics

    def faults(self) -> list[str]:
        """The reasons for which `--check` fails."""
        code, threads = self.code, 32 * self.num_warps
        found = [
            f"{count} {what}"
            for count, what in (
                (code.spills if code.spills * INSTRUCTIONS_PER_SPILL > code.instructions else 0, "spill instructions"),
                (code.doubles, "float64 instructions"),
                (code.atomics, "atomics"),
            )
            if count
        ]
        if code.registers > MAX_REGISTERS:
            found.append(f"{code.registers} registers, more than {MAX_REGISTERS}")
        if "ragged" in self.case:
            return found
        for what, needed, widths in (
            ("read", self.read_bytes, code.loads),
            ("written", self.written_bytes, code.stores),
        ):
            wide = sum(bits // 8 * count for bits, count in widths.items() if bits >= 128) * threads
            if needed >= 16 * threads and wide < needed:
                found.append(f"{wide} of {needed} bytes {what} in 128 bits or more: {widths}")
        return found
