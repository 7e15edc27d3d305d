"""What goes over OTLP is what `/metrics` shows: the same names, labels and values."""

import math
from dataclasses import dataclass

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)
from opentelemetry.proto.metrics.v1.metrics_pb2 import AggregationTemporality, Metric
from prometheus_client.parser import text_string_to_metric_families

from rdev.adapters.telemetry.otlp_metrics import MetricsEncoder
from rdev.adapters.telemetry.prometheus import PrometheusTelemetry
from rdev.domain.commands import Kind, Status
from rdev.domain.traces import TraceContext
from rdev.ports.telemetry import AuthFailure
from rdev.ports.tracing import within
from tests.fakes.otlp import metrics_of

TRACE = TraceContext(trace_id="4b" * 16, span_id="ab" * 8, is_sampled=True)
Series = dict[tuple[str, frozenset[tuple[str, str]]], float]


@dataclass(frozen=True, kw_only=True)
class Counted:
    taken: int
    is_open: bool


def busy() -> PrometheusTelemetry:
    """Something of every kind was told."""
    told = PrometheusTelemetry()
    for number, latency_s in enumerate((0.001, 0.3, 0.3, 7, 1_000)):
        told.request_started("GET", f"/x{number % 2}")
        with within(TRACE):
            told.request_finished("GET", f"/x{number % 2}", 200, latency_s)
    for kind in Kind:
        told.command_claimed(kind, 0.5)
        told.command_started("p", kind)
        told.command_finished("p", kind, Status.SUCCEEDED, 2.0)
    told.authenticated(AuthFailure.EXPIRED)
    told.rate_decided("key", refused=True)
    told.stream_written(0.002)
    told.webhook_attempted("accepted", 0.1)
    told.watch("queue", lambda: Counted(taken=3, is_open=True))
    told.watch_each("pool", {"a": lambda: Counted(taken=1, is_open=False)})
    return told


async def exported(telemetry: PrometheusTelemetry) -> dict[str, Metric]:
    encoder = MetricsEncoder({"service.instance.id": "one"}, since_ns=7)
    return metrics_of(ExportMetricsServiceRequest.FromString(await telemetry.read(encoder.encode)))


def labels_of(point: object, **more: str) -> frozenset[tuple[str, str]]:
    pairs = {(one.key, one.value.string_value) for one in point.attributes}  # type: ignore[attr-defined]
    return frozenset(pairs | set(more.items()))


def as_text_has_it(metrics: dict[str, Metric]) -> Series:
    """Series as Prometheus names them, made of what came over OTLP."""
    found: Series = {}
    for name, metric in metrics.items():
        for point in (*metric.sum.data_points, *metric.gauge.data_points):
            value = math.nan if point.flags else point.as_double
            found[name, labels_of(point)] = value
        for point in metric.histogram.data_points:
            found[f"{name}_count", labels_of(point)] = point.count
            found[f"{name}_sum", labels_of(point)] = point.sum
            below = 0
            for bound, count in zip(
                [*point.explicit_bounds, math.inf], point.bucket_counts, strict=True
            ):
                below += count
                le = "+Inf" if bound == math.inf else repr(bound)
                found[f"{name}_bucket", labels_of(point, le=le)] = below
    return found


async def test_names_labels_and_values_are_those_of_the_exposition() -> None:
    telemetry = busy()
    text, _ = await telemetry.render("text/plain")
    shown: Series = {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }
    found = as_text_has_it(await exported(telemetry))

    # The libraries' own move between two looks.
    moving = ("process_", "python_gc")
    wanted = {key: value for key, value in shown.items() if not key[0].startswith(moving)}
    assert len(wanted) > 150
    assert set(shown) == set(found)
    for key, value in wanted.items():
        assert found[key] == value or (math.isnan(value) and math.isnan(found[key])), key


async def test_counts_are_cumulative_since_the_start_and_only_grow() -> None:
    metrics = await exported(busy())
    total = metrics["http_requests_total"].sum
    duration = metrics["http_request_duration_seconds"].histogram

    cumulative = AggregationTemporality.AGGREGATION_TEMPORALITY_CUMULATIVE
    assert total.aggregation_temporality == duration.aggregation_temporality == cumulative
    assert total.is_monotonic
    points = (*total.data_points, *duration.data_points)
    assert {point.start_time_unix_nano for point in points} == {7}
    assert all(point.time_unix_nano > 7 for point in points)


async def test_exemplars_name_their_trace() -> None:
    metrics = await exported(busy())
    (one, other) = metrics["http_request_duration_seconds"].histogram.data_points
    found = [*one.exemplars, *other.exemplars]

    assert {exemplar.trace_id.hex() for exemplar in found} == {TRACE.trace_id}
    assert {exemplar.as_double for exemplar in found} == {0.001, 0.3, 7, 1_000}


async def test_what_has_no_number_says_so() -> None:
    (depth, *_) = (await exported(busy()))["rdev_queue_depth"].gauge.data_points

    assert depth.flags == 1
