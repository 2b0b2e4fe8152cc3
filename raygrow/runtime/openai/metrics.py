"""Figures of the API for Prometheus. Those of engines are at Ray's own endpoint, for every replica."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

FIRST_TOKEN_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
NEXT_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """The figures of one app, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("raygrow_requests", "Answered requests", ["route", "status"], registry=registry)
        self.open = Gauge("raygrow_requests_open", "Sequences asked for, not yet ended", ["model"], registry=registry)
        self.first_token = Histogram(
            "raygrow_time_to_first_token_seconds",
            "From a request to the first token of an answer",
            ["model"],
            buckets=FIRST_TOKEN_BUCKETS,
            registry=registry,
        )
        self.next_token = Histogram(
            "raygrow_time_per_output_token_seconds",
            "Mean time of the tokens of an answer after its first",
            ["model"],
            buckets=NEXT_TOKEN_BUCKETS,
            registry=registry,
        )
        self.prompt_tokens = Counter("raygrow_prompt_tokens", "Tokens of prompts", ["model"], registry=registry)
        self.new_tokens = Counter("raygrow_generation_tokens", "New tokens", ["model"], registry=registry)
