"""The metrics of the Prometheus registry as an OTLP request: the same names, labels and values.

Source: "Prometheus and OpenMetrics Compatibility" of the OpenTelemetry specification, from the
exposition to OTLP; names stay as `GET /metrics` has them, as its collector's receiver keeps them.
All counts are cumulative, since `since_ns`. Bounds: the registry's own series.
"""

import math
import time
from collections.abc import Iterable, Iterator

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, InstrumentationScope, KeyValue
from opentelemetry.proto.metrics.v1.metrics_pb2 import (
    AggregationTemporality,
    DataPointFlags,
    Exemplar,
    Gauge,
    Histogram,
    HistogramDataPoint,
    Metric,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
)
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.samples import Exemplar as FoundExemplar
from prometheus_client.samples import Sample

from rdev import __version__

_CUMULATIVE = AggregationTemporality.AGGREGATION_TEMPORALITY_CUMULATIVE
_NO_VALUE = DataPointFlags.DATA_POINT_FLAGS_NO_RECORDED_VALUE_MASK


class MetricsEncoder:
    """Makes requests of a registry; called in a thread."""

    def __init__(self, resource: dict[str, str], *, since_ns: int | None = None) -> None:
        """`since_ns`: when counting began; now."""
        self._resource = Resource(attributes=_attributes(resource))
        self._since_ns = time.time_ns() if since_ns is None else since_ns

    def encode(self, registry: CollectorRegistry) -> bytes:
        """All metrics as they are."""
        now_ns = time.time_ns()
        metrics = [
            metric
            for family in registry.collect()
            if (metric := self._metric(family, now_ns)) is not None
        ]
        scope = ScopeMetrics(
            scope=InstrumentationScope(name="rdev", version=__version__), metrics=metrics
        )
        told = ResourceMetrics(resource=self._resource, scope_metrics=[scope])
        encoded: bytes = ExportMetricsServiceRequest(resource_metrics=[told]).SerializeToString()
        return encoded

    def _metric(self, family: Family, now_ns: int) -> Metric | None:
        """None for a family without series."""
        if not family.samples:
            return None
        metric = Metric(name=family.name, description=family.documentation, unit=family.unit)
        match family.type:
            case "counter":
                metric.name = f"{family.name}_total"
                points = [self._number(sample, now_ns) for sample in family.samples]
                metric.sum.CopyFrom(
                    Sum(data_points=points, aggregation_temporality=_CUMULATIVE, is_monotonic=True)
                )
            case "histogram":
                found = [self._histogram(series, now_ns) for series in _series(family.samples)]
                metric.histogram.CopyFrom(
                    Histogram(data_points=found, aggregation_temporality=_CUMULATIVE)
                )
            case _:
                points = [_gauge(sample, now_ns) for sample in family.samples]
                metric.gauge.CopyFrom(Gauge(data_points=points))
        return metric

    def _number(self, sample: Sample, now_ns: int) -> NumberDataPoint:
        return NumberDataPoint(
            attributes=_attributes(sample.labels),
            start_time_unix_nano=self._since_ns,
            time_unix_nano=now_ns,
            as_double=sample.value,
        )

    def _histogram(self, series: list[Sample], now_ns: int) -> HistogramDataPoint:
        """One series' buckets, which count all below them there, and each its own here."""
        buckets = [sample for sample in series if "le" in sample.labels]
        below = [int(sample.value) for sample in buckets]
        totals = {sample.name.rpartition("_")[2]: sample.value for sample in series}
        return HistogramDataPoint(
            attributes=_attributes(_without_le(buckets[0])),
            start_time_unix_nano=self._since_ns,
            time_unix_nano=now_ns,
            count=int(totals["count"]),
            sum=totals["sum"],
            explicit_bounds=[float(sample.labels["le"]) for sample in buckets[:-1]],
            bucket_counts=[
                one - before for one, before in zip(below, [0, *below[:-1]], strict=True)
            ],
            exemplars=[_exemplar(sample.exemplar) for sample in buckets if sample.exemplar],
        )


def _gauge(sample: Sample, now_ns: int) -> NumberDataPoint:
    """A gauge; one that has no number says so, by a flag instead of NaN."""
    has_none = math.isnan(sample.value)
    return NumberDataPoint(
        attributes=_attributes(sample.labels),
        time_unix_nano=now_ns,
        as_double=0.0 if has_none else sample.value,
        flags=_NO_VALUE if has_none else 0,
    )


def _exemplar(found: FoundExemplar) -> Exemplar:
    return Exemplar(
        as_double=found.value,
        time_unix_nano=int(float(found.timestamp or 0) * 1e9),
        trace_id=bytes.fromhex(found.labels["trace_id"]),
    )


def _series(samples: Iterable[Sample]) -> Iterator[list[Sample]]:
    """The samples of each series of a histogram together; they come one series after another."""
    found: list[Sample] = []
    for sample in samples:
        if found and _without_le(found[0]) != _without_le(sample):
            yield found
            found = []
        found.append(sample)
    if found:
        yield found


def _without_le(sample: Sample) -> dict[str, str]:
    return {name: value for name, value in sample.labels.items() if name != "le"}


def _attributes(labels: dict[str, str]) -> list[KeyValue]:
    return [KeyValue(key=name, value=AnyValue(string_value=v)) for name, v in labels.items()]
