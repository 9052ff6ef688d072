"""Runs one Python file on several hosts of a laboratory at once and collects what its `main` returned.

The file defines `main(place)`; place is a dict: `rank`, `host`, `addresses` (of all members, by rank) and `arguments`
(given by the caller). What it returns travels back as JSON; what it prints is kept as the member's log.

    with Lab(("a", "b")) as lab, Fleet(lab, Path("exchange.py"), arguments={"bytes": 1024}) as fleet:
        lab.set("a", "b", blocked=True)
        first, second = fleet.collect(timeout_s=60)
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from elastic_run.chaos.network import member
from elastic_run.chaos.network.host_process import HostProcess, LabError
from elastic_run.chaos.network.lab import Lab

LOG_CHARS_MAX = 20_000
"""Of each member's log, from its end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How a member ended. `result` is what its main returned; None as well when it did not return."""

    rank: int
    host: str
    returncode: int | None
    """None: it still ran when the time was over, and was killed."""
    result: object
    log: str

    def returned(self) -> object:
        """The result of a member that must have returned.

        Raises:
            LabError: it did not; the message holds its log.
        """
        if self.returncode != 0:
            how = "ran into the time limit" if self.returncode is None else f"ended with {self.returncode}"
            raise LabError(f"member {self.rank} on {self.host} {how}; its log:\n{self.log}")
        return self.result


class Fleet:
    """Starts its members at construction, one per entry of `hosts` (default: one on each host of the laboratory)."""

    def __init__(
        self,
        lab: Lab,
        script: Path,
        *,
        hosts: Sequence[str] | None = None,
        arguments: Mapping[str, object] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        """Start the members.

        Raises:
            LabError: one could not be started; none is left then.
        """
        placed = tuple(lab.hosts if hosts is None else hosts)
        addresses = [lab.address(host) for host in placed]
        self.processes: list[HostProcess] = []
        """By rank; they may be signalled."""
        self._files: list[tuple[IO[str], IO[str], IO[str]]] = []
        try:
            for rank, host in enumerate(placed):
                place = {"rank": rank, "host": host, "addresses": addresses, "arguments": dict(arguments or {})}
                self._start(lab, script, place, env)
        except BaseException:
            self.close()
            raise

    def collect(self, timeout_s: float) -> list[Ending]:
        """Wait for all members, kill those that still run after the time, and return the endings by rank."""
        deadline_s = time.monotonic() + timeout_s
        endings = []
        for rank, (process, (_, result_file, log_file)) in enumerate(zip(self.processes, self._files, strict=True)):
            try:
                returncode: int | None = process.wait(max(0.0, deadline_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                returncode = None
                process.kill()
                process.wait()
            text = _read(result_file)
            result = json.loads(text) if returncode == 0 and text else None
            log = _read(log_file)[-LOG_CHARS_MAX:]
            endings.append(Ending(rank=rank, host=process.host, returncode=returncode, result=result, log=log))
        return endings

    def close(self) -> None:
        """Kill the members that still run."""
        for process in self.processes:
            process.close()
        for files in self._files:
            for file in files:
                file.close()
        self.processes, self._files = [], []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self, lab: Lab, script: Path, place: Mapping[str, object], env: Mapping[str, str] | None) -> None:
        # unnamed files, not pipes: members can write any amount while nobody reads
        files = (_file(), _file(), _file())
        self._files.append(files)
        place_file, result_file, log_file = files
        json.dump(place, place_file)
        place_file.flush()
        place_file.seek(0)
        command = [sys.executable, member.__file__, str(script.resolve())]
        host = str(place["host"])
        self.processes.append(lab.popen(host, command, env=env, stdin=place_file, stdout=result_file, stderr=log_file))


def _file() -> IO[str]:
    return tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")


def _read(file: IO[str]) -> str:
    file.seek(0)
    return file.read()
