"""The served OpenAPI schema is true: schemathesis asks for what it allows and what it forbids."""

from __future__ import annotations

import harness
import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import APIOperation, BaseSchema, Case, GenerationMode
from schemathesis.specs.openapi.checks import negative_data_rejection
from test_features import mask, png

from pipeline.contracts import MAX_SEED


@pytest.fixture(scope="module")
def schema(server: harness.Running) -> BaseSchema:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def check(schema: BaseSchema, mode: GenerationMode, examples: int) -> dict[str, set[int]]:
    """Send every operation so many cases; which statuses came, by operation."""
    operations = [found.ok() for found in schema.get_all_operations()]
    if mode is GenerationMode.NEGATIVE:  # a bare GET leaves nothing to get wrong
        operations = [operation for operation in operations if operation.body]
    return {operation.label: _statuses(operation, mode, examples) for operation in operations}


def _statuses(operation: APIOperation, mode: GenerationMode, examples: int) -> set[int]:
    statuses = set[int]()

    @settings(
        max_examples=examples, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=operation.as_strategy(generation_mode=mode))
    def send(case: Case) -> None:
        if mode is GenerationMode.POSITIVE:
            _what_no_schema_says(case)
        # a picture's bytes are no JSON string, so every form looks negative to that check
        unfit = [negative_data_rejection] if mode is GenerationMode.POSITIVE else []
        statuses.add(case.call_and_validate(excluded_checks=unfit).status_code)

    send()
    return statuses


def _what_no_schema_says(case: Case) -> None:
    """Names and sizes are the served model's, random bytes are no picture, and some fields go
    together: a request that the schema allows field by field is made one that makes sense."""
    if case.path_parameters:
        linked = case.path.startswith("/files/")
        case.path_parameters["name"] = _image_name(case) if linked else "champion"
    for header in ("x-deadline-s", "idempotency-key"):  # too short a time; a key that was used
        case.headers.pop(header, None)
    if not isinstance(case.body, dict):
        return
    unwanted = {"model", "style"}
    seed = case.body.get("seed")
    if isinstance(seed, (int, float)) and seed > MAX_SEED:  # it lost its last digits as a float
        unwanted.add("seed")
    if case.body.get("n") and case.body.get("size"):
        case.body["size"] = "auto"  # ten images of 2048 x 2048 would take minutes
    for field in unwanted & case.body.keys():
        del case.body[field]
    case.body |= {name: png(mask()) for name in ("image", "mask") if name in case.body}


def _image_name(case: Case) -> str:
    """Of an image that the server links to."""
    base = str(case.operation.base_url).removesuffix("/")
    answer = httpx.post(
        f"{base}/v1/images/generations", json={"prompt": "a", "response_format": "url"}
    )
    return str(answer.json()["data"][0]["url"].rpartition("/")[2])


@pytest.mark.parametrize("examples", [6, pytest.param(300, marks=pytest.mark.slow)])
def test_what_the_schema_allows_is_drawn(schema: BaseSchema, examples: int) -> None:
    seen = check(schema, GenerationMode.POSITIVE, examples)
    assert len(seen) == 9 and all(statuses == {200} for statuses in seen.values()), seen


@pytest.mark.parametrize("examples", [6, pytest.param(500, marks=pytest.mark.slow)])
def test_what_the_schema_forbids_is_refused(schema: BaseSchema, examples: int) -> None:
    seen = check(schema, GenerationMode.NEGATIVE, examples)
    assert len(seen) == 3 and all(400 in statuses for statuses in seen.values()), seen
