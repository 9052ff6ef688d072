"""Where a worker can be reached, and a view as the data plane sees it.

`to_text` and `from_text` are strict: what does not decode is refused with a message.
"""

import os
from dataclasses import dataclass

from elastic_run.runtime.protocol.errors import CodecError, UserError
from elastic_run.runtime.protocol.ids import check_name

MEMBERS_MAX = 100_000
_FIELDS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One worker's listeners."""

    worker: str
    host: str
    """Same value: same kernel and network namespace, so shared memory and unix sockets reach it."""
    address: str
    """IPv4 or IPv6 address without brackets."""
    port: int
    unix: str
    """Name of its abstract unix socket, without the leading NUL."""

    @staticmethod
    def at(worker: str, address: str, port: int) -> "Endpoint":
        """Return the endpoint of a worker with `MeshOptions.at(address, port)`. Workers of one address share a host.

        Raises UserError for an unusable worker id.
        """
        name = check_name(worker, what="worker")
        return Endpoint(worker=name, host=address, address=address, port=port, unix=unix_name_of(address, port))

    def to_text(self) -> str:
        return "|".join((self.worker, self.host, self.address, str(self.port), self.unix))

    @staticmethod
    def from_text(text: str) -> "Endpoint":
        """Raises CodecError."""
        parts = text.split("|")
        if len(parts) != _FIELDS or not parts[3].isdecimal() or not 0 < int(parts[3]) < 1 << 16:
            raise CodecError(f"{text[:200]!r} is no endpoint: worker|host|address|port|unix name is expected")
        try:
            worker = check_name(parts[0], what="worker")
        except UserError as error:
            raise CodecError(str(error)) from None
        return Endpoint(worker=worker, host=parts[1], address=parts[2], port=int(parts[3]), unix=parts[4])


@dataclass(frozen=True, slots=True, kw_only=True)
class DataView:
    """A numbered membership. The order of `members` is the order of ranks and of the ring."""

    number: int
    members: tuple[Endpoint, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.members) <= MEMBERS_MAX or not 0 < self.number < 1 << 63:
            raise ValueError(f"view {self.number} with {len(self.members)} members is impossible")
        if len({member.worker for member in self.members}) != len(self.members):
            raise ValueError(f"view {self.number} names a worker twice")

    @property
    def workers(self) -> tuple[str, ...]:
        return tuple(member.worker for member in self.members)


def unix_name_of(address: str, port: int) -> str:
    """Return the name of the unix socket of a worker whose port was chosen beforehand."""
    return f"elastic-collectives-{address}-{port}"


def this_host() -> str:
    """Return what tells this kernel and network namespace from every other."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        boot = file.read().strip()
    return f"{boot}.{os.stat('/proc/self/ns/net').st_ino}"
