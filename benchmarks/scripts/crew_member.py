"""Imports a collective system once, forks a member for each given socket, and lets each obey its crew.

Usage: python -m benchmarks.scripts.crew_member BACKEND FD...   (started by benchmarks/crew.py)

A member says its pid, then answers command after command until its socket ends. What goes wrong in a command ends the
member with a message that says what.
"""

import os
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
from benchmarks.channel import Channel, ChannelClosed
from benchmarks.scripts import crew_tasks
from benchmarks.scripts.crew_backends import Backend, View, backend_named


def main() -> int:
    name, *descriptors = sys.argv[1:]
    ends = [socket.socket(fileno=int(descriptor)) for descriptor in descriptors]
    torch.set_num_threads(1)
    make = backend_named(name)
    members = []
    for end in ends:
        pid = os.fork()
        if pid == 0:
            end_of_member(end, ends, make)
        members.append(pid)
    for end in ends:
        end.close()
    for pid in members:
        os.waitpid(pid, 0)
    return 0


def end_of_member(end: socket.socket, ends: Sequence[socket.socket], make: Callable[[], Backend]) -> None:
    """A forked child's whole life; never returns."""
    code = 1
    try:
        for other in ends:
            if other is not end:
                other.close()
        code = live(Channel(end), make)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # The rest of main() is the parent's.
        os._exit(code)


def live(channel: Channel, make: Callable[[], Backend]) -> int:
    try:
        backend = make()
        channel.send({"pid": os.getpid()})
        while True:
            command = channel.receive()
            COMMANDS[command.pop("do")](backend, channel, command)
    except ChannelClosed:
        return 0
    except Exception as error:
        traceback.print_exc()
        try:
            channel.send({"failed": f"{type(error).__name__}: {error}"})
        except ChannelClosed:
            return 1
        raise


def introduce(backend: Backend, channel: Channel, command: dict[str, Any]) -> None:
    channel.send({"introduction": backend.introduce(bytes.fromhex(command["secret"]))})


def form(backend: Backend, channel: Channel, command: dict[str, Any]) -> None:
    backend.form(View(**command["view"]))
    channel.send({"formed": True})


def leave(backend: Backend, channel: Channel, command: dict[str, Any]) -> None:
    backend.leave()
    channel.send({"left": True})


COMMANDS: dict[str, Callable[[Backend, Channel, dict[str, Any]], None]] = {
    "introduce": introduce,
    "form": form,
    "leave": leave,
    "measure": crew_tasks.measure,
    "be_struck": crew_tasks.be_struck,
    "prepare": crew_tasks.prepare,
    "loop": crew_tasks.loop,
}

if __name__ == "__main__":
    sys.exit(main())
