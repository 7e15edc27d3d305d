"""What the probes answer, for the document (probes.py is imported by the schemas)."""

from rdev.adapters.http import schemas
from rdev.adapters.http.describe import Answer, Described, Description

DESCRIBED: Described = {
    ("GET", "/health"): Description(
        summary="Whether the process lives",
        tag="operations",
        answers={
            200: Answer(about="it does", schema=schemas.HEALTH, is_enveloped=False),
        },
    ),
    ("GET", "/ready"): Description(
        summary="Whether traffic should come here",
        tag="operations",
        answers={
            200: Answer(about="it should", schema=schemas.READY, is_enveloped=False),
            503: Answer(about="it should not", schema=schemas.READY, is_enveloped=False),
        },
    ),
    ("GET", "/metrics"): Description(
        summary="Metrics",
        tag="operations",
        answers={
            200: Answer(
                about="what Prometheus scrapes",
                schema=schemas.TEXT,
                is_enveloped=False,
                content_type="text/plain",
                also=("application/openmetrics-text",),
            )
        },
    ),
}
