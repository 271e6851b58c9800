"""How many rows of a weight are unpacked at a time.

The whole weight, or balanced chunks of whole waves where it is too large.

One product of a whole weight fills the card's multiprocessors best, reads x once, and leaves y contiguous, without which cuBLAS
does not add the bias in its epilogue (torch copies it to y first and multiplies with beta = 1). Writing and reading the
scratch costs a few percent of the product; chunks that stay in L2 were meant to save that and cost more (see
docs/decisions/chunks.md). So chunks only bound the scratch's memory.
"""

from __future__ import annotations

# Bytes that one unpacked weight may take: twice the largest of FLUX.1 in 16 bit (fused linear1, 126 MiB).
MOST_SCRATCH = 256 << 20
# Rows and columns of y that a multiprocessor computes at a time, here and in cuBLAS.
_TILE = 128


def bounded_rows(m: int, n: int, k: int, itemsize: int, processors: int | None) -> int | None:
    """Return the rows of w [N, K] to unpack at a time for y [M, N], None for all.

    The fewest waves within MOST_SCRATCH.

    Args:
        itemsize: bytes of an unpacked weight.
        processors: multiprocessors of the card, None where they are not known.
    """
    if n * k * itemsize <= MOST_SCRATCH:
        return None
    fewest = -(-n * k * itemsize // MOST_SCRATCH)
    sizes = {rows for parts in range(fewest, 2 * fewest + 1) if (rows := _balanced(n, parts)) * k * itemsize <= MOST_SCRATCH}
    # One tile of rows is as little as a product takes.
    if not sizes:
        return min(n, max(_TILE, MOST_SCRATCH // (k * itemsize) // _TILE * _TILE))
    return min(sizes, key=lambda rows: (waves(m, n, rows, processors or 1), -rows))


def candidate_rows(m: int, n: int, k: int, itemsize: int, processors: int | None) -> list[int | None]:
    """List what tuning tries, the default first.

    The whole weight, two balanced halves, and the smallest chunk of whole waves.
    """
    default = bounded_rows(m, n, k, itemsize, processors)
    sizes_tried = [default]
    for rows in (_balanced(n, 2), _wave_rows(m, processors)):
        if rows < n and rows not in sizes_tried and rows * k * itemsize <= MOST_SCRATCH:
            sizes_tried.append(rows)
    return sizes_tried


def waves(m: int, n: int, rows: int | None, processors: int) -> int:
    """Return how many tiles of y [M, N] the busiest multiprocessor computes.

    `rows` of w come at a time (None: all).
    """
    return sum(-(-tiles(m) * tiles(size) // processors) for size in chunk_sizes(n, rows))


def wave_efficiency(m: int, n: int, rows: int | None, processors: int) -> float:
    """Return the share of the multiprocessors' time that is work: y's area over that of all waves' tiles."""
    return m * n / (waves(m, n, rows, processors) * processors * _TILE**2)


def chunks_of(n: int, rows: int | None) -> list[slice]:
    """Return the chunks of N rows, `rows` at a time (None: one)."""
    return [slice(start, min(start + (rows or n), n)) for start in range(0, n, rows or n)]


def chunk_sizes(n: int, rows: int | None) -> list[int]:
    """Return the rows of each chunk of N rows."""
    return [chunk.stop - chunk.start for chunk in chunks_of(n, rows)]


def tiles(size: int) -> int:
    """Return how many tiles cover `size` rows or columns of y."""
    return -(-size // _TILE)


def _balanced(n: int, parts: int) -> int:
    """Return the rows of N in so many equal chunks of whole tiles."""
    return -(-n // (parts * _TILE)) * _TILE


def _wave_rows(m: int, processors: int | None) -> int:
    """Return the fewest rows whose tiles fill two waves."""
    return _TILE * -(-2 * (processors or 1) // tiles(m))
