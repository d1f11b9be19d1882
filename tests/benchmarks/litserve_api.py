"""The LitServe API that peers.py serves, in a module that LitServe's workers can import.

It is a module of its own because the workers unpickle the API. It must not postpone the evaluation
of annotations (no `from __future__ import annotations`): LitServe reads those of decode_request.
"""

import argparse
from typing import Any

import litserve
from peers import PATH, load, png
from torch import Tensor

from pipeline.contracts import GenerationRequest


class Api(litserve.LitAPI):
    """Batches as peers.py's arguments say."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(
            max_batch_size=args.batch_size, batch_timeout=args.batch_wait_s, api_path=PATH
        )
        self.args = args

    def setup(self, device: str) -> None:
        self.drawer = load(self.args)

    def decode_request(self, request: dict[str, Any]) -> GenerationRequest:
        return GenerationRequest(request["prompt"], seed=request["seed"])

    def batch(self, inputs: list[GenerationRequest]) -> list[GenerationRequest]:
        return list(inputs)

    def predict(self, inputs: list[GenerationRequest]) -> Tensor:
        return self.drawer.generate(inputs)

    def unbatch(self, output: Tensor) -> list[Tensor]:
        return list(output)

    def encode_response(self, output: Tensor) -> dict[str, str]:
        return {"b64_json": png(output)}
