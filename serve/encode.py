"""Generated images as files, each saying of itself how it was made and that a machine made it.

    png     text chunks: prompt, seed, model, model_version, settings, Software
    jpeg    the same in the EXIF user comment, as JSON
    webp    likewise
    all     XMP: Iptc4xmpExt:DigitalSourceType is IPTC's word for "created by a generative model",
            trainedAlgorithmicMedia, or for an image that was given and partly generated anew,
            compositeWithTrainedAlgorithmicMedia; picture libraries and search engines read it

The marker is plain: whoever edits the file can take it out. content_credentials.py signs besides,
where there is a certificate.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image
from torch import Tensor

from pipeline.images.pixels import encode_png, to_pil
from serve.messages import OutputOptions

_IPTC = "http://cv.iptc.org/newscodes/digitalsourcetype/"
_XMP_CHUNK = "XML:com.adobe.xmp"
_XMP = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
Iptc4xmpExt:DigitalSourceType="%s"/></rdf:RDF></x:xmpmeta><?xpacket end="r"?>"""
_UNICODE = b"UNICODE\0"  # EXIF 2.3, table 9: the user comment's character code


def source_type(composite: bool) -> str:
    """IPTC's digital source type of an image that was generated, or generated into a given one."""
    kind = "compositeWithTrainedAlgorithmicMedia" if composite else "trainedAlgorithmicMedia"
    return _IPTC + kind


def encode(
    image: NDArray[np.uint8] | Tensor,
    output: OutputOptions,
    metadata: Mapping[str, str],
    *,
    composite: bool = False,
) -> bytes:
    """A file's bytes.

    Args:
        image: uint8 (3, H, W), of the size to be delivered.
        output: the file format and its quality.
        metadata: from pipeline.bundles.provenance.
        composite: parts of the image were given and not generated.
    """
    xmp = _XMP % source_type(composite)
    if output.format == "png":
        return encode_png(image, {**metadata, _XMP_CHUNK: xmp})
    exif = Image.Exif()
    exif[ExifTags.Base.Software] = metadata["Software"]
    comment = json.dumps(metadata, ensure_ascii=False).encode("utf-16-be")
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = _UNICODE + comment
    stream = io.BytesIO()
    to_pil(image).save(
        stream, format=output.format.upper(), quality=output.quality, exif=exif, xmp=xmp.encode()
    )
    return stream.getvalue()
