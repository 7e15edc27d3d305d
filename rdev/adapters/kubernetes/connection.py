"""The connection to the API server: where it is, TLS, credentials; one pool for objects and execs.

Built from a kubeconfig file or, without one, from the service account of the pod that rdev is in.
Bounds: each request's connect and answer (`_TIMEOUTS`); the number of connections is that of the
execs, watches and requests open, each of which has a bound of its own.
"""

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import httpx2
import msgspec
from lightkube import AsyncClient, KubeConfig, SingleConfig
from lightkube.config.client_adapter import verify_cluster
from lightkube.config.models import User
from lightkube.core.exceptions import ConfigError
from yaml import YAMLError, safe_load  # type: ignore[import-untyped]

from rdev.adapters.kubernetes.credentials import AuthorizedTransport, credentials_of
from rdev.adapters.kubernetes.errors import unreachable
from rdev.adapters.kubernetes.guard import Contact, GuardedTransport, HeraldTransport
from rdev.ports.breaker import CallBreaker, Unbroken

_TIMEOUTS: Final = httpx2.Timeout(connect=5.0, read=15.0, write=15.0, pool=5.0)

# A connection without them would be another one than the operator has meant.
_UNKNOWN: Final = frozenset(
    {"proxy-url", "tls-server-name", "as", "as-uid", "as-groups", "as-user-extra"}
)

# A peer that is gone without a word is noticed after 15 + 3 × 5 s, on idle watches too.
_KEEP_ALIVE: Final = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 15),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiServer:
    """An open connection. `objects` is for what lightkube does, `http` for what it does not; both
    are behind the breaker. `signs` is not: for watches and checks, which have a pace of their own.
    """

    namespace: str
    objects: AsyncClient
    http: httpx2.AsyncClient
    signs: httpx2.AsyncClient
    contact: Contact


def read_config(kubeconfig: Path | None) -> SingleConfig:
    """The current context of a kubeconfig; without a file the pod's own service account, else the
    usual kubeconfig (`KUBECONFIG`, `~/.kube/config`).

    Blocks: on small files. Errors: SERVICE_UNAVAILABLE where there is none, or something else, or
    one that says how to reach the API server, or as whom, in a way that is not known here.
    """
    try:
        if kubeconfig is not None:
            found = KubeConfig.from_file(kubeconfig).get()
        else:
            found = KubeConfig.from_env().get()
        assert found is not None  # None only where a default was given
        unknown = _said(found) & _UNKNOWN
    except (ConfigError, OSError, KeyError, ValueError) as error:
        where = str(kubeconfig or "no service account, and no kubeconfig")
        raise unreachable(f"{where}: {error}") from error
    except (YAMLError, AttributeError, TypeError) as error:
        # What lightkube makes of another file. Without its words, which may hold a token.
        raise unreachable(f"{kubeconfig or 'KUBECONFIG'} is no kubeconfig") from error
    if unknown:
        raise unreachable(f"{found.fname}: {', '.join(sorted(unknown))} is not supported")
    return found


def _said(config: SingleConfig) -> set[str]:
    """The fields of its cluster and its user that say something, also those that lightkube drops
    without a word."""
    if config.fname is None:
        return set()
    whole, context = safe_load(config.fname.read_text()), config.context
    return {
        field
        for kind, name in (("cluster", context.cluster), ("user", context.user))
        for one in whole.get(f"{kind}s") or ()
        if one["name"] == name
        for field, value in (one[kind] or {}).items()
        if value
    }


def _beside(config: SingleConfig, user: User) -> User:
    """Relative paths are the kubeconfig's neighbours; a plugin without a slash is in PATH."""
    if config.fname is None:
        return user
    folder = config.fname.absolute().parent
    token_file, plugin = user.token_file, user.exec
    if token_file is not None:
        token_file = str(folder / token_file)
    if plugin is not None and "/" in plugin.command:
        plugin = msgspec.structs.replace(plugin, command=str(folder / plugin.command))
    return msgspec.structs.replace(user, token_file=token_file, exec=plugin)


@asynccontextmanager
async def connect(
    config: SingleConfig, namespace: str | None = None, breaker: CallBreaker | None = None
) -> AsyncIterator[ApiServer]:
    """Make the clients; nothing is sent before the first request. Leaving closes all connections.

    `namespace`: where the projects are, else the context's. `breaker`: see `guard.py`. Errors:
    SERVICE_UNAVAILABLE for credentials that are not supported or a CA file that cannot be read.
    """
    user = config.user or User()
    try:
        tls = verify_cluster(config.cluster, user, config.abs_file, trust_env=False)
    except (OSError, ConfigError, ValueError, TypeError) as error:
        # ValueError: no base64; TypeError: a certificate without its key
        raise unreachable(f"certificates of the cluster: {error}") from error
    pool = httpx2.AsyncHTTPTransport(
        verify=tls,
        socket_options=_KEEP_ALIVE,
        # An exec holds its connection as long as its command runs: the bound is the execs' own.
        limits=httpx2.Limits(max_connections=None, max_keepalive_connections=10),
    )
    authorized = AuthorizedTransport(pool, credentials_of(_beside(config, user)))
    contact, guard = Contact(), breaker or Unbroken()
    transport = GuardedTransport(authorized, guard, contact)
    place = namespace or config.namespace
    async with (
        authorized,
        httpx2.AsyncClient(
            base_url=config.cluster.server, transport=transport, timeout=_TIMEOUTS, trust_env=False
        ) as http,
        httpx2.AsyncClient(
            base_url=config.cluster.server,
            transport=HeraldTransport(authorized, guard, contact),
            timeout=_TIMEOUTS,
            trust_env=False,
        ) as signs,
    ):
        # The transport does what lightkube would do with the user; the certificates are loaded.
        known = config._replace(user=User())
        objects = AsyncClient(
            config=known,
            namespace=place,
            timeout=_TIMEOUTS,
            transport=transport,
            trust_env=False,
        )
        yield ApiServer(namespace=place, objects=objects, http=http, signs=signs, contact=contact)
