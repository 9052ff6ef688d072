"""A member of a fleet: rank 0 sends `bytes` over one TCP connection to rank 1; both return a time."""

import socket
import time
from typing import Any

PORT = 7078
CONNECT_S = 60.0
PART_BYTES = 1 << 20


def main(place: dict[str, Any]) -> dict[str, float]:
    address = (place["addresses"][1], PORT)
    wanted = int(place["arguments"]["bytes"])
    print("a line that is not the result")
    if place["rank"] == 0:
        return send(address, wanted)
    with socket.create_server(address) as server:
        connection, _ = server.accept()
    received, part = 0, bytearray(PART_BYTES)
    with connection:
        while received < wanted:
            received += connection.recv_into(part)
    return {"received": received, "ended_s": time.monotonic()}


def send(address: tuple[str, int], wanted: int) -> dict[str, float]:
    deadline_s = time.monotonic() + CONNECT_S
    while True:
        started_s = time.monotonic()
        try:
            connection = socket.create_connection(address, CONNECT_S)
            break
        except ConnectionRefusedError:  # the other member is not up yet
            if started_s > deadline_s:
                raise
            time.sleep(0.01)
    with connection:
        connection.sendall(bytes(wanted))
    return {"started_s": started_s}
