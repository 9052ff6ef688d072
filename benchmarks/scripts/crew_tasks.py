"""What members are told to do and time; every result is checked in every element, outside the timed part.

Invariants: 1. times are taken on the machine's monotonic clock, which all members share; 2. members begin together:
each says that its tensors are filled, and waits for the word; 3. a wrong sum raises.
"""

import contextlib
import time
from typing import Any

import torch
from benchmarks.channel import Channel
from benchmarks.scripts import crew_pattern
from benchmarks.scripts.crew_backends import Backend, View

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# The last two elements of the loop's tensor: who has heard of the next view, and who has heard that it is over.
HEARD, OVER = -2, -1
PREPARE_TIMEOUT_S = 30.0
PREPARE_POLL_S = 0.05


class WrongResult(Exception):
    """A sum differs from what was contributed."""


def measure(backend: Backend, channel: Channel, command: dict[str, Any]) -> None:
    """Times batches of calls: the calls of a batch run back to back, each on a tensor of its own."""
    rank, workers = command["rank"], command["workers"]
    tensors = [empty(command["bytes"], command["dtype"]) for _ in range(command["batch"])]
    outputs = [backend.output_for(tensor) for tensor in tensors]
    batches_s = []
    for batch in range(command["batches"]):
        for place, tensor in enumerate(tensors):
            crew_pattern.fill(tensor, rank, salt=batch + place)
        await_the_word(channel)
        call_s = []
        began_s = time.perf_counter()
        for tensor, output in zip(tensors, outputs, strict=True):
            backend.all_reduce(tensor, output)
            ended_s = time.perf_counter()
            call_s.append(ended_s - began_s)
            began_s = ended_s
        for place, output in enumerate(outputs):
            require_sum(output, workers, salt=batch + place)
        batches_s.append(call_s)
    channel.send({"batches_s": batches_s})


def be_struck(backend: Backend, channel: Channel, command: dict[str, Any]) -> None:
    """Does plain operations, then one in which a member is killed, then one in the view that comes after it."""
    rank, workers = command["rank"], command["workers"]
    struck, after = empty(command["bytes"], "fp32"), empty(command["bytes"], "fp32")
    output = backend.output_for(struck)
    for salt in range(command["plain"]):
        crew_pattern.fill(struck, rank, salt)
        await_the_word(channel)
        began_ns = time.monotonic_ns()
        backend.all_reduce(struck, output)
        channel.send({"plain_ns": time.monotonic_ns() - began_ns})
        require_sum(output, workers, salt)
    crew_pattern.fill(struck, rank, salt=0)
    # The next view has one member less, so ranks above the victim's move down.
    later_rank = rank - (rank > command["victim_rank"])
    crew_pattern.fill(after, later_rank, salt=1)
    await_the_word(channel)
    reason = None
    try:
        backend.all_reduce(struck, output)
    except backend.errors as error:
        reason = f"{type(error).__name__}: {error}"
    noticed_ns = time.monotonic_ns()
    view = View(**channel.receive()["view"])
    backend.form(view)
    formed_ns = time.monotonic_ns()
    output = after if output is struck else output
    backend.all_reduce(after, output)
    done_ns = time.monotonic_ns()
    require_sum(output, view.workers, salt=1)
    channel.send(
        {
            "reason": reason,
            "noticed_ns": noticed_ns,
            "formed_ns": formed_ns,
            "done_ns": done_ns,
            "unchanged": reason is None or not backend.keeps_input or crew_pattern.is_part(struck, rank, salt=0),
        }
    )


def prepare(backend: Backend, channel: Channel, command: dict[str, Any]) -> None:
    """Connects to members of a view to come; says so when it is done."""
    backend.prepare(command["introductions"])
    deadline_s = time.monotonic() + PREPARE_TIMEOUT_S
    while not backend.is_prepared():
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"not connected to the others after {PREPARE_TIMEOUT_S} s")
        time.sleep(PREPARE_POLL_S)
    channel.send({"prepared": True})


def loop(backend: Backend, channel: Channel, command: dict[str, Any]) -> None:
    """Reduces in a loop; takes the next view when all members of this one have heard of it, ends when all are told to.

    A newcomer says when it is about to enter its first view. Everyone says once, after so many operations since it
    began or the view changed (`settled_after`), that it has come so far.
    """
    tensor = empty(command["bytes"], "fp32")
    output = backend.output_for(tensor)
    view = View(**command["view"])
    if command["newcomer"]:
        # Its first touch of memory and code is not the others' pause.
        crew_pattern.fill(tensor, view.rank, salt=0)
        crew_pattern.is_part(tensor, view.rank, salt=0)
        channel.send({"warm": True})
        backend.form(view)
    done_ns: list[int] = []
    first_of_next = 0
    turn, heard, over, preparing = 0, None, False, False
    while True:
        crew_pattern.fill(tensor, view.rank, salt=turn)
        tensor[HEARD], tensor[OVER] = float(heard is not None), float(over)
        backend.all_reduce(tensor, output)
        done_ns.append(time.monotonic_ns())
        heard_by, over_by = output[HEARD:].tolist()
        require_sum(output[: -crew_pattern.COLUMNS], view.workers, salt=turn)
        turn += 1
        if over_by == view.workers:
            break
        if heard is not None and heard_by == view.workers:
            part(backend)
            backend.form(heard)
            view, heard, turn = heard, None, 0
            first_of_next = len(done_ns)
        if turn == command["settled_after"]:
            channel.send({"settled": True})
        if preparing and backend.is_prepared():
            preparing = False
            channel.send({"prepared": True})
        message = channel.poll()
        if message is None:
            continue
        if message["do"] == "prepare":
            backend.prepare(message["introductions"])
            preparing = True
        elif message["do"] == "next_view":
            heard = View(**message["view"])
        else:
            over = True
    channel.send({"done_ns": done_ns, "first_of_next": first_of_next})


def part(backend: Backend) -> None:
    """One operation more, of which nobody needs the result.

    Whoever is through it knows that all have finished the one before, so the group may end now; for whom it is ended
    within it, the same holds.
    """
    with contextlib.suppress(*backend.errors):
        tensor = torch.zeros(1)
        backend.all_reduce(tensor, backend.output_for(tensor))


def empty(nbytes: int, dtype: str) -> torch.Tensor:
    kind = DTYPES[dtype]
    return torch.empty(nbytes // kind.itemsize, dtype=kind)


def await_the_word(channel: Channel) -> None:
    channel.send({"filled": True})
    channel.receive()


def require_sum(output: torch.Tensor, workers: int, salt: int) -> None:
    """Raises WrongResult unless every element is right."""
    if not crew_pattern.is_sum(output, workers, salt):
        raise WrongResult(f"a sum of {output.numel()} elements of {output.dtype} over {workers} workers is wrong")
