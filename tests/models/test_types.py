"""The type rules against the published sizes of real FLUX.1 files, to the byte."""

from __future__ import annotations

import gguf
import pytest

from flux_kernels.errors import FormatError
from flux_kernels.generation.inspect_file import inspect_file
from flux_kernels.models.types import NAMED_TYPES, file_type, tensor_types

from ..flux_files import Architecture, write_hole

DEV = Architecture(19, 38, width=3072, head=128, text=4096, pooled=768)
SCHNELL = Architecture(19, 38, guidance=False, width=3072, head=128, text=4096, pooled=768)
# Model, rule, file type, bytes.
PUBLISHED = [
    (DEV, "old", "Q4_K_S", 6_805_988_640),
    (SCHNELL, "old", "Q4_K_S", 6_783_943_712),
    (SCHNELL, "old", "Q2_K", 4_010_296_352),
    (DEV, "old", "Q6_K", 9_857_000_736),
    (SCHNELL, "old", "Q6_K", 9_834_955_808),
    (DEV, "legacy", "Q8_0", 12_708_281_504),
    (DEV, "legacy", "Q4_1", 7_530_806_432),
    (SCHNELL, "legacy", "Q8_0", 12_687_821_728),
    (SCHNELL, "legacy", "Q4_1", 7_510_346_656),
    (DEV, "new", "Q8_0", 12_714_452_256),  # Krea
    (DEV, "new", "Q4_1", 7_536_977_184),
    (DEV, "new", "Q6_K", 9_848_349_984),
]


def write_sparse(path, architecture, types, number):
    """Write a full-size FLUX.1 file whose data are a hole."""
    tensors = {name: (types[name], shape) for name, shape in architecture.bfl_shapes().items()}
    return write_hole(path, "flux", tensors, number)


@pytest.mark.parametrize(("architecture", "rule", "name", "size"), PUBLISHED)
def test_the_rules_reproduce_published_file_sizes(tmp_path, architecture, rule, name, size):
    types = tensor_types(rule, name, architecture.bfl_shapes())
    path = write_sparse(tmp_path / "flux.gguf", architecture, types, NAMED_TYPES[name].file_type)
    assert path.stat().st_size == size
    # The reader checks that the tensors tile the file.
    facts = inspect_file(path)
    assert facts.refused is None and facts.layout == rule


def test_an_m_file_widens_the_attention_inputs_of_the_double_blocks_only():
    types = tensor_types("new", "Q4_K_M", DEV.bfl_shapes())
    wide = {name for name, kind in types.items() if kind == "Q5_K"}
    assert wide == {f"double_blocks.{i}.{stream}_attn.qkv.weight" for i in range(19) for stream in ("img", "txt")}


def test_the_rules_know_diffusers_names():
    names = {
        "x_embedder.weight": (256, 64),
        "context_embedder.weight": (256, 256),
        "time_text_embed.text_embedder.linear_1.weight": (256, 256),
        "time_text_embed.text_embedder.linear_2.weight": (256, 256),
        "norm_out.linear.weight": (512, 256),
        "transformer_blocks.0.attn.add_k_proj.weight": (256, 256),
        "transformer_blocks.0.attn.to_add_out.weight": (256, 256),
        "single_transformer_blocks.0.attn.to_k.weight": (256, 256),
        "single_transformer_blocks.0.proj_out.weight": (256, 1280),
        "single_transformer_blocks.0.proj_out.bias": (256,),
        "proj_out.weight": (64, 256),
    }
    assert list(tensor_types("old", "Q4_K_S", names).values()) == (
        ["F32", "F16", "F32", "F16", "F16", "Q4_K", "Q4_K", "Q4_K", "Q4_K", "F32", "F32"]
    )
    wide = [name for name, kind in tensor_types("new", "Q5_K_M", names).items() if kind == "Q6_K"]
    assert wide == ["transformer_blocks.0.attn.add_k_proj.weight"]


@pytest.mark.parametrize("number", gguf.LlamaFileType)
def test_file_type_numbers_are_those_of_llama_cpp(number):
    name = number.name.removeprefix("MOSTLY_").removeprefix("ALL_").removesuffix("_MOE")
    if name in NAMED_TYPES:
        assert NAMED_TYPES[name].file_type == number


def test_a_file_type_follows_from_the_type_of_its_matrices():
    assert [file_type(kind) for kind in ("Q4_K", "Q3_K", "Q8_0", "BF16", "NVFP4", "Q2_0")] == [14, 11, 7, 32, 39, None]


@pytest.mark.parametrize(
    ("rule", "name", "message"),
    [
        ("newest", "Q8_0", "Unknown rule 'newest'. Known: legacy, old, new."),
        ("new", "Q4_K", "Unknown file type 'Q4_K'. Known: .*Q4_K_S, Q4_K_M"),
        ("old", "Q4_K_M", 'Q4_K_M mixes types, which old files never did. Use rule="new"'),
    ],
)
def test_unknown_rules_and_types_are_named(rule, name, message):
    with pytest.raises(FormatError, match=message):
        tensor_types(rule, name, {})
