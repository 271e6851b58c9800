"""The table of modes: its rows are all that choosing, tuning, recording and launching know of a mode."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flux_kernels import kernels
from flux_kernels.compute import COMPUTE_MODES
from flux_kernels.formats import FORMATS, Packed
from flux_kernels.kernels import record
from flux_kernels.kernels.choice import candidates, choose, default_choice
from flux_kernels.kernels.modes import MODES
from flux_kernels.kernels.problem import Call
from flux_kernels.machine.tune_jobs import Job, Operands

from .samples import finite_rows

Q4_K = FORMATS["Q4_K"]
CARD = (8, 6), 82


def test_every_mode_of_the_library_has_a_row():
    assert MODES.keys() == COMPUTE_MODES.keys()


@pytest.mark.parametrize("like", MODES)
def test_a_mode_is_added_by_a_row(like, monkeypatch, device):
    """A row under a new name is chosen for, tuned, recorded and launched as its functions say."""
    new = f"new, like {like}"  # choices and hashes are kept by name
    monkeypatch.setitem(MODES, new, replace(MODES[like]))
    assert default_choice(new, Q4_K, 512, 3072, 3072, *CARD[:1]) == default_choice(like, Q4_K, 512, 3072, 3072, *CARD[:1])
    tried = candidates(new, Call(Q4_K, 512, 3072, 3072, *CARD))
    assert tried == candidates(like, Call(Q4_K, 512, 3072, 3072, *CARD))
    for algorithm, tile, rows in tried:
        data = dict(compute=new, format="Q4_K", m=512, n=3072, k=3072, algorithm=algorithm, tile=tile and vars(tile), rows=rows)
        record._row(data | dict(ms=1.0, default_ms=1.0, triton="", kernel_hash="", dtype="bfloat16"))
    assert record.kernel_hash(new, Q4_K) == record.kernel_hash(like, Q4_K)
    data, _ = finite_rows("Q4_K", 24)
    weight, x = Packed(data.to(device), Q4_K), torch.randn(20, 512, device=device)
    assert torch.equal(kernels.linear(x, weight, None, new), kernels.linear(x, weight, None, like))
    operands = Operands(Job(new, "Q4_K", 20, 24, 512), device, torch.float32)
    chosen = choose(new, Q4_K, 20, 24, 512, device, torch.float32)
    candidate = candidates(new, Call(Q4_K, 20, 24, 512, None, 1, torch.float32))[0]
    assert (candidate.algorithm, candidate.tile) == (chosen.algorithm, chosen.tile)
    assert operands.error(operands.runner(candidate)()) < 0.03


def test_only_the_table_speaks_of_a_mode_by_name():
    """No other file of kernels, and none of tuning, has a string that is a mode's name."""
    kernels_folder = Path(kernels.__file__).parent
    files = [*kernels_folder.glob("*.py"), *(kernels_folder.parent / "machine").glob("tune*.py")]
    assert [path.name for path in files if spoken(path) & MODES.keys()] == ["modes.py"]


def spoken(path: Path) -> set[str]:
    """Return the strings in a file's code."""
    tree = ast.parse(path.read_text())
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
