"""A status as OpenMetrics, by prometheus-client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import exposition

from guestio.control.schema import Latency, Status

CONTENT_TYPE: Final = exposition.CONTENT_TYPE_LATEST
PLAIN_CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
"""Of the text format that was there before OpenMetrics, which some tools only read."""

_QUEUE_COUNTERS: Final = (
    ("taken", "requests_taken", "Requests taken from the queue."),
    ("completed", "requests_completed", "Requests given back to the driver."),
    ("bytes", "request_bytes", "Bytes that the requests gave to read and to write."),
    ("notifications", "notifications", "Notifications that the driver wanted."),
)
_QUEUE_GAUGES: Final = (
    ("size", "Entries of the ring."),
    ("depth", "Requests taken and not given back."),
    ("held", "Requests that the device answers later."),
    ("running", "Whether the queue is served."),
    ("stalled", "Whether the queue waits for translations."),
)
OCTAVES: Final = tuple((1 << shift) / 1e9 for shift in range(10, 36))
"""Upper bounds of buckets, 1 us to 34 s."""


class _Registry:
    """What `generate_latest` asks: families, in their order."""

    def __init__(self, status: Status) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        return families(self._status)


def render(status: Status) -> bytes:
    """The metrics of a status, in the OpenMetrics text format."""
    text: bytes = exposition.generate_latest(_Registry(status))  # type: ignore[no-untyped-call] # as it is
    return text


def render_plain(status: Status) -> bytes:
    """The same in Prometheus' older text format."""
    text: bytes = generate_latest(_Registry(status))
    return text


def prefers_plain(accept: str) -> bool:
    """Whether a client names the older text format, and not OpenMetrics, as what it accepts."""
    accepted = [each.partition(";")[0].strip() for each in accept.split(",")]
    return "text/plain" in accepted and "application/openmetrics-text" not in accepted


def families(status: Status) -> Iterator[Metric]:
    """The metrics of a status."""
    info = InfoMetricFamily("guestio", "What is served.")
    info.add_metric(
        [],
        {
            "version": status["version"],
            "device": status["device"]["kind"],
            "transport": status["device"]["transport"],
        },
    )
    yield info
    for name, value in status["counts"].items():
        counter = CounterMetricFamily(f"guestio_{name}", f"The counter {name} of the server.")
        counter.add_metric([], value)
        yield counter
    yield from _queues(status)
    yield from _iotlb(status)
    yield _gauge("guestio_uptime_seconds", "Seconds of service.", status["process"]["uptime_s"])
    yield _gauge("guestio_connected", "Peers that are served now.", int(status["peer"] is not None))
    memory = sum(region["length_bytes"] for region in status["memory"])
    yield _gauge("guestio_memory_bytes", "Memory that the peer shares.", memory)
    yield _gauge("guestio_memory_regions", "Pieces of it.", len(status["memory"]))
    yield _gauge("guestio_written_pages", "Pages written, if counted.", status["dirty"]["pages"])
    used = GaugeMetricFamily(
        "guestio_budget_used", "How much of a limit is used.", labels=["budget"]
    )
    limit = GaugeMetricFamily("guestio_budget_limit", "A limit.", labels=["budget"])
    for name, budget in status["budgets"].items():
        used.add_metric([name], budget["used"])
        limit.add_metric([name], budget["limit"])
    yield from (used, limit)


def _gauge(name: str, text: str, value: float) -> Metric:
    gauge = GaugeMetricFamily(name, text)
    gauge.add_metric([], value)
    return gauge


def _queues(status: Status) -> Iterator[Metric]:
    for key, name, text in _QUEUE_COUNTERS:
        counter = CounterMetricFamily(f"guestio_queue_{name}", text, labels=["queue"])
        for queue in status["queues"]:
            counter.add_metric([str(queue["index"])], queue[key])  # type: ignore[literal-required]
        yield counter
    for key, text in _QUEUE_GAUGES:
        gauge = GaugeMetricFamily(f"guestio_queue_{key}", text, labels=["queue"])
        for queue in status["queues"]:
            value = queue[key]  # type: ignore[literal-required]
            gauge.add_metric([str(queue["index"])], int(value))
        yield gauge
    latency = HistogramMetricFamily(
        "guestio_request_latency_seconds",
        "From a request being found to its being given back.",
        labels=["queue", "operation"],
    )
    for queue in status["queues"]:
        for operation, measured in queue["latency"].items():
            _add(latency, [str(queue["index"]), operation], measured)
    yield latency


def _iotlb(status: Status) -> Iterator[Metric]:
    iotlb = status["iotlb"]
    if iotlb is None:
        return
    yield _gauge("guestio_iotlb_entries", "Translations.", iotlb["entries"])
    yield _gauge("guestio_iotlb_pending", "Misses without an answer yet.", iotlb["pending"])
    yield _gauge("guestio_iotlb_hit_rate", "The share of lookups that resolved.", iotlb["hit_rate"])
    latency = HistogramMetricFamily(
        "guestio_miss_latency_seconds", "How long answers to misses took.", labels=[]
    )
    _add(latency, [], iotlb["miss_latency"])
    yield latency


def _add(family: HistogramMetricFamily, labels: list[str], measured: Latency) -> None:
    """Add a histogram; what took longer than the last bound is only in +Inf."""
    buckets: list[tuple[str, float]] = []
    for bound in OCTAVES:
        count = sum(n for seconds, n in measured["buckets"] if seconds <= bound)
        buckets.append((repr(bound), count))
    buckets.append(("+Inf", measured["count"]))
    family.add_metric(labels, buckets, measured["sum_s"])
