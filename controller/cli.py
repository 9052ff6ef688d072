"""`elastic-controller`: one controller candidate. Started by elastic-run with --config, or by hand with flags.

Exit codes: 0 the job has ended, 2 bad flag or unreachable address, 4 the job's keys in the store are corrupt or
foreign, 128+N ended by signal N (leadership is given back first).
"""

import argparse
import asyncio
import logging
import os
import secrets
import signal
import sys
from pathlib import Path

from elastic_run.controller.driver import ControllerDriver
from elastic_run.controller.metrics import serve_metrics
from elastic_run.runtime.edge import store_access
from elastic_run.runtime.edge.files import read_bounded
from elastic_run.runtime.edge.log import set_up_logging
from elastic_run.runtime.protocol import codec
from elastic_run.runtime.protocol.config import ControllerConfig, JobConfig
from elastic_run.runtime.protocol.errors import CodecError, StoreCorrupt, UserError, VersionMismatch
from elastic_run.runtime.protocol.ids import JobId, check_name
from elastic_run.runtime.protocol.records import namespace

EXIT_USAGE, EXIT_CORRUPT, EXIT_BY_SIGNAL = 2, 4, 128
CONFIG_BYTES_MAX = 1024 * 1024

log = logging.getLogger("elastic_run.controller")


def main() -> None:
    try:
        config = _config(sys.argv[1:])
        sys.exit(asyncio.run(_run(config)))
    except UserError as error:
        print(f"elastic-controller: {error}", file=sys.stderr)
        sys.exit(EXIT_USAGE)


def _config(argv: list[str]) -> ControllerConfig:
    parser = argparse.ArgumentParser(prog="elastic-controller", description="One controller candidate of a job.")
    parser.add_argument("--config", help="configuration file written by elastic-run; excludes all other flags")
    parser.add_argument("--rdzv-id", "--rdzv_id", help="job id, as given to elastic-run")
    parser.add_argument("--nnodes", default="1:1", help="MIN:MAX, as given to elastic-run")
    parser.add_argument("--max-restarts", "--max_restarts", type=int, default=0, help="as given to elastic-run")
    parser.add_argument(
        "--last-call", type=float, default=30.0, help="seconds to wait for more nodes once MIN are there"
    )
    parser.add_argument("--join-timeout", type=float, default=600.0, help="seconds a job may stay below MIN nodes")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on and to publish to agents")
    parser.add_argument("--port", type=int, default=0, help="port to listen on; 0: any free one")
    parser.add_argument("--metrics-port", type=int, help="port of /metrics and /healthz on loopback; 0: any free one")
    store_access.add_flags(parser)
    args = parser.parse_args(argv)
    if args.config:
        path = Path(args.config)
        try:
            return codec.decode(ControllerConfig, read_bounded(path, CONFIG_BYTES_MAX), where=str(path))
        except CodecError as error:
            raise UserError(str(error)) from None
    if not args.rdzv_id:
        parser.error("--rdzv-id is needed: the id the job's nodes are started with")
    low, _, high = args.nnodes.partition(":")
    try:
        job = JobConfig(
            job_id=JobId(check_name(args.rdzv_id, what="job id")),
            nodes_min=int(low),
            nodes_max=int(high or low),
            max_restarts=args.max_restarts,
            last_call_s=args.last_call,
            join_timeout_s=args.join_timeout,
        )
    except ValueError as error:
        raise UserError(f"--nnodes={args.nnodes} and the other numbers: {error}") from None
    return ControllerConfig(
        job=job,
        store=store_access.from_flags(args),
        candidate=f"{os.uname().nodename}-{secrets.token_hex(3)}",
        host=args.host,
        port=args.port,
        run_dir="",
        metrics_port=args.metrics_port,
    )


async def _run(config: ControllerConfig) -> int:
    set_up_logging("controller", job=config.job.job_id, candidate=config.candidate)
    store = store_access.open_store(config.store, namespace(config.job.job_id))
    driver = ControllerDriver(config, store)
    metrics = serve_metrics(driver, config.metrics_port)
    running = asyncio.create_task(driver.run())
    received: list[int] = []

    def stop(number: int) -> None:
        received.append(number)
        running.cancel()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    try:
        await running
    except asyncio.CancelledError:
        if not received:
            raise
        return EXIT_BY_SIGNAL + received[0]
    except (StoreCorrupt, VersionMismatch) as error:
        print(f"elastic-controller: {error}", file=sys.stderr)
        return EXIT_CORRUPT
    finally:
        if metrics is not None:
            metrics.close()
        await store.close()
    return 0


if __name__ == "__main__":
    main()
