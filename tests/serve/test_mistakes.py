"""Whatever a client gets wrong, over real HTTP: OpenAI's envelope, exact status, field and code."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from harness import Running

OK = {"prompt": "a cat"}
MISTAKES: list[tuple[dict[str, Any], int, str | None, str]] = [
    ({}, 400, "prompt", "missing_required_parameter"),
    ({"prompt": None}, 400, "prompt", "missing_required_parameter"),
    ({"prompt": ""}, 400, "prompt", "missing_required_parameter"),
    ({"prompt": " \n "}, 400, "prompt", "missing_required_parameter"),
    ({"prompt": "a" * 32_001}, 400, "prompt", "invalid_value"),
    ({"prompt": "a\0cat"}, 400, "prompt", "invalid_value"),
    ({"prompt": "a\x1b[2Jcat"}, 400, "prompt", "invalid_value"),
    ({"prompt": 5}, 400, "prompt", "invalid_type"),
    ({"prompt": ["a cat"]}, 400, "prompt", "invalid_type"),
    ({**OK, "n": 0}, 400, "n", "invalid_value"),
    ({**OK, "n": 11}, 400, "n", "invalid_value"),
    ({**OK, "n": "two"}, 400, "n", "invalid_type"),
    ({**OK, "n": "11"}, 400, "n", "invalid_value"),
    ({**OK, "n": "1.5"}, 400, "n", "invalid_type"),
    ({**OK, "n": "9" * 5000}, 400, "n", "invalid_type"),
    ({**OK, "sede": ""}, 400, "sede", "unknown_parameter"),
    ({**OK, "sede": None}, 400, "sede", "unknown_parameter"),
    ({**OK, "n": 1.5}, 400, "n", "invalid_type"),
    ({**OK, "n": True}, 400, "n", "invalid_type"),
    ({**OK, "n": 10**400}, 400, "n", "invalid_value"),
    ({**OK, "size": "2049x64"}, 400, "size", "invalid_value"),
    ({**OK, "size": "64x15"}, 400, "size", "invalid_value"),
    ({**OK, "size": "64"}, 400, "size", "invalid_value"),
    ({**OK, "size": "huge"}, 400, "size", "invalid_value"),
    ({**OK, "size": 64}, 400, "size", "invalid_type"),
    ({**OK, "response_format": "jpeg"}, 400, "response_format", "invalid_value"),
    ({**OK, "output_format": "gif"}, 400, "output_format", "invalid_value"),
    (
        {**OK, "output_compression": 101, "output_format": "jpeg"},
        400,
        "output_compression",
        "invalid_value",
    ),
    ({**OK, "background": "transparent"}, 400, "background", "invalid_value"),
    ({**OK, "user": "u" * 257}, 400, "user", "invalid_value"),
    ({**OK, "negative_prompt": "a\0b"}, 400, "negative_prompt", "invalid_value"),
    ({**OK, "stream": "yes"}, 400, "stream", "invalid_type"),
    ({**OK, "stream": True, "partial_images": 4}, 400, "partial_images", "invalid_value"),
    ({"prompt": "child pornography"}, 400, "prompt", "content_policy_violation"),
    ({**OK, "moderation": "strict"}, 400, "moderation", "invalid_value"),
    ({**OK, "n": 10**9}, 400, "n", "invalid_value"),
    ({**OK, "seed": 2**64}, 400, "seed", "invalid_value"),
    ({**OK, "seed": -2}, 400, "seed", "invalid_value"),
    ({**OK, "seed": 2**63}, 400, "seed", "invalid_value"),
    ({**OK, "seed": "seven"}, 400, "seed", "invalid_type"),
    ({**OK, "guidance_scale": 0.5}, 400, "guidance_scale", "invalid_value"),
    ({**OK, "guidance_scale": 20.5}, 400, "guidance_scale", "invalid_value"),
    ({**OK, "guidance_scale": "high"}, 400, "guidance_scale", "invalid_type"),
    ({**OK, "style": "cubist"}, 400, "style", "invalid_value"),
    ({**OK, "style": 3}, 400, "style", "invalid_type"),
    ({**OK, "temperature": -0.1}, 400, "temperature", "invalid_value"),
    ({**OK, "num_steps": 0}, 400, "num_steps", "invalid_value"),
    ({**OK, "num_steps": 65}, 400, "num_steps", "invalid_value"),
    ({**OK, "negative": "dogs"}, 400, "negative", "unknown_parameter"),
    ({**OK, "quality": "ultra"}, 400, "quality", "invalid_value"),
    ({**OK, "input_fidelity": "none"}, 400, "input_fidelity", "invalid_value"),
    ({**OK, "guidance": 3}, 400, "guidance", "unknown_parameter"),
    ({**OK, "x" * 500: 1}, 400, "x" * 64, "unknown_parameter"),
    ({**OK, "model": "sdxl"}, 404, "model", "model_not_found"),
    ({**OK, "model": 7}, 400, "model", "invalid_type"),
]


def check_envelope(answer: httpx.Response, status: int, param: str | None, code: str) -> None:
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (status, param, code)
    assert set(error) == {"message", "type", "param", "code"}
    assert (
        answer.json().keys() == {"error", "detail"} and answer.json()["detail"] == error["message"]
    )
    assert error["type"] == "invalid_request_error"
    assert 0 < len(error["message"]) < 400 and "Traceback" not in error["message"]


@pytest.mark.parametrize(("body", "status", "param", "code"), MISTAKES)
def test_mistakes_in_a_request(
    server: Running, body: dict[str, Any], status: int, param: str | None, code: str
) -> None:
    check_envelope(server.post(body), status, param, code)


JSON = {"content-type": "application/json"}
RAW: list[tuple[str, str, bytes, dict[str, str], int, str | None, str]] = [
    ("POST", "images/generations", b"{", JSON, 400, None, "invalid_json"),
    ("POST", "images/generations", b"", JSON, 400, None, "invalid_json"),
    ("POST", "images/generations", b"[" * 10_000, JSON, 400, None, "invalid_json"),
    ("POST", "images/generations", b'{"prompt": "\xff"}', JSON, 400, None, "invalid_json"),
    ("POST", "images/generations", b'{"prompt": "\\ud800"}', JSON, 400, None, "invalid_json"),
    ("POST", "images/generations", b"[1]", JSON, 400, None, "invalid_type"),
    (
        "POST",
        "images/generations",
        b'{"prompt": "a", "guidance_scale": NaN}',
        JSON,
        400,
        "guidance_scale",
        "invalid_value",
    ),
    (
        "POST",
        "images/generations",
        b'{"prompt": "a", "seed": ' + b"1" * 5000 + b"}",
        JSON,
        400,
        None,
        "invalid_json",
    ),
    ("POST", "images/generations", b"{}", {}, 415, None, "unsupported_media_type"),
    (
        "POST",
        "images/generations",
        b"prompt=a",
        {"content-type": "text/plain"},
        415,
        None,
        "unsupported_media_type",
    ),
    ("POST", "images/generations", b" " * 1_000_001, JSON, 413, None, "request_too_large"),
    ("GET", "images/generations", b"", {}, 405, None, "method_not_allowed"),
    ("POST", "images/generations/", b"{}", JSON, 404, None, "unknown_url"),
    ("GET", "nothing/%00/here", b"", {}, 404, None, "unknown_url"),
    ("GET", "models/sdxl", b"", {}, 404, "model", "model_not_found"),
]


@pytest.mark.parametrize(("method", "path", "body", "headers", "status", "param", "code"), RAW)
def test_mistakes_in_http(
    server: Running,
    method: str,
    path: str,
    body: bytes,
    headers: dict[str, str],
    status: int,
    param: str | None,
    code: str,
) -> None:
    with server.http() as http:
        answer = http.request(method, f"/v1/{path}", content=body, headers=headers)
    check_envelope(answer, status, param, code)


def test_a_long_body_without_a_length_is_cut_off(server: Running) -> None:
    with server.http() as http:
        chunks = (b" " * 100_000 for _ in range(20))
        answer = http.post("/v1/images/generations", content=chunks, headers=JSON)
    check_envelope(answer, 413, None, "request_too_large")


def test_messages_name_value_limit_and_remedy(server: Running) -> None:
    def message(**body: Any) -> str:
        text: str = server.post(OK | body).json()["error"]["message"]
        return text

    assert message(n=11) == "n=11: Input should be less than or equal to 10"
    assert "16 to 2048" in message(size="4096x64") and "4096x64" in message(size="4096x64")
    assert "noto, twemoji" in message(style="cubist")
    assert "did you mean 'guidance_scale'?" in message(guidance_scal=3)
