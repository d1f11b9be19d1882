"""Fonts for text on image grids: one with Chinese glyphs if the machine has any.

draw_text(canvas, (4, 4), "红苹果", load_font(), max_width=64)
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

LOG = logging.getLogger(__name__)
SIZE = 13  # pixels
NO_CHINESE = (
    "no font with Chinese glyphs found: Chinese labels on image grids show as boxes "
    "(pip install 'tessera[fonts]', or a system package such as fonts-noto-cjk)"
)
# Font files as Linux, macOS and Windows name them, the best ones first.
_WITH_CHINESE = (
    "NotoSansCJK-Regular.ttc",
    "NotoSansCJKjp-Regular.otf",
    "NotoSansSC-Regular.otf",
    "NotoSansCJKsc-Regular.otf",
    "wqy-microhei.ttc",
    "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf",
    "unifont.otf",
    "PingFang.ttc",
    "Hiragino Sans GB.ttc",
    "STHeiti Light.ttc",
    "msyh.ttc",
    "simsun.ttc",
)
_LATIN = ("DejaVuSans.ttf", "LiberationSans-Regular.ttf", "Helvetica.ttc", "arial.ttf")
_PACKAGE = "noto_cjk_sans_jp_regular"  # the extra "fonts"; simplified Chinese is in it too
_FOLDERS = (
    "/usr/share/fonts",
    "/usr/local/share/fonts",
    "~/.local/share/fonts",
    "~/.fonts",
    "/System/Library/Fonts",
    "/Library/Fonts",
    "C:/Windows/Fonts",
)


@functools.cache
def load_font() -> ImageFont.FreeTypeFont:
    """A font of the system or of the extra "fonts" with Chinese glyphs, SIZE pixels high.

    Where there is none: a font without them, and one warning in the log.
    """
    folders = [Path(folder).expanduser() for folder in _FOLDERS]
    packaged = importlib.util.find_spec(_PACKAGE)
    if packaged is not None and packaged.origin is not None:
        folders.append(Path(packaged.origin).parent)
    files = {path.name: path for folder in folders for path in sorted(folder.rglob("*.[ot]t[cf]"))}
    for name in (*_WITH_CHINESE, *_LATIN):
        if name in files:
            if name in _LATIN:
                LOG.warning(NO_CHINESE)
            return ImageFont.truetype(str(files[name]), SIZE)
    LOG.warning(NO_CHINESE)
    font = ImageFont.load_default(SIZE)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
    return font


def draw_text(
    canvas: Image.Image,
    corner: tuple[int, int],
    text: str,
    font: ImageFont.FreeTypeFont,
    *,
    max_width: int,
) -> None:
    """Draw one black line of text, cut with an ellipsis where it is wider than max_width pixels.

    Args:
        canvas: the image that is drawn on.
        corner: x and y of the text's upper left corner, in pixels.
    """
    if font.getlength(text) > max_width:
        while text and font.getlength(text + "…") > max_width:
            text = text[:-1]
        text += "…"
    ImageDraw.Draw(canvas).text(corner, text, fill=(0, 0, 0), font=font)
