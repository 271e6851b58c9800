"""Read a compiled kernel's machine code: registers, spills, and the instructions of its main loop."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton.backends.nvidia

_TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);")
_MMA = ("HMMA", "IMMA", "HGMMA", "IGMMA", "QGMMA", "OMMA", "QMMA")

# Opcode stems by the pipe that executes them; whatever is not listed is counted as "other".
PIPES = {
    "tensor": _MMA,
    "fp32": ("FFMA", "FMUL", "FADD", "FSEL", "FMNMX", "IMAD", "HADD2", "HMUL2", "HFMA2"),
    "int": (
        *("LOP3", "SHF", "IADD3", "PRMT", "ISETP", "SEL", "LEA", "SGXT", "MOV", "VIADD", "IMNMX", "VIMNMX", "FSETP", "PLOP3"),
        # The packing and the 32-bit conversion of capability 8.6 and later, which do not go to "convert"
        *("F2FP", "I2FP"),
    ),
    "convert": ("I2F", "F2I", "F2F", "I2I", "MUFU"),
    "shared": ("LDS", "STS", "LDSM", "STSM"),
    "async": ("LDGSTS", "UBLKCP", "UTMALDG"),
    "global": ("LDG", "STG"),
    "local": ("LDL", "STL"),
    "control": ("BAR", "DEPBAR", "LDGDEPBAR", "BRA", "WARPSYNC", "SYNCS", "WARPGROUP", "CALL", "NOP"),
}


@dataclass(frozen=True)
class MachineCode:
    """Hold what one kernel compiled to: registers per thread, all opcodes, and its main loop's.

    The main loop of a kernel without loops is the whole of it. `mma_waits` counts the places in the main loop where a warpgroup waits until all its products are done, so that nothing
    else it does overlaps with them.
    """

    registers: int
    opcodes: Counter
    loop: Counter
    mma_waits: int = 0

    @property
    def spills(self) -> int:
        """Count local-memory loads and stores anywhere in the kernel."""
        return sum(n for opcode, n in self.opcodes.items() if stem(opcode) in PIPES["local"])

    @property
    def mma(self) -> str:
        """Name the commonest tensor-core opcode of the kernel ("" where there is none)."""
        names = [opcode for opcode in self.opcodes if stem(opcode) in _MMA]
        return max(names, key=lambda name: self.opcodes[name], default="")

    def by_pipe(self) -> dict[str, int]:
        """Count the main loop's instructions by pipe."""
        counts = dict.fromkeys([*PIPES, "other"], 0)
        owner = {name: pipe for pipe, names in PIPES.items() for name in names}
        for opcode, n in self.loop.items():
            counts[owner.get(stem(opcode), "other")] += n
        return counts

    def count(self, *stems: str) -> int:
        """Count the main loop's instructions whose opcode stem is one of `stems`."""
        return sum(n for opcode, n in self.loop.items() if stem(opcode) in stems)


def stem(opcode: str) -> str:
    """Return the opcode without its modifiers."""
    return opcode.split(".")[0]


def read(cubin: bytes) -> MachineCode:
    """Disassemble a cubin with the tools inside the triton wheel."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        Path(path).write_bytes(cubin)
        listing = _run("cuobjdump", "-sass", "-res-usage", path)
    instructions = [
        (int(match[1], 16), match[2], match[3]) for line in listing.splitlines() if (match := _INSTRUCTION.match(line))
    ]
    loop = _main_loop(instructions) or instructions
    return MachineCode(
        registers=int(re.search(r"REG:(\d+)", listing)[1]),
        opcodes=Counter(opcode for _, opcode, _ in instructions),
        loop=Counter(opcode for _, opcode, _ in loop),
        mma_waits=sum(_waits_for_products(opcode, operands) for _, opcode, operands in loop),
    )


def _waits_for_products(opcode: str, operands: str) -> bool:
    return opcode == "WARPGROUP.DEPBAR.LE" and operands.split()[-1] == "0x0"


def _main_loop(instructions: list[tuple[int, str, str]]) -> list[tuple[int, str, str]]:
    """Return the longest body of an innermost backward branch; of loops with MMAs where there are any."""
    bodies = []
    for address, opcode, operands in instructions:
        target = re.search(r"\b0x([0-9a-f]+)\b", operands) if stem(opcode) == "BRA" else None
        if target and int(target[1], 16) < address:
            bodies.append([entry for entry in instructions if int(target[1], 16) <= entry[0] <= address])
    with_mma = [body for body in bodies if any(stem(op) in _MMA for _, op, _ in body)]
    loops = with_mma or bodies
    innermost = [body for body in loops if not any(_inside(other, body) for other in loops)]
    return max(innermost, key=len, default=[])


def _inside(inner: list[tuple[int, str, str]], outer: list[tuple[int, str, str]]) -> bool:
    return len(inner) < len(outer) and outer[0][0] <= inner[0][0] and inner[-1][0] <= outer[-1][0]


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([str(_TOOLS / tool), *arguments], capture_output=True, text=True, check=True).stdout
