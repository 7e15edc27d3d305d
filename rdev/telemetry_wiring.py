"""What traces and exported metrics are made of; a part of `app.py`.

Without `RDEV_OTLP_ENDPOINT` nothing of OpenTelemetry is even imported.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from urllib.parse import unquote

from rdev import __version__
from rdev.adapters.telemetry.prometheus import PrometheusTelemetry
from rdev.config import Settings
from rdev.identity import Identity
from rdev.ports.tracing import ExportStatistics, Tracing, Untraced


@asynccontextmanager
async def open_tracing(
    settings: Settings, identity: Identity, telemetry: PrometheusTelemetry
) -> AsyncIterator[Tracing]:
    """Traces and metrics go to the collector for as long as the block lasts. Leaving it takes
    two seconds more at most, for what is left. Cancellation: what is left is dropped."""
    if settings.otlp_endpoint is None:
        telemetry.watch("otlp", ExportStatistics)
        yield Untraced()
        return
    # Here: it costs 70 ms and 8 MiB, which nobody pays who does not export.
    from rdev.adapters.telemetry.otlp import Collector, OtlpExporter, Outbox
    from rdev.adapters.telemetry.otlp_metrics import MetricsEncoder
    from rdev.adapters.telemetry.tracing import OtelTracing

    resource = {
        "service.name": settings.otlp_service_name,
        "service.version": __version__,
        "service.instance.id": identity.holder,
        **_pairs(settings.otlp_resource),
    }
    headers = "" if settings.otlp_headers is None else settings.otlp_headers.get_secret_value()
    outbox = Outbox()
    exporter = OtlpExporter(
        collector=Collector(
            url=settings.otlp_endpoint.rstrip("/") + "/",
            headers=_pairs(headers),
            timeout_s=settings.otlp_timeout_s,
            ca_file=None if settings.otlp_ca_file is None else str(settings.otlp_ca_file),
        ),
        outbox=outbox,
        metrics=partial(telemetry.read, MetricsEncoder(resource).encode),
        metrics_every_s=settings.otlp_metrics_s,
    )
    telemetry.watch("otlp", exporter.statistics)
    async with exporter.running():
        yield OtelTracing(outbox=outbox, resource=resource, sample=settings.traces_sample)


def _pairs(text: str) -> dict[str, str]:
    """`name=value` with commas between, as the variables of OpenTelemetry have them."""
    found = (part.partition("=") for part in text.split(",") if part.strip())
    return {name.strip(): unquote(value.strip()) for name, _, value in found}
