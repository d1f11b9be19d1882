"""Signed pictures: with a certificate made here, read back by C2PA's own reader."""

from __future__ import annotations

import datetime
import io
import json
from pathlib import Path
from typing import get_args

import c2pa
import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from pipeline.errors import ResourceError
from serve.content_credentials import load_signer
from serve.encode import encode, source_type
from serve.messages import ImageFormat, OutputOptions
from serve.settings import C2paConfig

PEM = serialization.Encoding.PEM


def certificate(subject: str, key: ec.EllipticCurvePrivateKey, root: ec.EllipticCurvePrivateKey,
                *, authority: bool) -> bytes:  # fmt: skip
    """PEM, signed by `root`, with the extensions that C2PA wants of a signer."""
    now = datetime.datetime.now(datetime.UTC)

    def name(common: str) -> x509.Name:
        parts = ((NameOID.ORGANIZATION_NAME, "Test"), (NameOID.COMMON_NAME, common))
        return x509.Name([x509.NameAttribute(oid, value) for oid, value in parts])

    usage = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
         "encipher_only", "decipher_only"), False,
    )  # fmt: skip
    builder = (
        x509.CertificateBuilder(name("root"), name(subject), key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(authority, None), True)
        .add_extension(
            x509.KeyUsage(
                digital_signature=not authority, key_cert_sign=authority, crl_sign=authority,
                **usage,
            ), True,
        )
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(root.public_key()), False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
    )  # fmt: skip
    if not authority:
        purposes = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION])
        builder = builder.add_extension(purposes, False)
    return builder.sign(root, hashes.SHA256()).public_bytes(PEM)


@pytest.fixture
def signing(tmp_path: Path) -> C2paConfig:
    root, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    chain, private = tmp_path / "chain.pem", tmp_path / "key.pem"
    chain.write_bytes(
        certificate("leaf", key, root, authority=False)
        + certificate("root", root, root, authority=True)
    )
    unlocked = serialization.NoEncryption()
    private.write_bytes(key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, unlocked))
    return C2paConfig(certificates=chain, private_key=private)


@pytest.mark.parametrize("composite", [False, True])
@pytest.mark.parametrize("kind", get_args(ImageFormat))
def test_a_signed_picture_says_a_machine_made_it_and_shows_changes(
    kind: ImageFormat, composite: bool, signing: C2paConfig
) -> None:
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    plain = encode(image, OutputOptions(kind), {"Software": "Tessera"}, composite=composite)
    signed = load_signer(signing)(plain, kind, composite)
    with c2pa.Reader(f"image/{kind}", io.BytesIO(signed)) as reader:
        assert reader.get_validation_state() == "Valid"
        said = json.loads(reader.json())
    (actions,) = said["manifests"][said["active_manifest"]]["assertions"]
    (action,) = actions["data"]["actions"]
    made = source_type(composite)
    assert (action["action"], action["digitalSourceType"]) == ("c2pa.created", made)
    assert ("composite" in made) == composite and made.encode() in plain
    changed = bytearray(signed)
    changed[-20] ^= 1
    with c2pa.Reader(f"image/{kind}", io.BytesIO(bytes(changed))) as reader:
        assert reader.get_validation_state() == "Invalid"


def test_what_cannot_sign_is_said_at_the_start(signing: C2paConfig) -> None:
    signing.private_key.write_text("no key")
    with pytest.raises(ResourceError, match="c2pa cannot sign"):
        load_signer(signing)
    assert load_signer(None)(b"picture", "png", False) == b"picture"
