"""Show progress in one way: what is being done, a bar, how much is done, time taken, time left."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def progress(console: Console, *amount: ProgressColumn, shown: bool = True) -> Progress:
    """Return a progress display, to be used as a context; it vanishes when that ends.

    Off a terminal nothing is shown, so that logs hold no bars.

    Args:
        console: where it is drawn.
        amount: columns that tell how much is done, such as a count or a share.
        shown: False for a process that is to stay silent.
    """
    times = TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        *amount,
        *times,
        console=console,
        transient=True,
        disable=not (shown and console.is_terminal),
    )
