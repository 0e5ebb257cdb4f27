"""What the server counts, for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from dlm_jax.serving.batcher import Batcher

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """The counters of one server."""

    def __init__(self, batcher: Batcher) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("dlm_requests", "Requests answered", ("path", "status"), registry=self.registry)
        self.prompt_tokens = Counter("dlm_prompt_tokens", "Tokens of prompts", registry=self.registry)
        self.tokens = Counter("dlm_tokens", "Tokens written", registry=self.registry)
        self.seconds = Histogram("dlm_request_seconds", "From a request to the end of its answer", buckets=SECONDS,
                                 registry=self.registry)
        self.first_text = Histogram("dlm_first_text_seconds", "From a request to the first text of its stream",
                                    buckets=SECONDS, registry=self.registry)
        for name, what, value in (("dlm_waiting", "Sequences that wait for a row", lambda: len(batcher.waiting)),
                                  ("dlm_active", "Sequences that have a row", lambda: batcher.active),
                                  ("dlm_forward_passes", "Forward passes so far", lambda: batcher.passes)):
            Gauge(name, what, registry=self.registry).set_function(value)

    def text(self) -> bytes:
        """All of them in Prometheus' format."""
        return generate_latest(self.registry)
