"""Models that lack the last blocks of a list: pruned, or files that were cut short."""

from __future__ import annotations

import re
import warnings

import diffusers
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from flux_kernels import load_transformer
from flux_kernels.cli import app
from flux_kernels.generation.inspect_file import inspect_file
from flux_kernels.models.architectures import ARCHITECTURES
from flux_kernels.models.cut_short import lacking_blocks
from flux_kernels.source.source import understand_source

from ..flux_files import Architecture, write_hole
from .cases import CASES
from .test_architectures import PUBLISHED, ROWS, all_cases, small_file, write_true_size

LISTS = [(name, blocks) for name in CASES for blocks in ROWS[name].counts]


def cut(shapes, blocks: str, lost: int = 1):
    """Drop the last blocks of a list."""
    index = {name: re.match(rf"{re.escape(blocks)}\.([0-9]+)\.", name) for name in shapes}
    count = max(int(match[1]) for match in index.values() if match) + 1
    dropped = {name for name, match in index.items() if match and int(match[1]) >= count - lost}
    return {name: shape for name, shape in shapes.items() if name not in dropped}


@pytest.mark.parametrize(("name", "variant"), PUBLISHED)
def test_no_list_that_was_cut_short_loads_without_a_word(tmp_path, name, variant):
    """A list is refused where another tensor shows its length, and named where none does."""
    case, said = CASES[name], 0
    for blocks in ROWS[name].counts:
        shapes = cut(case.published[variant].shapes, blocks)
        facts = inspect_file(write_true_size(case, shapes, tmp_path / "cut.gguf"))
        found = facts.notes and re.search(rf"It has (\d+) of the (\d+) {re.escape(blocks)} of ", facts.notes[0])
        assert facts.refused or found, blocks
        assert not found or int(found[1]) + 1 == int(found[2])
        said += bool(found)
    # The last block of Stable Diffusion 3 is another than the rest.
    assert said or name == "Stable Diffusion 3"


def test_loading_and_quantizing_say_it_too(tmp_path):
    case = CASES["Wan"]
    shapes = cut(case.published["Wan2.1-T2V-1.3B"].shapes, "blocks", lost=3)
    path = write_true_size(case, shapes, tmp_path / "cut.gguf")
    sentence = "It has 27 of the 30 blocks of Wan2.1-T2V-1.3B and is otherwise that model"
    with pytest.warns(UserWarning, match=f"cut.gguf: {sentence}") as warned:
        model = load_transformer(path)
    assert len(model.blocks) == 27 and warned[0].filename == __file__
    assert understand_source(path).notes[0].startswith(sentence)
    shown = CliRunner().invoke(app, ["inspect", str(path)])
    assert shown.exit_code == 0 and f"Note: {sentence}" in shown.output


@pytest.mark.parametrize(
    ("double", "single", "says"),
    [(19, 38, None), (8, 38, None), (19, 37, "37 of the 38 single_blocks"), (7, 38, "7 of the 19 double_blocks")],
)
@pytest.mark.parametrize("in_channels", [64, 384])
def test_flux1_and_its_pruned_relatives(tmp_path, double, single, says, in_channels):
    """Flex and Flux-Lite were published with 8 double blocks."""
    shapes = Architecture(double, single, in_channels=in_channels, width=3072, head=128, text=4096, pooled=768).bfl_shapes()
    facts = inspect_file(write_hole(tmp_path / "f.gguf", "flux", {name: ("F16", shape) for name, shape in shapes.items()}))
    assert facts.refused is None
    assert [note.partition(" of FLUX.1-dev ")[0] for note in facts.notes] == ([f"It has {says}"] if says else [])


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("Z-Image", r"1 noise_refiner, 1 context_refiner and 1 layer"),
        ("FLUX.2", r"[0-9] double and [0-9] single blocks"),
        ("Wan", r"([2-9] blocks|1 block)"),
    ],
)
def test_a_file_that_lacks_a_tensor_counts_its_blocks(tmp_path, name, counts):
    case = CASES[name]
    missing = next(tensor for tensor in reversed(case.shapes) if re.search(r"\.0\.", tensor))
    shapes = {tensor: shape for tensor, shape in case.shapes.items() if tensor != missing}
    facts = inspect_file(write_true_size(case, shapes, tmp_path / "short.gguf"))
    assert re.search(rf"A {re.escape(name)} file with {counts} holds exactly", facts.refused), facts.refused


def test_more_blocks_and_other_widths_are_no_files_that_were_cut_short():
    dev = next(variant.config for variant in ROWS["FLUX.2"].variants if variant.name == "FLUX.2-dev")
    assert lacking_blocks(ROWS["FLUX.2"], dev) is None
    assert "47 of the 48 single_blocks" in lacking_blocks(ROWS["FLUX.2"], dev | {"num_single_layers": 47})
    assert lacking_blocks(ROWS["FLUX.2"], dev | {"num_single_layers": 49}) is None
    assert lacking_blocks(ROWS["FLUX.2"], dev | {"num_single_layers": 47, "num_layers": 9}) is None
    assert lacking_blocks(ROWS["FLUX.2"], dev | {"num_single_layers": 47, "num_attention_heads": 47}) is None


@all_cases
def test_small_models_load_without_a_warning(tmp_path, case):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load_transformer(small_file(case.name).write(tmp_path / "small.gguf"))


@pytest.mark.parametrize(("name", "blocks"), LISTS)
def test_rows_name_the_config_value_that_counts_each_list(name, blocks):
    """Every list of modules of diffusers' model has the length that its config value says."""
    case, row = CASES[name], ROWS[name]
    with torch.device("meta"):
        model = getattr(diffusers, row.model_class)(**case.config)
    theirs = next((pair[1] for pair in row.blocks if pair[0] == blocks), blocks)
    modules = dict(model.named_modules())[theirs]
    assert isinstance(modules, nn.ModuleList) and len(modules) == case.config[row.counts[blocks]]


@pytest.mark.parametrize("row", ARCHITECTURES, ids=lambda row: row.name)
def test_every_list_of_blocks_is_counted(row):
    assert {original for original, _ in row.blocks} <= set(row.counts)
