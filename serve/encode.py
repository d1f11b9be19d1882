"""Drawn pictures as files, each saying of itself how it was made and that a machine made it.

    png     text chunks: prompt, seed, model, model_version, settings, Software
    jpeg    the same in the EXIF user comment, as JSON
    webp    likewise
    all     XMP: Iptc4xmpExt:DigitalSourceType is IPTC's word for "created by a generative model",
            trainedAlgorithmicMedia, or for a picture that was given and partly drawn anew,
            compositeWithTrainedAlgorithmicMedia; picture libraries and search engines read it

The marker is plain: whoever edits the file can take it out. credentials.py signs besides, where
there is a certificate.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping

from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from pipeline.images import to_pil
from serve.pictures import Output

_IPTC = "http://cv.iptc.org/newscodes/digitalsourcetype/"
_XMP = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
Iptc4xmpExt:DigitalSourceType="%s"/></rdf:RDF></x:xmpmeta><?xpacket end="r"?>"""
_UNICODE = b"UNICODE\0"  # EXIF 2.3, table 9: the user comment's character code


def source_type(composite: bool) -> str:
    """IPTC's digital source type: of a picture that was drawn, or drawn into a given one."""
    kind = "compositeWithTrainedAlgorithmicMedia" if composite else "trainedAlgorithmicMedia"
    return _IPTC + kind


def encode(
    image: Tensor, output: Output, metadata: Mapping[str, str], *, composite: bool = False
) -> bytes:
    """uint8 (3, H, W) -> a file's bytes; `composite`: parts of it were given, not drawn."""
    xmp = _XMP % source_type(composite)
    picture, stream = to_pil(image), io.BytesIO()
    if output.format == "png":
        picture.save(stream, format="PNG", pnginfo=_chunks(metadata, xmp))
    else:
        exif = Image.Exif()
        exif[ExifTags.Base.Software] = metadata["Software"]
        comment = json.dumps(metadata, ensure_ascii=False).encode("utf-16-be")
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = _UNICODE + comment
        picture.save(
            stream, format=output.format.upper(), quality=output.quality, exif=exif,
            xmp=xmp.encode(),
        )  # fmt: skip
    return stream.getvalue()


def _chunks(metadata: Mapping[str, str], xmp: str) -> PngInfo:
    """iTXt chunks, so that any language is kept."""
    info = PngInfo()
    for name, value in metadata.items():
        info.add_itxt(name, value)
    info.add_itxt("XML:com.adobe.xmp", xmp)
    return info
