"""Records operations as a worker would, says so, and then hangs in the middle of one, until it is killed.

Arguments: how: "hang", or "storm" to go on recording as fast as it can; the file comes by ELASTIC_RUN_TELEMETRY.
"""

import os
import sys
import time

from elastic_run.runtime.edge.operations_codes import Algorithm, Dtype, Kind, Reduction, State
from elastic_run.runtime.edge.operations_source import OF_THIS_PROCESS

writer = OF_THIS_PROCESS.writer(os.environ)
peer = writer.peer("w-peer")
writer.group(5, "world")


def begin(sequence: int) -> int:
    return writer.begin(
        Kind.ALL_REDUCE,
        group=5,
        view=2,
        sequence=sequence,
        enter_ns=time.monotonic_ns(),
        members=2,
        nbytes=sequence,
        reduction=Reduction.SUM,
        dtype=Dtype.FLOAT32,
        algorithm=Algorithm.RING,
    )


def move(operation: int, nbytes: int) -> None:
    writer.transfer(
        operation,
        peer,
        sent_bytes=nbytes,
        received_bytes=nbytes,
        send_blocked_ns=nbytes,
        receive_blocked_ns=nbytes,
        progress_ns=nbytes,
    )


for sequence in range(1, 4):
    operation = begin(sequence)
    move(operation, sequence)
    writer.finish(operation, State.DONE, done_ns=time.monotonic_ns(), moved_bytes=2 * sequence)
hung = begin(4)
move(hung, 4)
writer.update(hung, first_sent_ns=time.monotonic_ns(), moved_bytes=4)
print("ready", flush=True)
sequence = 5
while sys.argv[1] == "storm":
    operation = begin(sequence)
    move(operation, sequence)
    writer.finish(operation, State.DONE, done_ns=time.monotonic_ns(), moved_bytes=2 * sequence)
    sequence += 1
time.sleep(600)
