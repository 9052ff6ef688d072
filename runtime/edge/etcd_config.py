"""Where etcd is and how to enter: endpoints, namespace, TLS files, user.

Free of grpc, so that a launcher can check what the user gave without paying for the import.
Not here: the client (`etcd.py`), parsing of command lines.
"""

from dataclasses import dataclass, field
from pathlib import Path

from elastic_run.runtime.protocol.errors import UserError

ENDPOINTS_MAX = 16  # etcd clusters have 3, 5 or 7 members


@dataclass(frozen=True, slots=True, kw_only=True)
class EtcdConfig:
    """Raises UserError for what cannot work. With any TLS file, or `tls`, connections are encrypted and checked.

    `endpoints` are `host:port`. `namespace` is the path all keys of this client lie below, such as `/elastic/job7`.
    """

    endpoints: tuple[str, ...]
    namespace: str
    tls: bool = False
    ca_file: Path | None = None  # None: the system's certificate authorities
    cert_file: Path | None = None  # client certificate; needs key_file
    key_file: Path | None = None
    user: str = ""
    password: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        if not 1 <= len(self.endpoints) <= ENDPOINTS_MAX:
            raise UserError(f"give 1 to {ENDPOINTS_MAX} etcd endpoints, not {len(self.endpoints)}")
        for endpoint in self.endpoints:
            host, colon, port = endpoint.rpartition(":")
            if not (host and colon and port.isascii() and port.isdigit() and 0 < int(port) < 65536) or "/" in endpoint:
                raise UserError(f"etcd endpoint {endpoint!r} is not of the form host:port")
        if not self.namespace.startswith("/") or self.namespace.endswith("/"):
            raise UserError(f"etcd namespace {self.namespace!r} must begin with '/' and not end with it")
        if (self.cert_file is None) != (self.key_file is None):
            raise UserError("an etcd client certificate and its key must be given together")
        if self.password and not self.user:
            raise UserError("an etcd password was given without a user")

    @property
    def secure(self) -> bool:
        """Whether connections use TLS."""
        return self.tls or self.ca_file is not None or self.cert_file is not None
