"""Compose small pictures into one sheet: a column a variant, a row a prompt, pixels enlarged whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

# Pixels a picture is enlarged to, at most; always a whole multiple of its size where it is smaller
TILE = 192
MARGIN = 14
LABEL_WIDTH = 190
TITLE_SIZE, TEXT_SIZE = 22, 15
BACKGROUND, INK, FAINT = (250, 250, 248), (25, 25, 30), (110, 110, 120)


def contact_sheet(
    title: str, columns: Sequence[Sequence[str]], rows: Sequence[str], pictures: Sequence[Sequence[Picture]]
) -> Picture:
    """Compose a sheet.

    Args:
        title: one line above everything.
        columns: for each column, its heading and the lines of small print under it.
        rows: for each row, its label; wrapped to the label column.
        pictures: for each column, the pictures of its rows, all of one size.

    Returns:
        An RGB picture.
    """
    title_font, text_font = ImageFont.load_default(TITLE_SIZE), ImageFont.load_default(TEXT_SIZE)
    tile_width, tile_height = _tile_size(pictures[0][0])
    line = TEXT_SIZE + 5
    header = max(len(column) - 1 for column in columns) * line + TITLE_SIZE + 12
    top = MARGIN + TITLE_SIZE + 2 * MARGIN
    width = LABEL_WIDTH + len(columns) * (tile_width + MARGIN) + MARGIN
    height = top + header + len(rows) * (tile_height + MARGIN) + MARGIN
    sheet = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), title, INK, title_font)
    for index, (heading, *small_print) in enumerate(columns):
        x = LABEL_WIDTH + index * (tile_width + MARGIN)
        draw.text((x, top), heading, INK, title_font)
        for number, text in enumerate(small_print):
            draw.text((x, top + TITLE_SIZE + 6 + number * line), text, FAINT, text_font)
    for number, label in enumerate(rows):
        y = top + header + number * (tile_height + MARGIN)
        wrapped = _wrap(label, LABEL_WIDTH - 2 * MARGIN, text_font)
        block = len(wrapped) * line
        for offset, text in enumerate(wrapped):
            draw.text((MARGIN, y + (tile_height - block) / 2 + offset * line), text, INK, text_font)
        for index, column in enumerate(pictures):
            tile = column[number].convert("RGB").resize((tile_width, tile_height), Image.Resampling.NEAREST)
            sheet.paste(tile, (LABEL_WIDTH + index * (tile_width + MARGIN), y))
    return sheet


def _tile_size(picture: Picture) -> tuple[int, int]:
    """Enlarge by a whole factor, so that pixels stay squares; shrink what is larger than a tile."""
    longest = max(picture.size)
    factor = TILE // longest if longest <= TILE else TILE / longest
    return round(picture.width * factor), round(picture.height * factor)


def _wrap(text: str, width: int, font) -> list[str]:
    """Break text into lines of at most `width` pixels, at spaces."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
