"""Content Credentials (C2PA): a signed manifest in every image that says a machine made it.

C2PA specification 2.1, 18.15: one action `c2pa.created` whose digitalSourceType is that of
encode.source_type. The plain marker of encode.py stays beside it. Which certificates it trusts is
the viewer's business: one that you made yourself signs, and shows as unknown. Needs the extra
`c2pa`.

    service.yaml:  c2pa: {certificates: chain.pem, private_key: key.pem, algorithm: es256}
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

from pipeline import __version__
from pipeline.errors import ResourceError
from serve.encode import source_type
from serve.messages import ImageFormat
from serve.settings import C2paConfig

Sign = Callable[[bytes, ImageFormat, bool], bytes]
"""(encoded image, its format, whether parts of it were given) -> the same with a manifest."""


def load_signer(config: C2paConfig | None) -> Sign:
    """A function that signs images; without settings, one that returns them as they are.

    Raises:
        ResourceError: the extra is not installed, or certificate and key cannot sign.
    """
    if config is None:
        return lambda image, _kind, _composite: image
    try:
        import c2pa
    except ImportError as error:
        raise ResourceError("c2pa needs the extra: pip install 'tessera[c2pa]'") from error
    try:
        chain, key = config.certificates.read_bytes(), config.private_key.read_bytes()
        c2pa.load_settings({"builder": {"thumbnail": {"enabled": False}}})
        info = c2pa.C2paSignerInfo(config.algorithm.encode(), chain, key, None)
        signer = c2pa.Signer.from_info(info)
    except (OSError, c2pa.C2paError) as error:
        raise ResourceError(
            f"c2pa cannot sign with {config.certificates} and {config.private_key}: {error}; name "
            f"a PEM chain, leaf first, and its {config.algorithm} key"
        ) from error

    def sign(image: bytes, kind: ImageFormat, composite: bool) -> bytes:
        source, signed = io.BytesIO(image), io.BytesIO()
        with c2pa.Builder(json.dumps(_manifest(kind, composite))) as builder:
            builder.sign(signer, f"image/{kind}", source, signed)
        return signed.getvalue()

    return sign


def _manifest(kind: ImageFormat, composite: bool) -> dict[str, Any]:
    created = {"action": "c2pa.created", "digitalSourceType": source_type(composite)}
    return {
        "claim_generator_info": [{"name": "Tessera", "version": __version__}],
        "format": f"image/{kind}",
        "assertions": [{"label": "c2pa.actions", "data": {"actions": [created]}}],
    }
