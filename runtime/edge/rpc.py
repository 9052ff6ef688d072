"""gRPC between agent, controller and elastic-ctl: channels, method names, limits.

The messages are those of protocol/wire.py; no generated service code is used.
Not here: the worker's link to its agent (worker_link.py), which is no gRPC because training scripts fork.
"""

from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

from elastic_run.runtime.edge.quiet_grpc import grpc
from elastic_run.runtime.protocol import wire
from elastic_run.runtime.protocol.errors import PeerError, PeerRefused
from elastic_run.runtime.protocol.messages import StatusReport, StatusRequest

SERVICE = "elastic_run.control.Control"
SESSION = "Session"
STATUS = "Status"
STATUS_DEADLINE_S = 3.0

KEEPALIVE_MS = 2_000
KEEPALIVE_TIMEOUT_MS = 2_000
_OPTIONS = (
    ("grpc.max_receive_message_length", wire.MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", wire.MESSAGE_BYTES_MAX),
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    ("grpc.keepalive_permit_without_calls", 1),
)
SERVER_OPTIONS = (
    *_OPTIONS,
    ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_MS // 2),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.so_reuseport", 0),  # a port that is taken must be an error
)
CLIENT_OPTIONS = (
    *_OPTIONS,
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.enable_http_proxy", 0),  # control traffic stays inside the cluster
    ("grpc.use_local_subchannel_pool", 1),  # a new channel dials anew instead of sharing an old one's back-off
)

RpcError = grpc.aio.AioRpcError
Channel = grpc.aio.Channel
Context: TypeAlias = "grpc.aio.ServicerContext[bytes, bytes]"  # generic in the stubs alone


def open_channel(address: str) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(address, options=CLIENT_OPTIONS)


def handlers(
    session: Callable[[Any, Context], Awaitable[None]], status: Callable[[bytes, Context], Awaitable[bytes]]
) -> Any:
    """Return the service: `session` reads and writes raw messages, `status` takes and returns raw messages."""
    methods = {
        SESSION: grpc.stream_stream_rpc_method_handler(session),
        STATUS: grpc.unary_unary_rpc_method_handler(status),
    }
    return grpc.method_handlers_generic_handler(SERVICE, methods)


def session_call(channel: grpc.aio.Channel) -> Any:
    """Open a stream of raw messages; grpc's stubs demand serializers that grpc does not."""
    raw: Any = channel
    return raw.stream_stream(f"/{SERVICE}/{SESSION}")()


async def fetch_status(address: str) -> StatusReport:
    """Ask the controller at `address` for its report. Raises PeerError, PeerRefused when it does not lead."""
    async with open_channel(address) as channel:
        return await ask_status(channel, address, deadline_s=STATUS_DEADLINE_S)


async def ask_status(channel: grpc.aio.Channel, address: str, *, deadline_s: float) -> StatusReport:
    """Ask over a channel that is kept. Raises as `fetch_status` does."""
    raw: Any = channel
    call = raw.unary_unary(f"/{SERVICE}/{STATUS}")
    try:
        data = await call(wire.to_bytes(StatusRequest()), timeout=deadline_s)
    except RpcError as error:
        raise translate(error, address) from None
    return wire.from_bytes(StatusReport, data)


def translate(error: grpc.aio.AioRpcError, address: str) -> PeerError:
    """Turn a failed call into an error of our tree."""
    code, details = error.code(), error.details() or "no details"
    if code in (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INVALID_ARGUMENT):
        return PeerRefused(f"controller at {address}: {details}")
    return PeerError(f"controller at {address} can not be reached: {code.name.lower()}: {details}")
