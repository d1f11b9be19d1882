"""What Prometheus sees at /metrics: the ingress counts, replicas report with every picture."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from serve.pictures import Card, Picture

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
            "where a picture's time goes: queue, model, encode; request is its whole answer",
            ["stage"],
            buckets=_SECONDS,
            registry=to,
        )
        self.batch_size = Histogram(
            "tessera_batch_size",
            "pictures drawn together, counted once a picture",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=to,
        )
        self.pictures = Counter(
            "tessera_pictures", "pictures drawn", ["model_version"], registry=to
        )
        self.cached = Counter(
            "tessera_result_cache", "pictures looked up in the result cache", ["found"], registry=to
        )
        self.model = Gauge(
            "tessera_model_info",
            "1 for what is served",
            ["model", "version", "notice"],
            registry=to,
        )
        self.waiting = Gauge(
            "tessera_waiting_pictures", "pictures accepted and not yet drawn", registry=to
        )

    def drawn(self, picture: Picture) -> None:
        """Count a picture and where its time went."""
        self.pictures.labels(picture.card.version).inc()
        if picture.timing is not None:
            self.stages.labels("queue").observe(picture.timing.queue)
            self.stages.labels("model").observe(picture.timing.model)
            self.stages.labels("encode").observe(picture.timing.encode)
            self.batch_size.observe(picture.timing.batch_size)

    def render(self, card: Card | None, waiting: Callable[[], int]) -> bytes:
        """Everything in Prometheus' text format.

        Args:
            card: of what is served, if that is known.
            waiting: pictures accepted and not yet drawn.
        """
        self.model.clear()
        if card is not None:
            self.model.labels(card.name, card.version, card.notice).set(1)
        self.waiting.set(waiting())
        return generate_latest(self._registry)
