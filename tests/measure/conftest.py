"""A whole measurement of the embedded model, for all tests of this folder."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from flux_kernels.generation.base_pipeline import one_thread
from flux_kernels.measure.run import measure, open_measurement

from .measured import request_in


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """Return the table that one process measures, and the request."""
    request = request_in(tmp_path_factory.mktemp("whole"))
    with one_thread():
        return SimpleNamespace(table=measure(open_measurement(request)), request=request)
