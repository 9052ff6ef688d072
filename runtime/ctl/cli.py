"""`elastic-ctl`: asks about a job and prints the answer; `forget` deletes what a job that is over left in etcd;
`telemetry dump` reads one worker's file.

Exit codes: 0; 1 the job is unknown, or nobody answers, or it lives and cannot be forgotten; 2 usage; 130 by Ctrl-C.
JSON (--json), one document; times are unix seconds, null means not known:
  status  job_id source problem leader leader_metrics_port fencing_token condition reason nodes_min nodes_max view
          world_size restarts_used max_restarts step step_rate_hz last_event nodes; source: leader, or store if no
          leader answers (problem: why)
  nodes   job_id source problem nodes; a node: node incarnation address nproc condition reason in_view view phase
          workers_alive step step_rate_hz metrics_port
  views   job_id current views; a view: number status members (node incarnation address nproc) restart_count reason
          proposed_at stop_at_step master_addr master_port
  events  job_id events; an event: sequence at kind message node view. With --follow: one event a line
  telemetry dump: see docs/telemetry.md
"""

import argparse
import asyncio
import dataclasses
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from elastic_run.runtime.ctl import forget, telemetry_dump, text
from elastic_run.runtime.ctl.client import connected
from elastic_run.runtime.ctl.find import Target, find_job
from elastic_run.runtime.ctl.picture import installed_view
from elastic_run.runtime.edge import store_access
from elastic_run.runtime.edge.store import Store
from elastic_run.runtime.protocol.errors import ElasticError, UserError
from elastic_run.runtime.protocol.records import namespace

T = TypeVar("T")

EXIT_UNKNOWN, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130
Question = Callable[[argparse.Namespace], Coroutine[Any, Any, None]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code."""
    args = _parser().parse_args(argv)
    try:
        args.command(args)
        sys.stdout.flush()
    except UserError as error:
        return _failed(error, EXIT_USAGE)
    except ElasticError as error:
        return _failed(error, EXIT_UNKNOWN)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


async def _status(args: argparse.Namespace) -> None:
    async with connected(find_job(args, os.environ)) as job:
        picture = await job.picture()
    _answer(args, dataclasses.asdict(picture), lambda: text.status(picture))


async def _nodes(args: argparse.Namespace) -> None:
    async with connected(find_job(args, os.environ)) as job:
        picture = await job.picture()
    document = dataclasses.asdict(picture)
    _answer(
        args, {name: document[name] for name in ("job_id", "source", "problem", "nodes")}, lambda: text.nodes(picture)
    )


async def _views(args: argparse.Namespace) -> None:
    async with connected(find_job(args, os.environ)) as job:
        records = await job.records()
    current = installed_view(records)
    document = {
        "job_id": job.target.job_id,
        "current": current.number if current else None,
        "views": [dataclasses.asdict(view) for view in records.views],
    }
    _answer(args, document, lambda: text.views(records.views, now=time.time()))


async def _events(args: argparse.Namespace) -> None:
    async with connected(find_job(args, os.environ)) as job:
        if not args.follow:
            found = (await job.records()).events
            document = {"job_id": job.target.job_id, "events": [dataclasses.asdict(event) for event in found]}
            _answer(args, document, lambda: text.events(found, now=time.time()))
            return
        async with aclosing(job.follow_events()) as events:
            async for event in events:
                print(json.dumps(dataclasses.asdict(event)) if args.json else text.event_line(event), flush=True)


def _forget(args: argparse.Namespace) -> None:
    target = find_job(args, os.environ)
    remains = asyncio.run(_with_store(target, lambda store: forget.find_remains(store, target)))
    print(f"job {target.job_id} at {', '.join(target.store.endpoints)}: {remains.describe()}", flush=True)
    if not args.yes and not _agreed():  # asked outside of the event loop, where Ctrl-C is heard
        raise UserError("nothing was deleted; give --yes to delete without being asked")
    asyncio.run(_with_store(target, lambda store: forget.forget(store, target, remains)))
    print(f"job {target.job_id} is forgotten")


def _telemetry_dump(args: argparse.Namespace) -> None:
    dump = telemetry_dump.read(args.file, now_ns=time.monotonic_ns())
    _answer(args, telemetry_dump.document(dump), lambda: telemetry_dump.readable(dump, last=args.last))


async def _with_store(target: Target, use: Callable[[Store], Awaitable[T]]) -> T:
    store = store_access.open_store(target.store, namespace(target.job_id))
    try:
        return await use(store)
    finally:
        await store.close()


def _agreed() -> bool:
    return sys.stdin.isatty() and input("delete all of this? [y/N] ").strip().lower() in ("y", "yes")


def _asked(question: Question) -> Callable[[argparse.Namespace], None]:
    return lambda args: asyncio.run(question(args))


def _answer(args: argparse.Namespace, document: dict[str, Any], readable: Callable[[], str]) -> None:
    print(json.dumps(document, indent=2) if args.json else readable())


def _failed(error: ElasticError, code: int) -> int:
    print(f"elastic-ctl: {error}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="elastic-ctl",
        description="Asks about a job of elastic-run: the one on this machine, or the one that --rdzv-endpoint and "
        "--rdzv-id name.",
        epilog="exit codes: 0; 1 the job is unknown or nobody answers; 2 usage; 130 ended by Ctrl-C",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable[[argparse.Namespace], None], summary: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=summary, description=summary)
        added.set_defaults(command=command)
        added.add_argument("--rdzv-id", "--rdzv_id", default="", metavar="ID", help="the job's id")
        store_access.add_flags(added)
        return added

    asking = [
        add("status", _asked(_status), "condition of the job, its leader, view, step and last event"),
        add("nodes", _asked(_nodes), "every node, its condition and its workers"),
        add("views", _asked(_views), "every view that was ever proposed, and why"),
        add("events", _asked(_events), "the job's history"),
    ]
    for question in asking:
        question.add_argument("--json", action="store_true", help="answer in JSON, with field names that stay")
    asking[-1].add_argument("--follow", action="store_true", help="go on with new events until the job ends")
    forgetting = add("forget", _forget, "delete all that a job which is over left in its store")
    forgetting.add_argument("--yes", action="store_true", help="do not ask")
    telemetry_dump.add_command(commands, _telemetry_dump)
    return parser


if __name__ == "__main__":
    sys.exit(main())
