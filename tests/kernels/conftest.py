"""Run kernels on the GPU where there is one, otherwise in Triton's CPU interpreter with bf16 mended."""

from __future__ import annotations

import pytest
import torch

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
