"""A swapped tiny Flux, and the output of its dequantized twin."""

from __future__ import annotations

import pytest

from .twins import run, twin


@pytest.fixture
def model(swapped_flux):
    """A swapped tiny Flux of the test's own."""
    return swapped_flux


@pytest.fixture(scope="module")
def expected(_swapped_flux):
    """The output of its dequantized twin."""
    return run(twin(_swapped_flux))
