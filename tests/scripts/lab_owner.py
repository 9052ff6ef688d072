"""Opens a laboratory, starts a daemon on each host, prints a pid for each, and waits to be killed.

A fork of it keeps every descriptor open, and tells after the kill whether the relay ended nevertheless.
"""

import os
import select
import signal
import subprocess

import psutil

from elastic_run.chaos.network.lab import Lab

DAEMON = "setsid sleep 1000 >/dev/null 2>&1 </dev/null & echo; exec sleep 1000"
RELAY_S = 20.0


def main() -> None:
    lab = Lab(("a", "b"))
    for host in lab.hosts:
        process = lab.popen(host, ["sh", "-c", DAEMON], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        print(process.pid, flush=True)
    if os.fork() == 0:
        watch_relay(owner=os.getppid())
        os._exit(0)
    signal.pause()


def watch_relay(owner: int) -> None:
    relays = [
        child.pid for child in psutil.Process(owner).children() if "elastic_run.chaos.network.relay" in child.cmdline()
    ]
    relay_fd, owner_fd = os.pidfd_open(relays[0]), os.pidfd_open(owner)
    print("watching", flush=True)
    select.select([owner_fd], [], [])
    ended = select.select([relay_fd], [], [], RELAY_S)[0]
    print("relay ended" if ended else "relay stays", flush=True)


if __name__ == "__main__":
    main()
