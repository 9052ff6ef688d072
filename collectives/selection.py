"""Which algorithm an operation takes: the same on every member, from what all members know.

Not here: the algorithms (algorithms/).
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from elastic_run.collectives.options import MeshOptions

if TYPE_CHECKING:
    from elastic_run.collectives.peer import Peer


class Method(enum.StrEnum):
    """How an all-reduce is done."""

    EXCHANGE = "exchange"  # everybody sends everything to everybody: fewest steps, for small messages
    SHARED_ONCE = "shared-once"  # through shared memory in one step: each member reduces everything for itself
    SHARED = "shared"  # through shared memory: each member reduces its slice where all lies
    STREAMED = "streamed"  # through a little shared memory, in chunks that stay in the caches
    PIPED = "piped"  # as pairwise, in byte streams that compiled kernels drive
    PAIRWISE = "pairwise"  # each member gets its slice from every other, reduces it, and sends it to all
    RING = "ring"  # slices travel once round the ring to be reduced, and once more to be spread
    HIERARCHICAL = "hierarchical"  # within each host first, then between hosts


ONE_HOST = frozenset({Method.SHARED, Method.SHARED_ONCE, Method.STREAMED})
"""Work only where all members share memory."""
COMPILED = frozenset({Method.STREAMED, Method.PIPED})
"""Take only what compiled kernels know; where a member has none, all go another way."""


class Form(enum.StrEnum):
    """How the operations are done that are no all-reduce and no exchange of all with all."""

    DIRECT = "direct"  # one message from each to each
    STAGED = "staged"  # through shared memory, staged once and read by everybody
    CHUNKED = "chunked"  # in chunks that are reduced, or passed on, while the next arrive


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What all members know about their group."""

    hosts: tuple[int, ...]
    """Per rank: which host it is on, numbered by first appearance. Without shared memory every rank is its own host."""

    @property
    def one_host(self) -> bool:
        return len(set(self.hosts)) == 1

    @property
    def one_each(self) -> bool:
        return len(set(self.hosts)) == len(self.hosts)


EXCHANGE_BYTES_MAX = 16 << 10
SHARED_ONCE_READ_BYTES_MAX = 8 << 20
"""Of all members' values together, which each then reads whole. Measured at 4 members: level at 1 to 4 MiB each."""
STREAM_BYTES_MIN = 128 << 10
PIPE_BYTES_MIN = 128 << 10
PIPE_MEMBERS_MAX = 8
"""Everybody has a pipe to everybody, and small pieces on each."""
DIRECT_BYTES_MAX = 64 << 10
RING_SHARE_BYTES_MIN = 1 << 20
"""Smaller shares make chunks that cost more to announce than to send. Measured by `python -m benchmarks crossover`."""


def layout_of(worker: str, peers: "Sequence[Peer | None]") -> Layout:
    """Return where the members are; None stands for `worker` itself."""
    names: dict[str, int] = {}
    hosts = []
    for peer in peers:
        name = "here" if peer is None or peer.local else _host_of(peer)
        hosts.append(names.setdefault(name, len(names)))
    return Layout(hosts=tuple(hosts))


def _host_of(peer: "Peer") -> str:
    assert peer.endpoint is not None
    return peer.endpoint.host if peer.shares_memory else f"worker {peer.worker}"


def in_one_step(nbytes: int, members: int) -> bool:
    """Say whether each member had better read everything than wait for a second step."""
    return members == 2 or nbytes * members <= SHARED_ONCE_READ_BYTES_MAX


def choose(nbytes: int, layout: Layout, options: MeshOptions) -> Method:
    """Return how to all-reduce `nbytes` per member."""
    if nbytes <= EXCHANGE_BYTES_MAX:
        return Method.EXCHANGE
    if layout.one_host and nbytes <= options.arena_bytes // 4:
        return Method.SHARED_ONCE if in_one_step(nbytes, len(layout.hosts)) else Method.SHARED
    if not layout.one_each and nbytes <= options.arena_bytes // 4:
        return Method.HIERARCHICAL
    return Method.PAIRWISE


def choose_all_reduce(nbytes: int, layout: Layout, options: MeshOptions, *, widened: bool, streamable: bool) -> Method:
    """Return how to all-reduce `nbytes` per member.

    `widened`: partial results take more room than values. `streamable`: compiled kernels know type and reduction.
    """
    method = choose(nbytes, layout, options)
    if streamable and layout.one_host and nbytes >= STREAM_BYTES_MIN and len(layout.hosts) > 1:
        return Method.STREAMED
    members = len(layout.hosts)
    if method is not Method.PAIRWISE:
        return method
    if streamable and nbytes >= PIPE_BYTES_MIN and 1 < members <= PIPE_MEMBERS_MAX and layout.one_each:
        return Method.PIPED
    if members == 2 and nbytes <= options.scratch_bytes:
        return Method.EXCHANGE
    if not widened and nbytes >= members * RING_SHARE_BYTES_MIN:
        return Method.RING
    return Method.PAIRWISE


def form_of(nbytes: int, layout: Layout, options: MeshOptions) -> Form:
    """Return how to broadcast, reduce, gather or scatter `nbytes` per member."""
    if nbytes <= DIRECT_BYTES_MAX or len(layout.hosts) == 1:
        return Form.DIRECT
    if layout.one_host and nbytes <= options.arena_bytes // 4:
        return Form.STAGED
    return Form.CHUNKED
