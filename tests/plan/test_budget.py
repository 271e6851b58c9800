"""Sizes in words, and what a card leaves for the file."""

from __future__ import annotations

import pytest

from flux_kernels import FormatError
from flux_kernels.mixed.file_layout import KEY_VALUE_BYTES, embedded_shapes, layout_of_shapes, shapes_of_variant
from flux_kernels.mixed.option import Option
from flux_kernels.models.names import block_of
from flux_kernels.models.variant_calls import VARIANTS
from flux_kernels.plan.budget import parse_card, parse_resolution, parse_size, room_on_card, room_table


@pytest.fixture(scope="module")
def dev():
    return layout_of_shapes(shapes_of_variant("flux1-dev"), "flux1-dev")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GB", 8_000_000_000),
        ("7.5 GiB", 8_053_063_680),
        ("750MB", 750_000_000),
        ("12_345", 12345),
        ("1kib", 1024),
        # One above what a double holds.
        ("9007199254740993", 9007199254740993),
    ],
)
def test_sizes_in_words(text, size):
    assert parse_size(text, layout_of_shapes(embedded_shapes(), ""), []) == size


def test_a_type_means_the_file_in_that_type(dev):
    blocks = [name for name, shape in dev.shapes.items() if block_of(name) and len(shape) == 2]
    assert parse_size("Q4_K", dev, blocks) == dev.file_bytes(dict.fromkeys(blocks, Option("Q4_K"))) + KEY_VALUE_BYTES
    with pytest.raises(FormatError, match="img_in.weight has rows of 64 weights, which are no whole blocks of Q4_K"):
        parse_size("Q4_K", dev, ["img_in.weight"])


@pytest.mark.parametrize("text", ["", "big", "8TB", "-1GB", "8 G B", "Q4_K_S"])
def test_no_size(text, dev):
    with pytest.raises(FormatError, match="is no size. Legal"):
        parse_size(text, dev, [])


def test_bits_per_weight_are_kept_to(dev):
    blocks = [name for name, shape in dev.shapes.items() if block_of(name) and len(shape) == 2]
    options = dict.fromkeys(blocks, Option("Q4_K"))
    bits = dev.bits_per_weight(options)
    # The writer's padding is nothing here: all tensors are multiples of 32 bytes.
    assert dev.budget_of_bits(bits) == pytest.approx(dev.file_bytes(options) + KEY_VALUE_BYTES, abs=1)


def test_cards_and_resolutions():
    assert parse_card("12GB") == parse_card("12") == parse_card("12 GiB") == 12
    assert parse_resolution("1024x768") == (1024, 768)
    for text in ("", "large", "0GB"):
        with pytest.raises(FormatError, match="is no card"):
            parse_card(text)
    for text in ("1024", "8x8", "axb"):
        with pytest.raises(FormatError, match="is no resolution"):
            parse_resolution(text)


def test_room_follows_the_documented_arithmetic(dev):
    """At 1024 x 1024: 4096 + 512 tokens, 20 widths of 3072 in 16 bit and a tenth more, linear1 decoded."""
    room = room_on_card(dev, 12, 1024, 1024)
    decoded = 2 * 21504 * 3072
    assert room.activations == round(4608 * 20 * 3072 * 2 * 1.1) + decoded
    assert room.file == int(12 * 2**30 * 0.95) - 2**29 - room.activations
    rooms = room_table(dev, 12)
    assert [one.file for one in rooms] == sorted((one.file for one in rooms), reverse=True)


def test_without_offload_the_text_encoders_take_their_share(dev):
    resident = room_on_card(dev, 24, 1024, 1024, "none")
    # T5 in 16 bit: 4.76 billion weights.
    assert resident.beside > 9e9
    assert resident.file < room_on_card(dev, 24, 1024, 1024).file - resident.beside
    assert room_on_card(dev, 8, 1024, 1024, "none").file < 0
    with pytest.raises(FormatError, match="Unknown offload"):
        room_on_card(dev, 8, 1024, 1024, "all")


FIRST_OF_EACH = {row.name: slug for slug, (row, _) in reversed(VARIANTS.items())}


@pytest.mark.parametrize("slug", [slug for name, slug in FIRST_OF_EACH.items() if name != "FLUX.1"])
def test_companions_of_other_models_are_not_guessed(slug):
    layout = layout_of_shapes(shapes_of_variant(slug), VARIANTS[slug][1].name)
    with pytest.raises(FormatError, match=f"not of {VARIANTS[slug][1].name}. Take --offload model, or .* --size 6GB"):
        room_on_card(layout, 24, 1024, 1024, "none")
    room = room_on_card(layout, 24, 1024, 1024)
    assert room.beside == room.vae == 0 and room.file == int(24 * 2**30 * 0.95) - 2**29 - room.activations
