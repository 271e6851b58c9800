"""Scaffold a new block format: one file in flux_kernels/formats and its name in the registry's tuple.

    python tools/new_format.py Q7_X --ggml-type 99      (or: make new-format NAME=Q7_X TYPE=99)

The file it writes is a complete, working 8-bit format; change fields, formula and both decodes to what the new type is, then run
the tests. Every test, kernel, table and report picks the row up from the registry.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

FORMATS = Path(__file__).parents[1] / "flux_kernels" / "formats"

TEMPLATE = '''"""{name}: x = d * q, 8-bit signed codes, one fp16 scale per 32 weights.

34 bytes per 32 weights, 8.5 bits/weight.
"""

from __future__ import annotations

from torch import Tensor

from .._triton import jit, tl
from ._format import BlockFormat, Field, Layout
from ._tiles import load_bytes, load_half

LAYOUT = Layout(Field("d", "f16"), Field("qs", "i8", 32))
TYPE_SIZE = tl.constexpr(LAYOUT.type_size)
QS = tl.constexpr(LAYOUT.offsets["qs"])


def decode(d: Tensor, qs: Tensor) -> Tensor:
    """Decode blocks: d [..., 1], qs [..., 32] -> float32 [..., 32], with the operations in ggml's order."""
    return qs * d


@jit
def decode_tile(row_ptr, block, i: tl.constexpr, table_ptr, NUM_BLOCKS: tl.constexpr, PLANES: tl.constexpr):
    """Decode slice i (32 weights), counted from `block`, to the same float32 bits as `decode`."""
    d = load_half(row_ptr, block + i, 0, TYPE_SIZE, NUM_BLOCKS, PLANES)
    q = load_bytes(row_ptr, block + i, QS, 32, 0, 32, TYPE_SIZE, NUM_BLOCKS, PLANES).to(tl.int8, bitcast=True)
    return d[:, None] * q.to(tl.float32)


FORMAT = BlockFormat(
    name="{name}",
    ggml_type={ggml_type},
    block_size=32,
    sub_block=32,
    layout=LAYOUT,
    decode=decode,
    decode_tile=decode_tile,
    planes=True,
    relative_rms=0.006,
    source="ggml-common.h block_{lower}",
    about=__doc__,
)
'''


def scaffold(name: str, ggml_type: int, folder: Path = FORMATS) -> Path:
    """Write the format's file and register it.

    Raises FileExistsError where the name is taken, ValueError where it cannot be a module's name.
    """
    if not re.fullmatch(r"[A-Z][A-Z0-9_]*", name):
        raise ValueError(f"A type name is ggml's, in capitals, such as Q4_K; got {name!r}.")
    lower = name.lower()
    path = folder / f"{lower}.py"
    if path.exists():
        raise FileExistsError(f"{path} exists already.")
    taken = [other.name for other in sorted(folder.glob("*.py")) if f"ggml_type={ggml_type}," in other.read_text()]
    if taken:
        raise ValueError(f"{ggml_type} is the ggml type of {taken[0]}. Each type has a number of its own.")
    registry = folder / "__init__.py"
    path.write_text(TEMPLATE.format(name=name, lower=lower, ggml_type=ggml_type))
    registry.write_text(_registered(registry.read_text(), lower))
    return path


def _registered(text: str, module: str) -> str:
    """Add a module to the registry's import and to its tuple."""
    imports = re.search(r"from \. import (\(\n(?P<many>.*?)\)|(?P<one>[^\n]+))\n", text, re.DOTALL)
    names = re.findall(r"\w+", imports["many"] or imports["one"])
    block = "from . import (\n" + "".join(f"    {name},\n" for name in sorted([*names, module])) + ")\n"
    text = text.replace(imports[0], block)
    return re.sub(
        r"(_FORMAT_FILES = \(\n(?:.|\n)*?)\n\)", lambda match: match[1].rstrip(", ") + f",\n    {module},\n)", text, count=1
    )


def main() -> None:
    """Parse the command line and scaffold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="ggml's type name, such as Q7_X")
    parser.add_argument("--ggml-type", type=int, required=True, help="ggml's enum value, as stored in GGUF files")
    arguments = parser.parse_args()
    path = scaffold(arguments.name, arguments.ggml_type)
    print(f"Wrote {path} and registered it. Golden vectors: tests/golden (see its README); then run the tests.")


if __name__ == "__main__":
    main()
