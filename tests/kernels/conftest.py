"""Run kernels on the GPU where there is one, otherwise in Triton's CPU interpreter with bf16 mended."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is decorated

from flux_kernels._triton import interpreting


@pytest.fixture(scope="session", autouse=True)
def bf16_in_interpreter():
    """Mend the interpreter's bf16 arithmetic for the session."""
    if not interpreting():
        yield
        return
    from .bf16_interpreter import mend

    with pytest.MonkeyPatch.context() as monkeypatch:
        mend(monkeypatch)
        yield


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Name the device kernels run on."""
    return torch.device("cpu" if interpreting() else "cuda")
