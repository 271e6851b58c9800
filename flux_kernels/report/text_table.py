"""Tables as lines of plain text, for reports that are read where nothing draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def aligned(lines: Sequence[Sequence[str]], is_right: Callable[[int, str], bool]) -> list[str]:
    """Return a line of text for each line of cells, columns as wide as their widest cell.

    Args:
        lines: all of one length.
        is_right: tells of a column's number and a cell whether the cell stands at the right of its column.
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def padded(column: int, cell: str) -> str:
        return cell.rjust(widths[column]) if is_right(column, cell) else cell.ljust(widths[column])

    return ["  ".join(padded(*entry) for entry in enumerate(line)).rstrip() for line in lines]
