"""The settings, read once: environment first, then a TOML file; all faults are told together.

Known to `app` and `cli` alone; everyone else gets plain values.
"""

import re
import shlex
import ssl
import tomllib
from collections.abc import Mapping
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Annotated, Literal, Self, get_args
from urllib.parse import unquote, urlsplit

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from rdev.domain.addresses import parse_network
from rdev.domain.deliveries import PENDING_MAX, SCHEDULE_S, parse_schedule
from rdev.domain.limiter import parse_rate_limit
from rdev.domain.purposes import SECRET_BYTES
from rdev.domain.webhook_targets import TargetRules, parse_networks

PREFIX = "RDEV_"
LogLevel = Literal["debug", "info", "warn", "error"]
ADMIN_KEY_CHARACTERS_MIN = 32
# Variables of clients, tests and commands, which are no settings of the server.
_FOREIGN = re.compile(r"RDEV_(URL|KEY|TEST_.*|COMMAND_ID|CONFIG)")
# RFC 1123.
_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_LABEL_CHARACTERS = 63
_ORIGINAL_DATABASE = ("DB_HOST", "DB_PORT", "DB_USER", "DB_PASSWORD", "DB_NAME")


# What OpenTelemetry calls settings that rdev has.
_STANDARD = {
    "OTEL_EXPORTER_OTLP_ENDPOINT": "otlp_endpoint",
    "OTEL_EXPORTER_OTLP_HEADERS": "otlp_headers",
    "OTEL_EXPORTER_OTLP_TIMEOUT": "otlp_timeout_s",
    "OTEL_EXPORTER_OTLP_CERTIFICATE": "otlp_ca_file",
    "OTEL_METRIC_EXPORT_INTERVAL": "otlp_metrics_s",
    "OTEL_SERVICE_NAME": "otlp_service_name",
    "OTEL_RESOURCE_ATTRIBUTES": "otlp_resource",
    "OTEL_TRACES_SAMPLER_ARG": "traces_sample",
}
_SAMPLES = {"always_on": 1.0, "always_off": 0.0}


class SettingsError(Exception):
    """One line for each fault of the settings; `str()` joins them."""


def _address(text: str) -> str:
    host, separator, port = text.rpartition(":")
    if not separator or not host or not port.isdigit() or int(port) > 65_535:
        raise ValueError("must be HOST:PORT with a port from 0 to 65535")
    return text


def _secret(value: SecretStr) -> SecretStr:
    if len(value.get_secret_value()) < ADMIN_KEY_CHARACTERS_MIN:
        raise ValueError(f"must have at least {ADMIN_KEY_CHARACTERS_MIN} characters")
    return value


def _key_file(path: Path) -> Path:
    try:
        text = path.read_text()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    if len(text.strip()) < ADMIN_KEY_CHARACTERS_MIN:
        raise ValueError(f"{path}: must hold at least {ADMIN_KEY_CHARACTERS_MIN} characters")
    return path


def _secret_file(path: Path) -> Path:
    try:
        with path.open("rb") as file:
            size_bytes = len(file.read(SECRET_BYTES))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    if size_bytes < SECRET_BYTES:
        raise ValueError(f"{path}: must hold at least {SECRET_BYTES} bytes")
    return path


def _words(text: str) -> str:
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"cannot be split as a shell would: {error}") from error
    if not words:
        raise ValueError("must name a program")
    return text


def _namespace(text: str) -> str:
    if len(text) > _LABEL_CHARACTERS or _LABEL.fullmatch(text) is None:
        raise ValueError("must be a namespace: lower-case letters, digits and hyphens, at most 63")
    return text


def _rate_limit(text: str) -> str:
    parse_rate_limit(text)
    return text


def _proxies(value: object) -> object:
    """CIDRs as a list, or with commas between; every one that is none is told."""
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, list | tuple):
        return value
    found, faults = [], []
    for item in (str(item).strip() for item in items):
        try:
            found += [parse_network(item)] if item else []
        except ValueError as error:
            faults.append(f"{item!r} {error}")
    if faults:
        raise ValueError("; ".join(faults))
    return tuple(found)


def _networks(text: str) -> str:
    parse_networks(text)
    return text


def _ports(text: str) -> str:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and 0 < int(part) <= 65_535 for part in parts):
        raise ValueError("must be ports from 1 to 65535, separated by commas")
    return text


def _schedule(text: str) -> str:
    parse_schedule(text)
    return text


def _logger_levels(text: str) -> str:
    for part in filter(str.strip, text.split(",")):
        name, _, level = part.partition("=")
        if not name.strip() or level.strip() not in get_args(LogLevel):
            told = ", ".join(get_args(LogLevel))
            raise ValueError(f"must be LOGGER=LEVEL with commas between; levels: {told}")
    return text


def _authorities(path: Path) -> Path:
    try:
        ssl.create_default_context(cafile=path)
    except ssl.SSLError as error:
        raise ValueError(f"{path}: holds no certificate in PEM form") from error
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    return path


def _endpoint(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("must be a URL with http or https, as http://collector:4318")
    if parts.username is not None or parts.query or parts.fragment:
        raise ValueError("must be without user, query and fragment; keys go into the headers")
    return text


def _pairs(text: str) -> str:
    if not all("=" in part for part in text.split(",") if part.strip()):
        raise ValueError("must be NAME=VALUE with commas between")
    return text


def _secret_pairs(value: SecretStr) -> SecretStr:
    text = unquote(_pairs(value.get_secret_value()))
    if not (text.isascii() and text.isprintable()):
        raise ValueError("must be printable ASCII")
    return value


class Settings(BaseSettings):
    """Every setting of `rdev serve`, with its unit in its name. Frozen."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, frozen=True, extra="forbid", env_ignore_empty=True
    )

    bind: Annotated[str, AfterValidator(_address)] = "127.0.0.1:8080"
    state_dir: Path = Path(".rdev")
    trusted_proxies: Annotated[
        tuple[IPv4Network | IPv6Network, ...], NoDecode, BeforeValidator(_proxies)
    ] = ()
    database_dsn: SecretStr | None = None
    database_pool_max: int = Field(default=12, ge=2, le=200)
    admin_key: Annotated[SecretStr, AfterValidator(_secret)] | None = None
    admin_key_file: Annotated[Path, AfterValidator(_key_file)] | None = None
    secret_file: Annotated[Path, AfterValidator(_secret_file)] | None = None
    executor: Literal["local", "kubernetes"] = "local"
    kubeconfig: Path | None = None
    namespace: Annotated[str, AfterValidator(_namespace)] | None = None
    projects_dir: Path | None = None
    project_template: Path | None = None
    claude_command: Annotated[str, AfterValidator(_words)] = "claude"
    lease_s: float = Field(default=30, ge=1, le=600)
    grace_s: float = Field(default=30, ge=0, le=600)
    drain_delay_s: float | None = Field(default=None, ge=0, le=600)
    running_max: int = Field(default=64, ge=1, le=1_000)
    queue_project_max: int = Field(default=10_000, ge=1, le=10_000_000)
    queue_max: int = Field(default=100_000, ge=1, le=10_000_000)
    retention_days: int = Field(default=7, ge=1, le=3_650)
    audit_retention_days: int = Field(default=400, ge=1, le=36_500)
    audit_checkpoint: str | None = None
    log_max_bytes: int = Field(default=10 << 30, ge=1 << 20, le=1 << 50)
    streams_max: int = Field(default=3_000, ge=1, le=100_000)
    stream_buffer_bytes: int = Field(default=262_144, ge=4_096, le=67_108_864)
    in_flight_max: int = Field(default=200, ge=1, le=10_000)
    rate_limit: Annotated[str, AfterValidator(_rate_limit)] = "600/60s"
    rate_limit_starts: Annotated[str, AfterValidator(_rate_limit)] = "600/60s"
    rate_limit_address: Annotated[str, AfterValidator(_rate_limit)] = "30000/60s"
    rate_limit_failures: Annotated[str, AfterValidator(_rate_limit)] = "30/60s"
    streams_key_max: int = Field(default=200, ge=1, le=100_000)
    body_max_bytes: int = Field(default=1_048_576, ge=1_024, le=104_857_600)
    tls_cert_file: Path | None = None
    tls_key_file: Path | None = None
    webhook_ports: Annotated[str, AfterValidator(_ports)] = "443,8443"
    webhook_allow_nets: Annotated[str, AfterValidator(_networks)] = ""
    webhook_deny_nets: Annotated[str, AfterValidator(_networks)] = ""
    webhook_ca_file: Annotated[Path, AfterValidator(_authorities)] | None = None
    webhook_schedule: Annotated[str, AfterValidator(_schedule)] = ",".join(
        f"{step_s:g}" for step_s in SCHEDULE_S
    )
    webhook_in_flight_max: int = Field(default=512, ge=8, le=10_000)
    webhook_pending_max: int = Field(default=PENDING_MAX, ge=1, le=10_000_000)
    webhook_retention_days: int = Field(default=14, ge=4, le=365)
    webhook_connect_s: float = Field(default=5, gt=0, le=60)
    webhook_total_s: float = Field(default=15, gt=0, le=600)
    otlp_endpoint: Annotated[str, AfterValidator(_endpoint)] | None = None
    otlp_headers: Annotated[SecretStr, AfterValidator(_secret_pairs)] | None = None
    otlp_timeout_s: float = Field(default=10, gt=0, le=60)
    otlp_ca_file: Annotated[Path, AfterValidator(_authorities)] | None = None
    otlp_metrics_s: float = Field(default=60, ge=1, le=3_600)
    otlp_service_name: str = Field(default="rdev", min_length=1, max_length=255)
    otlp_resource: Annotated[str, AfterValidator(_pairs)] = ""
    traces_sample: float = Field(default=0.1, ge=0, le=1)
    log_level: LogLevel = "info"
    log_levels: Annotated[str, AfterValidator(_logger_levels)] = ""

    @model_validator(mode="after")
    def _tls_in_pairs(self) -> Self:
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            raise ValueError("RDEV_TLS_CERT_FILE, RDEV_TLS_KEY_FILE: one is not set")
        return self

    @property
    def is_embedded(self) -> bool:
        """Whether rdev brings its own PostgreSQL."""
        return self.database_dsn is None

    @property
    def drain_s(self) -> float:
        """Seconds between readiness off and the stop; 0 when nobody balances load to us."""
        return (
            self.drain_delay_s if self.drain_delay_s is not None else 0 if self.is_embedded else 5
        )

    @property
    def projects_folder(self) -> Path:
        """Where local projects live."""
        return (self.projects_dir or self.state_dir / "projects").absolute()

    @property
    def claude_argv(self) -> tuple[str, ...]:
        """The agent's command with its leading arguments, as a shell would split it."""
        return tuple(shlex.split(self.claude_command))

    @property
    def webhook_rules(self) -> TargetRules:
        """Where webhooks may go."""
        return TargetRules(
            ports=frozenset(int(port) for port in self.webhook_ports.split(",")),
            allow_nets=parse_networks(self.webhook_allow_nets),
            deny_nets=parse_networks(self.webhook_deny_nets),
        )

    @property
    def logger_levels(self) -> dict[str, str]:
        """Levels of loggers that have their own."""
        pairs = (part.partition("=") for part in self.log_levels.split(",") if part.strip())
        return {name.strip(): level.strip() for name, _, level in pairs}

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # What the file says is given as init values: the environment goes before it.
        return (env_settings, init_settings)


def load_settings(environment: Mapping[str, str], file: Path | None = None) -> Settings:
    """Read the settings. `environment` is looked at for the original's `DB_*` names only; pydantic
    reads the process's own. Errors: SettingsError with every fault."""
    values = (_from_file(file) if file is not None else {}) | _standard(environment)
    # Of the environment like the others: an empty variable is none, and it goes before the file.
    if not environment.get("RDEV_DATABASE_DSN") and (dsn := _original_dsn(environment)) is not None:
        values["database_dsn"] = dsn
    try:
        return Settings(**values)  # type: ignore[arg-type]
    except ValidationError as error:
        lines = [_fault_line(fault["loc"], fault["msg"]) for fault in error.errors()]
        raise SettingsError("\n".join(lines)) from None


def _standard(environment: Mapping[str, str]) -> dict[str, object]:
    """Settings by the names that OpenTelemetry has for them; ours go before them, they before the
    file. Source: "Environment Variable Specification" and "OTLP Exporter Configuration", whose
    times are milliseconds. Errors: SettingsError for what rdev does not do."""
    given = {ours: environment[name] for name, ours in _STANDARD.items() if environment.get(name)}
    values: dict[str, object] = dict(given)
    for ours in ("otlp_timeout_s", "otlp_metrics_s"):
        if given.get(ours, "").isdigit():
            values[ours] = int(given[ours]) / 1000
    sampler = environment.get("OTEL_TRACES_SAMPLER", "").removeprefix("parentbased_")
    if sampler in _SAMPLES:
        values["traces_sample"] = _SAMPLES[sampler]
    elif sampler and sampler != "traceidratio":
        raise SettingsError(f"OTEL_TRACES_SAMPLER: {sampler!r} is none that rdev has")
    protocol = environment.get("OTEL_EXPORTER_OTLP_PROTOCOL") or "http/protobuf"
    if protocol != "http/protobuf":
        raise SettingsError("OTEL_EXPORTER_OTLP_PROTOCOL: rdev speaks http/protobuf alone")
    if environment.get("OTEL_SDK_DISABLED", "").lower() == "true":
        values.pop("otlp_endpoint", None)
    return values


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """Names that look like settings of rdev and are none: a typo, or a newer version's."""
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    return sorted(
        name
        for name in environment
        if name.startswith(PREFIX) and name not in known and not _FOREIGN.fullmatch(name)
    )


def _from_file(file: Path) -> dict[str, object]:
    try:
        return tomllib.loads(file.read_text("utf-8"))
    except OSError as error:
        raise SettingsError(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SettingsError(f"{file}: is not UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{file}: {error}") from None


def _original_dsn(environment: Mapping[str, str]) -> str | None:
    """The DSN that the Go server's variables describe; None when `DB_HOST` is not set."""
    if not environment.get("DB_HOST"):
        return None
    keys = ("host", "port", "user", "password", "dbname")
    parts = [
        f"{key}={_quoted(environment[name])}"
        for key, name in zip(keys, _ORIGINAL_DATABASE, strict=True)
        if environment.get(name)
    ]
    return " ".join(parts)


def _quoted(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _fault_line(location: tuple[int | str, ...], message: str) -> str:
    told = message.removeprefix("Value error, ")
    return f"{PREFIX}{str(location[0]).upper()}: {told}" if location else told
