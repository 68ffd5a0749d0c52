"""Prometheus metrics, under our own prefix and, for existing dashboards, vLLM's."""

from collections.abc import Iterator, Sequence

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.registry import Collector

from engine.messages import Finished, FinishReason, Request, StepStats
from engine.prepare import ModelInfo

# fmt: off
_TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5,
           10, 20, 40, 80, 160, 640, 2560)
_GAP_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5,
          10, 20, 40, 80)
_PHASE_S = (0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60,
            120, 240, 480, 960, 1920, 7680)
_LAG_S = (0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1)
# fmt: on
_COPIES = (1, 2, 5, 10, 20)
_PREEMPTIONS = (0, 1, 2, 3, 4, 5, 10, 20)
_STEP_TOKENS = tuple(2**power for power in range(14))

_GAUGES = {
    "num_requests_running": "Sequences in the batch",
    "num_requests_waiting": "Sequences waiting for a place in the batch",
    "kv_cache_usage_perc": "Referenced part of the KV cache, 0 to 1",
}
_COUNTERS = {
    "prefix_cache_queries": "Prompt tokens looked up in the prefix cache",
    "prefix_cache_hits": "Prompt tokens found in the prefix cache",
    "num_preemptions": "Sequences' groups put back into the queue for lack of memory",
    "prompt_tokens": "Prompt tokens of finished requests",
    "prompt_tokens_cached": "Prompt tokens of finished requests that came from the prefix cache",
    "generation_tokens": "Generated tokens of finished requests",
}
_SECONDS = {
    "time_to_first_token_seconds": (_TTFT_S, "From arrival to the first token"),
    "inter_token_latency_seconds": (_GAP_S, "Between two tokens of a sequence"),
    "request_time_per_output_token_seconds": (_GAP_S, "A request's mean time per token"),
    "e2e_request_latency_seconds": (_PHASE_S, "From arrival to the last token"),
    "request_queue_time_seconds": (_PHASE_S, "From arrival to the first computed token"),
    "request_prefill_time_seconds": (_PHASE_S, "From there to the first generated token"),
    "request_decode_time_seconds": (_PHASE_S, "From the first to the last generated token"),
    "request_inference_time_seconds": (_PHASE_S, "In the batch: prefill and decode"),
}
_COUNTS = {
    "request_prompt_tokens": "Prompt tokens of a request",
    "request_generation_tokens": "Generated tokens of a request",
    "request_params_max_tokens": "max_tokens of a request",
    "request_max_num_generation_tokens": "Generated tokens of a request's longest choice",
    "request_prefill_kv_computed_tokens": "Prompt tokens a request computed, not from the cache",
}


class _Prefixed(Collector):
    """What a registry holds, under a prefix."""

    def __init__(self, registry: CollectorRegistry, prefix: str) -> None:
        self._registry, self._prefix = registry, prefix

    def collect(self) -> Iterator[Metric]:
        for family in self._registry.collect():
            metric = Metric(f"{self._prefix}:{family.name}", family.documentation, family.type)
            metric.samples = [
                sample._replace(name=f"{self._prefix}:{sample.name}") for sample in family.samples
            ]
            yield metric


class Metrics:
    """All metrics of a server. Used on the event loop only, so scraping never waits."""

    def __init__(self, model_name: str, with_vllm_names: bool) -> None:
        disable_created_metrics()  # a second series for each counter that nobody reads
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self._own = CollectorRegistry()  # without a prefix
        for prefix in ("logitmill", "vllm") if with_vllm_names else ("logitmill",):
            self.registry.register(_Prefixed(self._own, prefix))
        self._labels = {"model_name": model_name, "engine": "0"}
        names, own = list(self._labels), self._own
        self._gauges = {
            name: Gauge(name, text, names, registry=own).labels(**self._labels)
            for name, text in _GAUGES.items()
        }
        by_reason = Gauge(
            "num_requests_waiting_by_reason",
            "Waiting sequences by reason",
            [*names, "reason"],
            registry=own,
        )
        self._waiting_for_capacity = by_reason.labels(**self._labels, reason="capacity")
        by_reason.labels(**self._labels, reason="deferred")  # which none ever is
        self._counters = {
            name: Counter(name, text, names, registry=own).labels(**self._labels)
            for name, text in _COUNTERS.items()
        }
        self._success = Counter(
            "request_success",
            "Ended sequences by reason",
            [*names, "finished_reason"],
            registry=own,
        )
        for reason in (*FinishReason, "abort", "error"):
            self._success.labels(**self._labels, finished_reason=reason)
        self._rejections = Counter(
            "admission_rejections",
            "Requests refused for load",
            ["model_name", "reason"],
            registry=own,
        )
        histograms = _SECONDS | {
            "request_params_n": (_COPIES, "n of a request"),
            "request_num_preemptions": (_PREEMPTIONS, "How often a request was preempted"),
            "iteration_tokens_total": (_STEP_TOKENS, "Tokens computed in a step"),
        }
        self._histograms = {
            name: self._histogram(name, text, buckets)
            for name, (buckets, text) in histograms.items()
        }
        self._ignored = Counter(
            "logitmill:ignored_fields",
            "Unknown request fields that were ignored",
            registry=self.registry,
        )
        self._lag = Histogram(
            "logitmill:event_loop_lag_seconds",
            "How late the event loop comes to what is due",
            buckets=_LAG_S,
            registry=self.registry,
        )
        self._http = Counter(
            "http_requests",
            "Answered requests",
            ["method", "handler", "status"],
            registry=self.registry,
        )
        self._http_seconds = Histogram(
            "http_request_duration_seconds",
            "From a request's first byte to its answer's last",
            ["method", "handler"],
            buckets=_PHASE_S,
            registry=self.registry,
        )
        self._last = StepStats()

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        labels = list(self._labels)
        metric = Histogram(name, text, labels, buckets=buckets, registry=self._own)
        return metric.labels(**self._labels)

    # -- what happened

    def set_model(self, info: ModelInfo) -> None:
        """The model is loaded: its context bounds what is counted per request."""
        lengths = _one_two_five(info.context_len)
        for name, text in _COUNTS.items():
            self._histograms[name] = self._histogram(name, text, lengths)
        layout = {
            "block_size": str(info.block_size),
            "num_gpu_blocks": str(info.num_blocks),
            "cache_dtype": info.dtype,
        }
        names = [*self._labels, *layout]
        gauge = Gauge("cache_config_info", "Layout of the KV cache", names, registry=self._own)
        gauge.labels(**self._labels, **layout).set(1)

    def on_step(self, stats: StepStats) -> None:
        """A step was computed."""
        self._gauges["num_requests_running"].set(stats.num_running)
        self._gauges["num_requests_waiting"].set(stats.num_waiting)
        self._gauges["kv_cache_usage_perc"].set(stats.kv_usage)
        self._waiting_for_capacity.set(stats.num_waiting)
        last = self._last
        self._count("prefix_cache_queries", stats.cache_queries - last.cache_queries)
        self._count("prefix_cache_hits", stats.cache_hits - last.cache_hits)
        self._count("num_preemptions", stats.num_preemptions - last.num_preemptions)
        self._last = stats
        if stats.num_tokens:
            self._observe("iteration_tokens_total", stats.num_tokens)
        for gap_s in stats.token_gaps_s:
            self._observe("inter_token_latency_seconds", gap_s)

    def on_finished(self, request: Request, finished: Finished) -> None:
        """A request succeeded."""
        self._count("prompt_tokens", finished.prompt_tokens)
        self._count("prompt_tokens_cached", finished.cached_tokens)
        self._count("generation_tokens", finished.completion_tokens)
        for reason in finished.finish_reasons:
            self._end(reason)
        first_s = finished.first_token_s or finished.finished_s
        decode_s = finished.finished_s - first_s
        self._observe("time_to_first_token_seconds", first_s - finished.arrival_s)
        self._observe("e2e_request_latency_seconds", finished.finished_s - finished.arrival_s)
        self._observe("request_queue_time_seconds", finished.scheduled_s - finished.arrival_s)
        self._observe("request_prefill_time_seconds", first_s - finished.scheduled_s)
        self._observe("request_decode_time_seconds", decode_s)
        self._observe("request_inference_time_seconds", finished.finished_s - finished.scheduled_s)
        if finished.longest_tokens > 1:
            mean_s = decode_s / (finished.longest_tokens - 1)
            self._observe("request_time_per_output_token_seconds", mean_s)
        computed = finished.prompt_tokens - finished.cached_tokens
        self._observe("request_prompt_tokens", finished.prompt_tokens)
        self._observe("request_generation_tokens", finished.completion_tokens)
        self._observe("request_max_num_generation_tokens", finished.longest_tokens)
        self._observe("request_params_max_tokens", request.max_tokens)
        self._observe("request_prefill_kv_computed_tokens", computed)
        self._observe("request_params_n", request.params.n)
        self._observe("request_num_preemptions", finished.num_preemptions)

    def on_abort(self, request: Request) -> None:
        """A client went away."""
        for _ in range(request.params.num_sequences):
            self._end("abort")

    def on_error(self, request: Request) -> None:
        """A request failed."""
        for _ in range(request.params.num_sequences):
            self._end("error")

    def on_rejection(self, reason: str) -> None:
        self._rejections.labels(model_name=self._labels["model_name"], reason=reason).inc()

    def on_lag(self, seconds: float) -> None:
        """The event loop was that late."""
        self._lag.observe(seconds)

    def on_ignored(self, num_fields: int) -> None:
        self._ignored.inc(num_fields)

    def on_response(self, method: str, handler: str, status: int, seconds: float) -> None:
        """An HTTP request was answered; `handler` is a route's path, never a client's."""
        self._http.labels(method, handler, str(status)).inc()
        self._http_seconds.labels(method, handler).observe(seconds)

    def export(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)

    def _count(self, name: str, amount: float) -> None:
        self._counters[name].inc(amount)

    def _observe(self, name: str, value: float) -> None:
        self._histograms[name].observe(value)

    def _end(self, reason: str) -> None:
        self._success.labels(**self._labels, finished_reason=reason).inc()


def _one_two_five(largest: int) -> list[int]:
    """1, 2, 5, 10, 20 … up to `largest`."""
    buckets: list[int] = []
    scale = 1
    while scale <= largest:
        buckets += [digit * scale for digit in (1, 2, 5) if digit * scale <= largest]
        scale *= 10
    return buckets
