"""Which images augmentation may mirror: none whose caption would become wrong.

    may_mirror(["flag: France"]), may_mirror(["red apple", "红苹果"])        # (False, True)

A mirrored image of a left arrow, a flag or a written word no longer shows what its caption says.
Captions in English and Chinese are searched for such words. The image itself is not looked at: one
that bears text which no caption mentions is mirrored.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# In both languages: sides and turns; flags; letters, digits and writing.
_ENGLISH = re.compile(
    r"\b(?:left|right|leftwards|rightwards|clockwise|anticlockwise|counterclockwise|"
    r"east|west|eastern|western|back arrow|"
    r"flags?|banner|ensign|"
    r"text|letters?|alphabet|latin|abc|words?|wordmark|writing|written|handwriting|inscription|"
    r"typography|font|lettering|caption|slogan|label|signs?|signage|signpost|billboard|poster|"
    r"logo|brand|newspaper|book cover|menu|ticket|calendar|numbers?|numerals?|digits?|keycap|"
    r"button|clock|o['’]clock|watch face|license plate|licence plate|number plate|monogram|"
    r"zodiac|sheet music|musical score|map)\b",
    re.IGNORECASE,
)
_CHINESE = re.compile(
    r"[左右旗]|顺时针|逆时针|朝[东西]|文字|汉字|漢字|字母|字样|数字|數字|拉丁|"
    r"标志|標誌|标牌|標牌|招牌|海报|海報|商标|商標|按钮|按鈕|键帽|鍵帽|時鐘|时钟|钟表|鐘錶|点钟|點鐘|"
    r"順時針|逆時針|地图|地圖|日历|日曆|报纸|報紙|书法|書法|車牌|车牌|乐谱|樂譜|字樣|標籤|标签"
)
_QUOTED = re.compile(r"[\"“”„«»「」『』][^\"“”„«»「」『』]+[\"“”„«»「」『』]")
_CAPITALS = re.compile(r"\b[A-Z]{2,}\b|\b[B-HJ-Z]\b(?!['’.])")  # OK, SOS, B button; not "I", "A"


def may_mirror(captions: Iterable[str]) -> bool:
    """Whether an image with these captions may be flipped left to right."""
    patterns = (_ENGLISH, _CHINESE, _QUOTED, _CAPITALS)
    return not any(pattern.search(caption) for caption in captions for pattern in patterns)
