"""A real S3 protocol endpoint (moto's server) that can be told to fail now and then."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import boto3
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server


@dataclass
class S3:
    """An endpoint on this machine.

    Attributes:
        fail_every: every n-th GET of an object is answered with status 503; 0: none is.
        failed: how many GETs were.
        gets: how many GETs of objects came while `fail_every` was set.
    """

    port: int = 0
    fail_every: int = 0
    failed: int = 0
    gets: int = 0

    def uri(self, path: str) -> str:
        """The s3:// URI of a path, with the options by which PyArrow reaches this endpoint."""
        return (
            f"s3://testing:testing@{path}?scheme=http&region=us-east-1"
            f"&endpoint_override=127.0.0.1%3A{self.port}"
        )

    def client(self) -> Any:
        return boto3.client(
            "s3", endpoint_url=f"http://127.0.0.1:{self.port}", region_name="us-east-1",
            aws_access_key_id="testing", aws_secret_access_key="testing",
        )  # fmt: skip


@contextmanager
def s3_server() -> Iterator[S3]:
    """An empty S3 with a bucket called "bucket"."""
    moto = DomainDispatcherApplication(create_backend_app)
    state, lock = S3(), threading.Lock()

    def application(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        is_object = environ["REQUEST_METHOD"] == "GET" and environ["PATH_INFO"].count("/") > 1
        if is_object and state.fail_every:
            with lock:
                state.gets += 1
                fails = state.gets % state.fail_every == 0
                state.failed += fails
            if fails:
                start_response("503 Slow Down", [("Content-Type", "text/plain")])
                return [b"slow down"]
        return moto(environ, start_response)  # type: ignore[no-any-return]

    server = make_server("127.0.0.1", 0, application, threaded=True)
    state.port = server.port
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        state.client().create_bucket(Bucket="bucket")
        yield state
    finally:
        server.shutdown()
        thread.join()
