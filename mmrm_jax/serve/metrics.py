"""What Prometheus is told, in a registry of the server's own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """Counters and histograms of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self.requests = Counter("mmrm_requests", "Requests answered.", ("path", "status"), registry=registry)
        self.seconds = Histogram(
            "mmrm_request_seconds",
            "From the last byte of a request to its answer.",
            ("path",),
            buckets=_SECONDS,
            registry=registry,
        )
        self.responses = Counter("mmrm_responses_scored", "Responses scored.", registry=registry)
        self.batches = Histogram(
            "mmrm_batch_groups",
            "Groups that ran through the model together.",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=registry,
        )
        self.model_seconds = Counter("mmrm_model_seconds", "Time in which the model ran.", registry=registry)
        self.waiting = Gauge(
            "mmrm_groups_waiting", "Groups that wait for their encoding or for the model.", registry=registry
        )
        self.ready = Gauge("mmrm_ready", "1 once the model is warm, 0 before and while stopping.", registry=registry)
        self.image_hits = Gauge("mmrm_image_cache_hits", "Images whose features were known.", registry=registry)

        self.prefix_hits = Gauge(
            "mmrm_prefix_cache_hits", "Groups whose image and prompt were read before.", registry=registry
        )

    def on_batch(self, groups: int, seconds: float) -> None:
        """Of a batch that ran."""
        self.batches.observe(groups)
        self.model_seconds.inc(seconds)
