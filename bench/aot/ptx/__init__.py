"""Run the PTX of compiled kernels in numpy, without a GPU, and fault where a GPU would go wrong.

    program = Executable(parse(ptx))
    y = Buffer.empty((m, n), np.float32)
    launch(program, (blocks,), [Buffer(x), y, m, n], shared_bytes)
    y.result()

`driver.absent_card` goes one step further: inside it the library's own launches compile for a card that is not here and run so.
docs/decisions/ptx-interpreter.md says what this can show and what it cannot.
"""

from .block import Executable
from .faults import Fault
from .launch import Buffer, Pointer, launch
from .parse import parse
from .threads import Counts

__all__ = ["Buffer", "Counts", "Executable", "Fault", "Pointer", "launch", "parse"]
