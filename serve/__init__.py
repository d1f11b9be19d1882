"""The image API: a FastAPI ingress over autoscaled, batching generator replicas, on Ray Serve.

This package is imported as `from serve.schemas import ...`; `from ray import serve` stays Ray's.
"""
