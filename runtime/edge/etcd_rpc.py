"""One attempt at a time against one of several etcd endpoints: channels, rotation, deadlines, TLS, tokens, errors.

Invariants (tests/integration/test_etcd_store.py):
1. An attempt ends within its own short deadline, a call within the caller's; a failed endpoint is left for the next.
2. Every failure is either AttemptFailed, which says whether the request may take effect, or a definite StoreError.
3. The password leaves this module only inside the Authenticate request; neither it nor a token is logged or quoted.

Not here: what is asked (`etcd.py`), writes that must happen once (`etcd_writer.py`), watches (`etcd_watch.py`).
"""

import asyncio
import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Generic, Self, TypeVar, cast

from google.protobuf.message import Message

from elastic_run.runtime.edge.etcd_config import EtcdConfig
from elastic_run.runtime.edge.etcd_proto import rpc_pb2 as rpc
from elastic_run.runtime.edge.etcd_writer import AttemptFailed
from elastic_run.runtime.edge.quiet_grpc import grpc
from elastic_run.runtime.edge.store import VALUE_BYTES_MAX
from elastic_run.runtime.protocol.errors import StoreDenied, StoreError, StoreUnavailable, UserError

TRY_S = 0.7  # twice etcd's slowest healthy write here; a stopped member costs one of these
TRY_GROWTH = 1.5  # per round over all endpoints, for stores that are slow, not dead
TRY_S_MAX = 3.0
PAUSE_S = 0.05  # between rounds over all endpoints, doubling
PAUSE_S_MAX = 0.5
PING_INTERVAL_MS = 10_000  # etcd cuts connections that ping faster than every 5 s
PING_TIMEOUT_MS = 3_000
CONNECT_TIMEOUT_MS = 1_000
RECONNECT_MS_MAX = 1_000
CLOSE_S = 0.5
PAGE_ITEMS = 256
RECEIVE_BYTES_MAX = PAGE_ITEMS * (VALUE_BYTES_MAX + 4096)

_CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.enable_retries", 0),  # a repeated attempt is ours to decide
    ("grpc.use_local_subchannel_pool", 1),  # no connection shared with other clients of the process
    ("grpc.service_config_disable_resolution", 1),
    ("grpc.keepalive_time_ms", PING_INTERVAL_MS),
    ("grpc.keepalive_timeout_ms", PING_TIMEOUT_MS),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", CONNECT_TIMEOUT_MS),  # gRPC's name for the connection timeout
    ("grpc.max_reconnect_backoff_ms", RECONNECT_MS_MAX),
    ("grpc.max_receive_message_length", RECEIVE_BYTES_MAX),
    ("grpc.max_send_message_length", 4 * VALUE_BYTES_MAX),
)

_EOF = grpc.aio.EOF  # type: ignore[attr-defined]  # missing in the stubs

# The member answers at once, and ends streams, when it sees no leader: a minority side of a partition is left quickly.
_REQUIRE_LEADER = ("hasleader", "true")

_STALE_TOKEN = ("etcdserver: invalid auth token", "etcdserver: revision of auth store is old")
_NO_TOKEN = "etcdserver: user name is empty"
_AUTH_OFF = "etcdserver: authentication is not enabled"

Metadata = tuple[tuple[str, str], ...]

ResponseT = TypeVar("ResponseT", bound=Message)


@dataclass(frozen=True, slots=True)
class Method(Generic[ResponseT]):
    path: str
    response: type[ResponseT]
    streaming: bool = False


RANGE = Method("/etcdserverpb.KV/Range", rpc.RangeResponse)
TXN = Method("/etcdserverpb.KV/Txn", rpc.TxnResponse)
COMPACT = Method("/etcdserverpb.KV/Compact", rpc.CompactionResponse)
WATCH = Method("/etcdserverpb.Watch/Watch", rpc.WatchResponse, streaming=True)
LEASE_GRANT = Method("/etcdserverpb.Lease/LeaseGrant", rpc.LeaseGrantResponse)
LEASE_REVOKE = Method("/etcdserverpb.Lease/LeaseRevoke", rpc.LeaseRevokeResponse)
LEASE_KEEP_ALIVE = Method("/etcdserverpb.Lease/LeaseKeepAlive", rpc.LeaseKeepAliveResponse, streaming=True)
AUTHENTICATE = Method("/etcdserverpb.Auth/Authenticate", rpc.AuthenticateResponse)
STATUS = Method("/etcdserverpb.Maintenance/Status", rpc.StatusResponse)
MEMBER_LIST = Method("/etcdserverpb.Cluster/MemberList", rpc.MemberListResponse)


class Refused(StoreError):
    """etcd answered this attempt with a definite no; the caller, who knows what was asked, translates it further."""

    def __init__(self, detail: str) -> None:
        super().__init__(f"etcd refused: {detail}")
        self.detail = detail


class Tries:
    """The attempts of one call: how long each may take, when to pause, when it is over."""

    def __init__(self, rpc_client: "EtcdRpc", deadline_s: float) -> None:
        self._rpc = rpc_client
        self._deadline_s = deadline_s
        self._ends_at_s = time.monotonic() + deadline_s
        self._failures = 0

    @property
    def left_s(self) -> float:
        return self._ends_at_s - time.monotonic()

    @property
    def try_s(self) -> float:
        """How long the next attempt may take."""
        rounds = min(self._failures // len(self._rpc.endpoints), 16)
        return max(0.0, min(self.left_s, TRY_S * TRY_GROWTH**rounds, TRY_S_MAX))

    async def pause(self, failed: AttemptFailed) -> None:
        """Leave the failed endpoint; after a round over all of them, wait. StoreUnavailable past the deadline."""
        self._rpc.leave(failed.endpoint)
        self._failures += 1
        rounds, rest = divmod(self._failures, len(self._rpc.endpoints))
        if rest == 0:
            pause_s = min(PAUSE_S * 2.0 ** min(rounds - 1, 16), PAUSE_S_MAX)
            await asyncio.sleep(max(0.0, min(pause_s, self.left_s)))
        if self.left_s <= 0:
            raise StoreUnavailable(
                f"no answer from etcd ({', '.join(self._rpc.endpoints)}) within {self._deadline_s:g} s; last: {failed}"
            )


class EtcdRpc:
    """The endpoints of one cluster. Construction does no I/O; channels are opened when first used."""

    def __init__(self, config: EtcdConfig) -> None:
        self.endpoints = config.endpoints
        self._config = config
        self._current = 0
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._token: str | None = None
        self._token_lock = asyncio.Lock()
        self._closed = False

    @property
    def endpoint(self) -> str:
        """The endpoint the next attempt goes to."""
        return self.endpoints[self._current]

    def leave(self, endpoint: str) -> None:
        """Go on to the next endpoint, unless another call has left this one already."""
        if endpoint == self.endpoint:
            self._current = (self._current + 1) % len(self.endpoints)

    def tries(self, deadline_s: float) -> Tries:
        return Tries(self, deadline_s)

    async def call(self, method: Method[ResponseT], request: Message, tries: Tries) -> ResponseT:
        """Attempt until answered. Only for requests that may be applied any number of times."""
        while True:
            try:
                return await self.attempt(method, request, tries.try_s)
            except AttemptFailed as failed:
                await tries.pause(failed)

    async def attempt(
        self, method: Method[ResponseT], request: Message, timeout_s: float, endpoint: str | None = None
    ) -> ResponseT:
        """One attempt at `endpoint`, by default the current one. Raises AttemptFailed, Refused or StoreDenied."""
        endpoint = endpoint if endpoint is not None else self.endpoint
        ends_at_s = time.monotonic() + timeout_s
        channel = await self._connected(endpoint, timeout_s)
        metadata = await self._metadata(channel, endpoint, ends_at_s)
        left_s = ends_at_s - time.monotonic()
        if left_s <= 0:
            raise AttemptFailed("no time left to send", endpoint=endpoint, maybe_applied=False)
        try:
            if not method.streaming:
                return await _invoke(channel, method, request, left_s, metadata)
            return await _exchange(channel, method, request, left_s, metadata)
        except grpc.aio.AioRpcError as error:
            raise self._translated(error, endpoint) from None

    async def open_stream(self, method: Method[ResponseT], timeout_s: float) -> "EtcdStream[ResponseT]":
        """A stream at the current endpoint, without a deadline of its own. Raises as `attempt` does."""
        endpoint = self.endpoint
        ends_at_s = time.monotonic() + timeout_s
        channel = await self._connected(endpoint, timeout_s)
        metadata = await self._metadata(channel, endpoint, ends_at_s)
        call = channel.stream_stream(method.path, _encode, method.response.FromString)(None, metadata=metadata)
        return EtcdStream(self, cast("grpc.aio.StreamStreamCall[Message, ResponseT]", call), endpoint)

    async def close(self) -> None:
        self._closed = True
        channels, self._channels = self._channels, {}
        for channel in channels.values():
            await channel.close(CLOSE_S)

    def drop_token(self) -> None:
        """Ask for a new token before the next attempt."""
        self._token = None

    @property
    def has_user(self) -> bool:
        return bool(self._config.user)

    def _channel(self, endpoint: str) -> grpc.aio.Channel:
        if self._closed:
            raise StoreUnavailable("this store client is closed")
        channel = self._channels.get(endpoint)
        if channel is None:
            if self._config.secure:
                channel = grpc.aio.secure_channel(endpoint, _credentials(self._config), options=_CHANNEL_OPTIONS)
            else:
                channel = grpc.aio.insecure_channel(endpoint, options=_CHANNEL_OPTIONS)
            self._channels[endpoint] = channel
        return channel

    async def _connected(self, endpoint: str, timeout_s: float) -> grpc.aio.Channel:
        """The endpoint's channel once it is connected: what fails before that was certainly not sent."""
        channel = self._channel(endpoint)
        try:
            async with asyncio.timeout(timeout_s):
                while (state := channel.get_state(try_to_connect=True)) is not grpc.ChannelConnectivity.READY:
                    if state in (grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.SHUTDOWN):
                        raise AttemptFailed("cannot connect", endpoint=endpoint, maybe_applied=False)
                    await channel.wait_for_state_change(state)
        except TimeoutError:
            raise AttemptFailed("connecting takes too long", endpoint=endpoint, maybe_applied=False) from None
        return channel

    async def _metadata(self, channel: grpc.aio.Channel, endpoint: str, ends_at_s: float) -> Metadata:
        if not self._config.user:
            return (_REQUIRE_LEADER,)
        async with self._token_lock:
            if self._token is None:
                self._token = await self._authenticate(channel, endpoint, ends_at_s)
            token = self._token
        return (_REQUIRE_LEADER, ("token", token)) if token else (_REQUIRE_LEADER,)

    async def _authenticate(self, channel: grpc.aio.Channel, endpoint: str, ends_at_s: float) -> str:
        """A token for the configured user; empty while the store has authentication switched off."""
        request = rpc.AuthenticateRequest(name=self._config.user, password=self._config.password)
        left_s = max(0.001, ends_at_s - time.monotonic())
        try:
            return (await _invoke(channel, AUTHENTICATE, request, left_s, (_REQUIRE_LEADER,))).token
        except grpc.aio.AioRpcError as error:
            if _details(error) == _AUTH_OFF:
                return ""
            if error.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.PERMISSION_DENIED):
                raise StoreDenied(f"etcd does not accept user {self._config.user!r} with this password") from None
            reason = f"authentication got no answer ({error.code().name})"
            raise AttemptFailed(reason, endpoint=endpoint, maybe_applied=False) from None

    def _translated(self, error: grpc.aio.AioRpcError, endpoint: str) -> StoreError:
        code, details = error.code(), _details(error)
        if details in _STALE_TOKEN or details == _NO_TOKEN or code is grpc.StatusCode.UNAUTHENTICATED:
            if not self._config.user:
                return StoreDenied(f"etcd asks for a user and password: {details}")
            self.drop_token()
            return AttemptFailed(details, endpoint=endpoint, maybe_applied=False)
        if code is grpc.StatusCode.PERMISSION_DENIED:
            return StoreDenied(details)
        if code in _DEFINITE:
            return Refused(details)
        # Whatever else etcd or the network says, the request may have been proposed: "out of space" even means applied.
        return AttemptFailed(f"{code.name} {details}", endpoint=endpoint, maybe_applied=True)


_DEFINITE = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.UNIMPLEMENTED,
)


class EtcdStream(Generic[ResponseT]):
    """One open bidirectional stream. Use as `async with`; leaving it cancels the call."""

    def __init__(
        self, rpc_client: EtcdRpc, call: "grpc.aio.StreamStreamCall[Message, ResponseT]", endpoint: str
    ) -> None:
        self.endpoint = endpoint
        self._rpc = rpc_client
        self._call = call
        self._reading: asyncio.Task[object] | None = None

    async def send(self, request: Message, timeout_s: float) -> None:
        """Raises AttemptFailed if the stream is broken or does not take the request in time."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._call.write(request)
        except TimeoutError:
            raise self._failed("stream takes no request") from None
        except grpc.aio.AioRpcError as error:
            raise self._rpc._translated(error, self.endpoint) from None
        except asyncio.InvalidStateError:
            raise self._failed("stream has ended") from None

    async def receive(self, timeout_s: float) -> ResponseT | None:
        """The next response; None if there is none in time (it is not lost). AttemptFailed if the stream ended."""
        # Cancelling a pending read would end the whole call: hence a task that outlives this wait.
        if self._reading is None:
            self._reading = asyncio.ensure_future(self._call.read())
        done, _ = await asyncio.wait({self._reading}, timeout=timeout_s)
        if not done:
            return None
        reading, self._reading = self._reading, None
        if reading.cancelled():
            raise self._failed("stream was cancelled")
        try:
            response = reading.result()
        except grpc.aio.AioRpcError as error:
            raise self._rpc._translated(error, self.endpoint) from None
        if response is _EOF:
            raise self._failed("stream ended")
        return cast("ResponseT", response)

    def _failed(self, reason: str) -> AttemptFailed:
        return AttemptFailed(reason, endpoint=self.endpoint, maybe_applied=True)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._call.cancel()
        reading, self._reading = self._reading, None
        if reading is not None:
            await asyncio.wait({reading})
            if not reading.cancelled():
                reading.exception()  # the stream is given up: how it ended no longer matters


async def _invoke(
    channel: grpc.aio.Channel,
    method: Method[ResponseT],
    request: Message,
    timeout_s: float,
    metadata: Metadata,
) -> ResponseT:
    stub = channel.unary_unary(method.path, _encode, method.response.FromString)
    return cast("ResponseT", await stub(request, timeout=timeout_s, metadata=metadata))


async def _exchange(
    channel: grpc.aio.Channel,
    method: Method[ResponseT],
    request: Message,
    timeout_s: float,
    metadata: Metadata,
) -> ResponseT:
    """One request and one response over a short stream."""
    call = channel.stream_stream(method.path, _encode, method.response.FromString)(
        None, timeout=timeout_s, metadata=metadata
    )
    try:
        with contextlib.suppress(asyncio.InvalidStateError):  # ended before the request was out: the read tells why
            await call.write(request)
        response = await call.read()
        if response is _EOF:
            status = await call.code()
            raise grpc.aio.AioRpcError(
                status, grpc.aio.Metadata(), grpc.aio.Metadata(), "the stream ended without an answer", None
            )
        return cast("ResponseT", response)
    finally:
        call.cancel()


def _encode(message: Message) -> bytes:
    return message.SerializeToString()


def _details(error: grpc.aio.AioRpcError) -> str:
    return error.details() or ""


def _credentials(config: EtcdConfig) -> grpc.ChannelCredentials:
    def contents(path: Path | None) -> bytes | None:
        if path is None:
            return None
        try:
            return path.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read etcd's TLS file {path}: {error.strerror}") from None

    return grpc.ssl_channel_credentials(contents(config.ca_file), contents(config.key_file), contents(config.cert_file))
