"""Files that load_t5 refuses, and what it says."""

from __future__ import annotations

import numpy as np
import pytest

from flux_kernels import GGUFError, load_t5

from ..t5_files import llama_name, tiny_t5, write_t5
from .test_t5 import REL_BIAS, written

# What is done to the file, what the error says.
REFUSALS = [
    ({"leave_out": ("encoder.block.1.layer.0.SelfAttention.k.weight",)}, r"1 tensor missing: .*block\.1.*\.k\.weight"),
    ({"leave_out": ("shared.weight",)}, r"This is no T5 encoder: .*'t5encoder'.*flux_kernels loads the T5 encoders"),
    ({"leave_out": (REL_BIAS.format(0),)}, r"lacks '.*relative_attention_bias\.weight', which every T5 encoder holds"),
    ({"extra": [("enc.blk.0.attn_z.weight", np.zeros((2, 2)))]}, r"1 tensor superfluous: enc\.blk\.0\.attn_z\.weight"),
    ({"extra": [(llama_name(REL_BIAS.format(1)), np.zeros((32, 4)))]}, r"This is UMT5, the text encoder of Wan"),
    ({"extra": [("enc.blk.3.attn_q.weight", np.zeros((256, 256)))]}, r"blocks up to 3, but none with index 2"),
    ({"extra": [("shared.weight", np.zeros((2, 2)))]}, r"'token_embd\.weight' and 'shared\.weight' are both 'shared\.weight'"),
]


@pytest.mark.parametrize(("how", "message"), REFUSALS, ids=[message[:30] for _, message in REFUSALS])
def test_files_that_are_refused(tmp_path, how, message):
    path, _ = written(tmp_path, **how)
    with pytest.raises(GGUFError, match=rf"t5\.gguf: .*{message}"):
        load_t5(path)


def test_key_values_that_contradict_the_tensors_are_refused(tmp_path):
    model = tiny_t5()
    model.config.d_ff = 1024
    write_t5(model, tmp_path / "t5.gguf")
    with pytest.raises(GGUFError, match=r"'feed_forward_length' says 1024, the tensors have 512"):
        load_t5(tmp_path / "t5.gguf")


def test_a_flux_file_is_named_for_what_it_is(tiny_gguf):
    with pytest.raises(GGUFError, match="This is no T5 encoder: its architecture key says 'flux'"):
        load_t5(tiny_gguf / "tiny.gguf")
