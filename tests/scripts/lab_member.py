"""A member of a fleet that ends as `arguments["ends"]` says for its rank: return, raise, hang."""

import signal
import socket
from typing import Any


def main(place: dict[str, Any]) -> list[object]:
    print(f"rank {place['rank']} was here")
    match place["arguments"]["ends"][place["rank"]]:
        case "raise":
            raise RuntimeError("as asked")
        case "hang":
            signal.pause()
    return [place["rank"], place["host"], socket.gethostname(), socket.gethostbyname(socket.gethostname())]
