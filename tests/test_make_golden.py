"""The golden-vector tool writes vectors that this library decodes bit for bit.

It refuses types ggml does not have.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import flux_kernels as fk

pytest.importorskip("libggml", reason="the tool makes vectors with libggml-python")
TOOL = Path(__file__).parents[1] / "tools" / "make_golden.py"


def test_vectors_of_a_known_type(tmp_path):
    subprocess.run([sys.executable, str(TOOL), "Q5_K", "--out", str(tmp_path)], check=True, capture_output=True)
    entry = json.loads((tmp_path / "manifest.json").read_text())["Q5_K"]
    assert (entry["ggml_type"], entry["block_size"], entry["type_size"]) == (13, 256, 176)
    with np.load(tmp_path / entry["file"]) as file:
        for packed, decoded in (("q", "y"), ("q_importance", "y_importance")):
            got = fk.dequantize(torch.from_numpy(file[packed]), "Q5_K")
            assert torch.equal(got, torch.from_numpy(file[decoded]))
        assert file["x"].shape == (12, 512) and file["random_q"].shape == (8, 2 * 176)


def test_a_type_ggml_does_not_have(tmp_path):
    done = subprocess.run(
        [sys.executable, str(TOOL), "Q7_X", "--out", str(tmp_path)], check=False, capture_output=True, text=True
    )
    assert done.returncode != 0 and "no type 'Q7_X'" in done.stderr
    assert not list(tmp_path.iterdir())
