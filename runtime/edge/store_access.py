"""How a command reaches etcd: the flags that say so, and the client they lead to.

Not here: elastic-run's own flags (runtime/flag_parser.py), which know torchrun's rendezvous besides.
"""

import argparse
from pathlib import Path

from elastic_run.runtime.edge.etcd_config import EtcdConfig
from elastic_run.runtime.edge.files import read_bounded
from elastic_run.runtime.edge.store import Store
from elastic_run.runtime.protocol.config import StoreConfig
from elastic_run.runtime.protocol.errors import UserError

PASSWORD_BYTES_MAX = 4096
SCHEME = "etcd://"


def add_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("store")
    group.add_argument("--rdzv-endpoint", "--rdzv_endpoint", default="", help="etcd://HOST:PORT[,HOST:PORT...]")
    group.add_argument("--store-ca", help="file of the certificate authority; switches TLS on")
    group.add_argument("--store-cert", help="file of this client's certificate")
    group.add_argument("--store-key", help="file of this client's key")
    group.add_argument("--store-user", help="etcd user")
    group.add_argument("--store-password-file", help="file that holds the user's password")


def from_flags(args: argparse.Namespace) -> StoreConfig:
    """Return the store the flags name. Raises UserError when they name none."""
    endpoints = tuple(e.strip() for e in args.rdzv_endpoint.removeprefix(SCHEME).split(",") if e.strip())
    if not endpoints:
        raise UserError("no store is named: give --rdzv-endpoint=etcd://HOST:PORT[,HOST:PORT...]")
    return StoreConfig(
        endpoints=endpoints,
        ca_file=args.store_ca,
        cert_file=args.store_cert,
        key_file=args.store_key,
        user=args.store_user,
        password=read_password(args.store_password_file),
    )


def read_password(path: str | None) -> str | None:
    if path is None:
        return None
    content = read_bounded(Path(path), PASSWORD_BYTES_MAX)
    if not content.strip() or len(content) > PASSWORD_BYTES_MAX:
        raise UserError(f"{path} does not hold a password of 1 to {PASSWORD_BYTES_MAX} bytes")
    try:
        return content.decode().strip()
    except UnicodeDecodeError:
        raise UserError(f"{path} does not hold a password in UTF-8") from None


def open_store(config: StoreConfig, namespace: str) -> Store:
    """Return a client of everything below `namespace`; it connects with its first call."""
    from elastic_run.runtime.edge.etcd import EtcdStore  # grpc is imported only by who talks to etcd

    return EtcdStore(
        EtcdConfig(
            endpoints=config.endpoints,
            namespace=namespace.rstrip("/"),
            ca_file=Path(config.ca_file) if config.ca_file else None,
            cert_file=Path(config.cert_file) if config.cert_file else None,
            key_file=Path(config.key_file) if config.key_file else None,
            user=config.user or "",
            password=config.password or "",
        )
    )
