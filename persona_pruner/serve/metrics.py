"""What /metrics tells Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from persona_pruner.serve.worker import Engine

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counts of requests, and of what the fleet has done, under `persona_pruner_`."""

    def __init__(self, engine: Engine):
        self.engine, self.registry = engine, CollectorRegistry()
        common = {"namespace": "persona_pruner", "registry": self.registry}
        self.requests = Counter("requests", "Requests by route and status.", ("route", "status"), **common)
        self.tokens = Counter("answer_tokens", "Tokens of answers, by model name.", ("model",), **common)
        self.first = Histogram("first_token_seconds", "Until the first token.", buckets=SECONDS, **common)
        self.whole = Histogram("request_seconds", "Until the last token.", buckets=SECONDS, **common)
        self.registry.register(self)

    def collect(self):
        stats, name = self.engine.stats, "persona_pruner_"
        for key, text in (
            ("running", "Requests being answered."),
            ("queued", "Requests waiting."),
            ("characters", "Characters that are served."),
            ("kv_used", "Bytes of keys and values in use."),
            ("kv_bytes", "Bytes that keys and values may take."),
            ("base_bytes", "Bytes of the base model's weights."),
        ):
            yield GaugeMetricFamily(name + key, text, stats[key])
        for key, text in (
            ("tokens", "Tokens generated."),
            ("prompt_tokens", "Tokens of prompts computed."),
            ("prompt_tokens_reused", "Tokens of prompts found in the cache."),
            ("steps", "Steps of the scheduler."),
        ):
            yield CounterMetricFamily(name + key, text, stats[key])

    def text(self) -> bytes:
        return generate_latest(self.registry)
