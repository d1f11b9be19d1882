"""What Prometheus reads at /metrics: requests, and where each image's time went. The ingress counts
the requests; the replicas report the times."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from serve.messages import GeneratedImage, ModelInfo

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """One application's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = to = CollectorRegistry()
        self.requests = Counter(
            "tessera_requests", "requests answered", ["route", "status", "code"], registry=to
        )
        self.stages = Histogram(
            "tessera_stage_seconds",
            "where an image's time goes: queue, model, encode; request is its whole answer",
            ["stage"],
            buckets=_SECONDS,
            registry=to,
        )
        self.batch_size = Histogram(
            "tessera_batch_size",
            "images generated together, counted once per image",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=to,
        )
        self.images = Counter(
            "tessera_pictures", "images generated", ["model_version"], registry=to
        )
        self.cached = Counter(
            "tessera_result_cache", "images looked up in the result cache", ["found"], registry=to
        )
        self.model = Gauge(
            "tessera_model_info",
            "1 for the served model",
            ["model", "version", "notice"],
            registry=to,
        )
        self.waiting = Gauge(
            "tessera_waiting_pictures", "images accepted and not yet generated", registry=to
        )

    def record_image(self, image: GeneratedImage) -> None:
        """Count an image and where its time went."""
        self.images.labels(image.model.version).inc()
        if image.timing is not None:
            self.stages.labels("queue").observe(image.timing.queue)
            self.stages.labels("model").observe(image.timing.model)
            self.stages.labels("encode").observe(image.timing.encode)
            self.batch_size.observe(image.timing.batch_size)

    def render(self, model: ModelInfo | None, num_waiting: int) -> bytes:
        """Everything in Prometheus' text format.

        Args:
            model: the served model, if it is known yet.
            num_waiting: images accepted and not yet generated.
        """
        self.model.clear()
        if model is not None:
            self.model.labels(model.name, model.version, model.notice).set(1)
        self.waiting.set(num_waiting)
        return generate_latest(self._registry)
