"""HTML pages that need no network: one file, images inside it, legible on light and dark screens."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence

_STYLE = """
:root{color-scheme:light dark;--ink:#222;--faint:#6b6b6b;--line:#ddd;--paper:#fff}
@media(prefers-color-scheme:dark){:root{--ink:#e4e4e4;--faint:#a0a0a0;--line:#444;--paper:#181818}}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:980px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem;margin:0}h2{font-size:1.15rem;margin:2.2rem 0 .3rem}
img{max-width:100%;height:auto;background:#fff}.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:.92rem}
td,th{padding:.25rem .8rem .25rem 0;text-align:left;border-bottom:1px solid var(--line);vertical-align:top}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
.key{font-size:1.1rem;margin:.6rem 0}.faint{color:var(--faint);font-size:.9rem}details{margin-top:2rem}
"""


def document(title: str, parts: Iterable[str]) -> str:
    """Return the page of a plain-text title and parts that are HTML already."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>{"".join(parts)}</body></html>\n'
    )


def image(png: bytes, alt: str) -> str:
    """Return a PNG as an image inside the page."""
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def table(heads: Sequence[str], rows: Iterable[Sequence[object]], numbers: Sequence[str] = ()) -> str:
    """Return a table of plain texts; the columns that `numbers` names stand at the right."""
    places = [" class=n" if head in numbers else "" for head in heads]
    top = "".join(f"<th{place}>{html.escape(head)}</th>" for place, head in zip(places, heads, strict=True))
    lines = (
        "".join(f"<td{place}>{html.escape(str(cell))}</td>" for place, cell in zip(places, row, strict=True)) for row in rows
    )
    return f'<div class="wide"><table><tr>{top}</tr>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'
