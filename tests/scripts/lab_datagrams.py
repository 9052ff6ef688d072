"""Sends and receives datagrams as told on standard input, one command per line, one answer line each.

bind ADDRESS · send ADDRESS TEXT · receive (waits for one) · ping ADDRESS (answers the round trip in seconds) ·
echo COUNT (returns that many to their senders) · many ADDRESS COUNT (sends 0..COUNT-1, then `end` until one is sure to
arrive) · collect (numbers received up to the first `end`).
"""

import json
import socket
import sys
import time

PORT = 7077
SO_RCVBUFFORCE = 33
RECEIVE_BUFFER_BYTES = 1 << 24
ENDS = 200
RECEIVE_S = 30.0


def main() -> None:
    line = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    line.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER_BYTES)
    line.settimeout(RECEIVE_S)
    for command in sys.stdin:
        print(json.dumps(obey(line, *command.split())), flush=True)


def obey(line: socket.socket, verb: str, *words: str) -> object:
    match verb:
        case "bind":
            line.bind((words[0], PORT))
            return "bound"
        case "send":
            return line.sendto(words[1].encode(), (words[0], PORT))
        case "receive":
            return line.recv(2048).decode()
        case "ping":
            started_s = time.monotonic()
            line.sendto(b"ping", (words[0], PORT))
            line.recv(2048)
            return time.monotonic() - started_s
        case "echo":
            for _ in range(int(words[0])):
                text, sender = line.recvfrom(2048)
                line.sendto(text, sender)
            return "echoed"
        case "many":
            for number in range(int(words[1])):
                line.sendto(str(number).encode(), (words[0], PORT))
            for _ in range(ENDS):
                line.sendto(b"end", (words[0], PORT))
            return "sent"
        case "collect":
            numbers = []
            while (text := line.recv(2048)) != b"end":
                numbers.append(int(text))
            return numbers
        case _:
            raise SystemExit(f"unknown command {verb}")


if __name__ == "__main__":
    main()
