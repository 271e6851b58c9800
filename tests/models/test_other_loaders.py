"""What other programs ask of a file, as they were seen to ask it.

docs/decisions/other-loaders.md says how they were run.
"""

from __future__ import annotations

import pytest

from flux_kernels.models.architectures import ARCHITECTURES
from tools.small_models import SMALL

# Of IMG_ARCH_LIST in ComfyUI-GGUF's loader.py (commit 795e451), those that are transformers. It refuses any other word, whatever
# the tensors are.
TAKEN_BY_COMFYUI_GGUF = {"flux", "sd3", "aura", "hidream", "cosmos", "ltxv", "hyvid", "wan", "lumina2", "qwen_image"}


@pytest.mark.parametrize("row", ARCHITECTURES, ids=lambda row: row.name)
def test_comfyui_gguf_takes_the_word_that_files_say(row):
    assert row.gguf_name in TAKEN_BY_COMFYUI_GGUF


def test_the_check_with_the_other_programs_covers_every_row():
    assert set(SMALL) == {row.name for row in ARCHITECTURES}
