"""Write docs/formats.md from the registry, or check that it is up to date.

python tools/write_formats_page.py            # write
python tools/write_formats_page.py --check    # exit code 1 and a diff where the page is behind
"""

from __future__ import annotations

import difflib
import sys
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent / "docs" / "formats.md"
sys.path.insert(0, str(PAGE.parent.parent))

from flux_kernels.cli._format_facts import facts_in_words, geometry, tiles_in_words
from flux_kernels.formats import FORMATS, PLAIN_TYPES, BlockFormat, describe, draw_layout

HEAD = """\
# Block types

<!-- Written by tools/write_formats_page.py from flux_kernels/formats; `make tables` writes it anew, `make lint` checks it. -->

One section a type, in the order of ggml's numbers: the formula of a weight, the bytes of a block and what the kernels make of it. `flux-kernels formats`
shows the same as a table and as JSON, `flux-kernels formats Q4_K` one of them.

- A row of a weight is whole blocks. K-quants, IQ and TQ types have blocks of 256 weights (superblocks), the others of 32 to 128.
- Names are ggml's: `d` and `dmin` are scales of the block, `sc` and `m` of a sub-block, `q` the code of a weight; `qs`, `ql`, `qh` and `hmask` hold codes, a
  `grid` holds vectors of weights. Numbers are little-endian; `2 x f16` are two half-precision floats.
- Boxes are about as wide as fields are long; above each is its offset in bytes.
- Two types of one size differ in error and speed: the error is a bound, of the relative RMS error of quantizing gaussian weights.
- Kernels have default tiles. Where a default does not serve a type, its section says what runs instead and why (`flux_kernels/kernels/odd_tiles.csv`).
"""


def page() -> str:
    """Return the whole page."""
    return "\n".join([HEAD, summary(), "", *map(section, FORMATS.values()), plain_types()])


def summary() -> str:
    """Return the table of all types, densest last, each with a link to its section."""
    lines = ["| type | bits/weight | weights a block | bytes a block | formula |", "|---|---|---|---|---|"]
    for fmt in sorted(FORMATS.values(), key=lambda fmt: -fmt.bits_per_weight):
        cells = f"{fmt.bits_per_weight:g}", str(fmt.block_size), str(fmt.type_size), f"`{describe(fmt).formula}`"
        lines.append(f"| [{fmt.name}](#{fmt.name.lower()}) | {' | '.join(cells)} |")
    return "\n".join(lines)


def section(fmt: BlockFormat) -> str:
    """Return the section of one type."""
    facts = describe(fmt)
    quantizer = "own" if facts.own_quantizer else "libggml's, where installed"
    words = facts_in_words(fmt, quantizer)
    parts = [
        f"## {fmt.name}",
        f"`{facts.formula}`: {facts.codes}.",
        f"{geometry(fmt)}.",
        f"```text\n{draw_layout(fmt.layout)}\n```",
        *([facts.notes.replace("*", r"\*")] if facts.notes else []),
        "\n".join(f"- **{title}**: {phrase}" for title, phrase in words.items()),
        "\n".join(["Tiles:", "", *(f"- {phrase}" for phrase in tiles_in_words(fmt))]),
    ]
    return "\n\n".join(parts) + "\n"


def plain_types() -> str:
    """Return the section of the types without blocks."""
    lines = ["## Plain types", "", "One weight a block, in torch's dtype.", "", "| type | ggml type | torch |", "|---|---|---|"]
    lines += [f"| {plain.name} | {plain.ggml_type} | `{plain.dtype}` |" for plain in PLAIN_TYPES.values()]
    return "\n".join(lines) + "\n"


def main(check: bool) -> int:
    """Write the page, or compare it with what would be written; return the exit code."""
    new = page()
    if not check:
        PAGE.write_text(new, encoding="utf-8")
        return 0
    old = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else ""
    behind = list(difflib.unified_diff(old.splitlines(), new.splitlines(), PAGE.name, "should be", lineterm=""))
    if behind:
        print("\n".join([*behind, "docs/formats.md is behind the registry. Run: make tables"]))
    return 1 if behind else 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
