"""What FLUX.1's pipelines would ignore is refused before anything is loaded, as other models' is."""

from __future__ import annotations

from pathlib import Path

import pytest

from flux_kernels import FormatError
from flux_kernels.generation.embedded import embedded_model_path
from flux_kernels.generation.job import check_request
from flux_kernels.generation.request import Request

from ..task_files import write_transformer


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("flux1")
    for name in ("dev", "schnell"):
        write_transformer(folder, name)
    return folder


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        (
            "dev",
            {"true_cfg": 3.0},
            r"strength of the negative prompt, and none is given\. Give --negative too, or leave --true",
        ),
        (
            "dev",
            {"negative": "rain", "true_cfg": 1.0},
            r"counts with a --true-cfg above 1, and it is 1\. Give a larger --true-cfg",
        ),
        ("schnell", {"guidance": 3.0}, r"--guidance 3 would be ignored: FLUX\.1.* is not told the guidance\. Leave it out"),
        ("dev", {"negative": "rain", "true_cfg": 1.5, "guidance": 3.0}, None),
        ("dev", {"negative": "rain"}, None),
        ("schnell", {"guidance": 0.0, "negative": "rain", "true_cfg": 2.0}, None),
    ],
)
def test_what_would_be_ignored_is_refused(files, name, options, sentence):
    request = Request(files / f"{name}.gguf", embedded_model_path(), "a red seven", **options)
    if sentence is None:
        check_request(request)
        return
    with pytest.raises(FormatError, match=sentence):
        check_request(request)
