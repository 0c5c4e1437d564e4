"""The contact sheet: rows are models and step counts, columns are prompts."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from engines.distill.evaluate import Contestant, draw, load

PROMPTS = (
    "a large red house at the center on a green background, by day, outlined",
    "a small teal star at the top left on a pink background, at night, flat",
    "a large purple heart at the right on a yellow background, by day, flat",
    "a big orange crescent in the center over a blue backdrop, at night",
    "a small navy tree at the bottom left on a white background, by day, outlined",
    "a large black triangle at the top on a pink background, by day, flat",
)
SCALE = 1.5
GAP_PX, LABEL_PX, HEAD_PX = 8, 152, 58


def draw_sheet(
    models: Path, rows: list[Contestant], device: torch.device, seed: int
) -> Image.Image:
    """Draw every prompt with every contestant, all rows from the same noise."""
    side = round(128 * SCALE)
    width = LABEL_PX + len(PROMPTS) * (side + GAP_PX)
    sheet = Image.new("RGB", (width, HEAD_PX + len(rows) * (side + GAP_PX)), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=13)
    for column, prompt in enumerate(PROMPTS):
        _write(pen, font, prompt, LABEL_PX + column * (side + GAP_PX), 4, side)
    for row, contestant in enumerate(rows):
        top = HEAD_PX + row * (side + GAP_PX)
        label = f"{contestant.name} {contestant.num_steps} step{'s'[: contestant.num_steps - 1]}"
        _write(pen, font, label, 4, top + side // 3, LABEL_PX - 8)
        pictures = draw(load(models, contestant, device), contestant, list(PROMPTS), seed)
        for column, picture in enumerate(pictures):
            image = Image.fromarray(picture).resize((side, side), Image.Resampling.LANCZOS)
            sheet.paste(image, (LABEL_PX + column * (side + GAP_PX), top))
    return sheet


def _write(
    pen: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    text: str, left: int, top: int, width: int,
) -> None:  # fmt: skip
    line = ""
    for word in [*text.split(), ""]:
        longer = f"{line} {word}".strip()
        if line and (not word or pen.textlength(longer, font=font) > width):
            pen.text((left, top), line, fill="#333", font=font)
            top, longer = top + 16, word
        line = longer
