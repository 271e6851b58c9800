"""FluxKernelsConfig by itself: imported in any order, and the same after a trip through JSON."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import flux_kernels as fk

PATTERNS = {"*.attn.*": "Q8_0", "*": "Q4_K"}


@pytest.mark.parametrize("before", ["", "import diffusers;", "from diffusers import FluxTransformer2DModel;"])
def test_it_can_be_the_first_thing_that_is_asked_for(before):
    """diffusers' table of quantizers asks for the config while it is imported.

    It must not meet half a module.
    """
    code = (
        f"{before}from flux_kernels import FluxKernelsConfig;"
        "from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as known;"
        "print(known['flux_kernels'] is FluxKernelsConfig)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "True", done.stderr


def test_patterns_keep_their_order_in_json(tmp_path):
    """The first pattern that matches counts; diffusers' own writer sorts keys."""
    config = fk.FluxKernelsConfig(PATTERNS, modules_to_not_convert=["proj_out"])
    config.to_json_file(tmp_path / "config.json")
    for text in (config.to_json_string(), (tmp_path / "config.json").read_text()):
        again = fk.FluxKernelsConfig.from_dict(json.loads(text))
        assert again == config and list(again.format) == list(PATTERNS)
        assert again.format_of("transformer_blocks.0.attn.to_q") == "Q8_0"
    assert list(PATTERNS) == [name for name in sorted(PATTERNS, key=repr(config).index)]
