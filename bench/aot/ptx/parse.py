"""Read the PTX of one kernel: parameters, registers, labels and instructions with their lines."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from .faults import Fault

_INSTRUCTION = re.compile(r"^(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*);$", re.DOTALL)
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")
_PARAMETER = re.compile(r"\.param\s+\.([usbf]\d+)\b[^,\n]*?(\w+_param_\d+)")
_LOCATION = re.compile(r"//\s*(\S+\.py:\d+)")
_LABEL = re.compile(r"^(\$\w+|\w+):$")


@dataclass(frozen=True)
class Instruction:
    """Hold one instruction: opcode, operands as text, guard, its line of PTX and of Python."""

    opcode: str
    operands: tuple[str, ...]
    guard: str | None = None  # a predicate register, or None
    guard_negated: bool = False
    line: int = 0
    source: str = ""

    def __str__(self) -> str:
        guard = f"@{'!' * self.guard_negated}{self.guard} " if self.guard else ""
        where = f" ({self.source})" if self.source else ""
        return f"line {self.line}: {guard}{self.opcode} {', '.join(self.operands)}{where}"


@dataclass
class Program:
    """Hold one parsed kernel: threads of a block, parameters, instructions, and the index of each label."""

    text: str
    name: str
    threads: int
    parameters: dict[str, str]  # name -> PTX type, in order
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


def parse(text: str) -> Program:
    """Parse the PTX of a module with one kernel.

    Raises:
        Fault: where a line is neither a directive, a label nor an instruction, or a label is missing.
    """
    entry = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)(.*?)\{", text, re.DOTALL)
    if entry is None:
        raise Fault("no .entry in this PTX")
    threads = re.search(r"\.(?:req|max)ntid\s+(\d+)", entry[3])
    program = Program(text, entry[1], int(threads[1]) if threads else 32, _parameters(entry[2]))
    first_line = text.count("\n", 0, entry.end()) + 1
    _read_body(program, text[entry.end() :], first_line)
    for instruction in program.code:
        if instruction.opcode.startswith("bra") and instruction.operands[0] not in program.labels:
            raise Fault(f"no such label, {instruction}")
    return program


def _parameters(text: str) -> dict[str, str]:
    return {name: type_name for type_name, name in _PARAMETER.findall(text)}


def _read_body(program: Program, body: str, first_line: int) -> None:
    """Collect instructions up to the kernel's closing brace; braces of scopes in between are dropped."""
    source, pending, depth = "", "", 1
    for offset, raw in enumerate(body.splitlines()):
        if location := _LOCATION.search(raw):
            source = location[1]
        line = raw.split("//")[0].strip()
        if not line or line.startswith("."):
            continue
        if not pending and line in ("{", "}"):
            depth += 1 if line == "{" else -1
            if depth == 0:
                return
            continue
        if not pending and (label := _LABEL.match(line)):
            program.labels[label[1]] = len(program.code)
            continue
        pending = f"{pending} {line}".strip()
        if pending.endswith(";"):
            program.code.append(_instruction(pending, first_line + offset, source))
            pending = ""
    raise Fault("the kernel's closing brace is missing")


def _instruction(text: str, line: int, source: str) -> Instruction:
    match = _INSTRUCTION.match(text)
    if match is None or ";" in text[:-1]:
        raise Fault(f"line {line}: cannot read {text!r}")
    negated, guard, opcode, operands = match.groups()
    return Instruction(opcode, tuple(_OPERAND.findall(operands)), guard, bool(negated), line, source)


def names_in(operand: str) -> list[str]:
    """Split a braced list such as {%r1, %r2} into its parts; a plain operand is a list of itself."""
    return [part.strip() for part in operand.strip("{} ").split(",")]
