"""The scaffold of a new format registers a working file."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_scaffolded_format_works_in_a_copy_of_the_package(tmp_path):
    """`tools/new_format.py`, in a copy, makes a type that decodes like the Q8_0 it starts from.

    A second run refuses.
    """
    shutil.copytree(
        ROOT / "flux_kernels", tmp_path / "flux_kernels", ignore=shutil.ignore_patterns("demo_model", "__pycache__")
    )
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "new_format.py", tmp_path / "tools")
    command = [sys.executable, "tools/new_format.py", "Q7_X", "--ggml-type", "99"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    check = (
        "import torch; from flux_kernels.formats import FORMATS, describe; from flux_kernels import dequantize;"
        "data = torch.randint(0, 120, (3, 68), dtype=torch.uint8);"
        "assert torch.equal(dequantize(data, 'Q7_X'), dequantize(data, 'Q8_0')); assert len(FORMATS) == 26; assert describe(FORMATS['Q7_X']).formula == 'x = d * q'"
    )
    subprocess.run([sys.executable, "-c", check], cwd=tmp_path, check=True)
    registry = (tmp_path / "flux_kernels" / "formats" / "__init__.py").read_text()
    assert registry.replace("    q7_x,\n", "") == (ROOT / "flux_kernels" / "formats" / "__init__.py").read_text()
    assert "    q7_x,\n)\n\nFORMATS" in registry  # at the end of the tuple, formatted
    taken = subprocess.run(
        [*command[:2], "Q8_X", "--ggml-type", "8"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert taken.returncode != 0 and "q8_0.py" in taken.stderr
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert again.returncode != 0 and "exists already" in again.stderr
