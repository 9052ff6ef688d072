"""The reserved MASTER_PORT against real sockets and a real TCPStore."""

import socket
import struct
import subprocess
import sys
from collections.abc import Iterator

import pytest

from elastic_run.agent import master_port

TRIES = 200
IP_LOCAL_PORT_RANGE = 51  # <linux/in.h>, kernel 6.3: bounds the ports one socket may be given
STORE = """
import datetime, sys
import torch.distributed as dist
port, hosts = int(sys.argv[1]), sys.argv[2:]
limit = datetime.timedelta(seconds=20)
for libuv in (True, False):
    for host in hosts * 2:
        store = dist.TCPStore(host, port, 1, is_master=True, timeout=limit, use_libuv=libuv)
        store.set("key", "value")
        client = dist.TCPStore(host, port, is_master=False, timeout=limit, use_libuv=libuv)
        assert client.get("key") == b"value" and store.port == port
        del client, store
print("served")
"""


@pytest.fixture(params=["both families", "IPv4 only"])
def reserved(request: pytest.FixtureRequest) -> Iterator[master_port.ReservedPort]:
    if request.param == "both families":
        port = master_port.reserve()
    else:
        port = master_port.ReservedPort(master_port._bound(socket.AF_INET, "0.0.0.0"))
    with port:
        yield port


def test_tcp_stores_open_again_and_again_on_the_reserved_port(reserved: master_port.ReservedPort) -> None:
    hosts = ["127.0.0.1", "localhost", "::1"]
    command = [sys.executable, "-c", STORE, str(reserved.port), *hosts]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.stdout == "served\n", ended.stderr
    assert nobody_listens(reserved.port)


@pytest.mark.parametrize("reuse_address", [False, True])
def test_a_bind_to_any_port_is_never_given_the_reserved_one(
    reserved: master_port.ReservedPort, reuse_address: bool
) -> None:
    with free_socket(reserved.port, reuse_address=reuse_address) as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", 0))


def test_a_connection_is_never_given_the_reserved_port(reserved: master_port.ReservedPort) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        free_socket(reserved.port, reuse_address=False) as client,
        pytest.raises(OSError, match="assign requested address"),
    ):
        client.connect(server.getsockname())


def test_reservations_and_listeners_never_share_a_port() -> None:
    with master_port.reserve() as reserved:
        held = [master_port.reserve() for _ in range(TRIES)]
        servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(TRIES)]  # create_server sets SO_REUSEADDR
        ports = [reserved.port, *(one.port for one in held), *(one.getsockname()[1] for one in servers)]
        for one in [*held, *servers]:
            one.close()
    assert len(set(ports)) == len(ports)


def test_a_closed_reservation_is_free_for_anybody() -> None:
    reserved = master_port.reserve()
    reserved.close()
    reserved.close()
    with socket.socket() as other:
        other.bind(("127.0.0.1", reserved.port))


def free_socket(port: int, *, reuse_address: bool) -> socket.socket:
    """A socket that the kernel may give no other port than `port`."""
    result = socket.socket()
    if reuse_address:
        result.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        result.setsockopt(socket.IPPROTO_IP, IP_LOCAL_PORT_RANGE, struct.pack("=I", port << 16 | port))
    except OSError:
        result.close()
        pytest.skip("this kernel cannot bound the ports of one socket (needs Linux 6.3)")
    return result


def nobody_listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0
