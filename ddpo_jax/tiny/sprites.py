"""Draws the sprite sheet from a colour-emoji font; run once, the sheet is an asset.

python -m ddpo_jax.tiny.sprites --font=/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf

The published sheet was drawn with Debian's fonts-noto-color-emoji (Noto Color Emoji, SIL Open Font License 1.1).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SHEET = Path(__file__).parents[1] / "assets" / "sprites.png"
SIZE = 64  # pixels, one side of a sprite
COLUMNS = 9

# The DDPO paper's 45 common animals, in the order of assets/prompts/common_animals.txt.
EMOJI = {
    "cat": "🐱", "dog": "🐶", "horse": "🐴", "monkey": "🐵", "rabbit": "🐰", "zebra": "🦓", "spider": "🕷",
    "bird": "🐦", "sheep": "🐑", "deer": "🦌", "cow": "🐮", "goat": "🐐", "lion": "🦁", "tiger": "🐯",
    "bear": "🐻", "raccoon": "🦝", "fox": "🦊", "wolf": "🐺", "lizard": "🦎", "beetle": "🪲", "ant": "🐜",
    "butterfly": "🦋", "fish": "🐟", "shark": "🦈", "whale": "🐳", "dolphin": "🐬", "squirrel": "🐿", "mouse": "🐭",
    "rat": "🐀", "snake": "🐍", "turtle": "🐢", "frog": "🐸", "chicken": "🐔", "duck": "🦆", "goose": "🪿",
    "bee": "🐝", "pig": "🐷", "turkey": "🦃", "fly": "🪰", "llama": "🦙", "camel": "🐫", "bat": "🦇",
    "gorilla": "🦍", "hedgehog": "🦔", "kangaroo": "🦘",
}  # fmt: skip


def draw(font: ImageFont.FreeTypeFont, emoji: str) -> Image.Image:
    """One emoji, cropped to what it covers and centred in a transparent square."""
    canvas = Image.new("RGBA", (160, 160))
    ImageDraw.Draw(canvas).text((10, 10), emoji, font=font, embedded_color=True)
    drawn = canvas.crop(canvas.getbbox())
    side = max(drawn.size)
    square = Image.new("RGBA", (side, side))
    square.paste(drawn, ((side - drawn.width) // 2, (side - drawn.height) // 2))
    return square.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--font", type=Path, required=True, help="a colour-emoji TrueType font with 109 px bitmaps")
    font = ImageFont.truetype(parser.parse_args().font, 109)  # the one size of Noto's bitmaps
    sheet = Image.new("RGBA", (COLUMNS * SIZE, -(-len(EMOJI) // COLUMNS) * SIZE))
    for i, emoji in enumerate(EMOJI.values()):
        sheet.paste(draw(font, emoji), (i % COLUMNS * SIZE, i // COLUMNS * SIZE))
    sheet.save(SHEET, optimize=True)


if __name__ == "__main__":
    main()
