"""Turns a command line into a LaunchConfig: torchrun's flags with torchrun's meanings, and a few of our own.

Invariants (tests/unit/test_flags.py):
1. Nothing is dropped in silence: what is given and has no effect is in `notices`, with the reason.
2. The result depends on the arguments alone: no file, host name, environment or clock is read here.
Not here: declaring flags (flag_parser.py), reading values (flag_values.py), choosing the store (rendezvous.py),
looking at this machine (preflight.py).
"""

from collections.abc import Mapping, Sequence

from elastic_run.runtime.affinity import BindingMode
from elastic_run.runtime.flag_parser import IGNORED, Options, parse_options
from elastic_run.runtime.flag_values import (
    PORT_MAX,
    check_streams,
    parse_local_ranks,
    parse_nproc,
    parse_seconds,
    parse_signals,
)
from elastic_run.runtime.launch_config import LaunchConfig, StatusMode
from elastic_run.runtime.protocol.config import CommandConfig, Entrypoint, OutputConfig
from elastic_run.runtime.protocol.errors import UserError
from elastic_run.runtime.protocol.ids import NodeId, check_name
from elastic_run.runtime.rendezvous import choose_rendezvous

SHUTDOWN_TIMEOUT_S = "30"


def read_command_line(argv: Sequence[str], environ: Mapping[str, str], *, python: str, random_id: str) -> LaunchConfig:
    """Return what a command line (without the program's name) asks for. Raises UserError; --help raises SystemExit.

    `python` runs the script unless PYTHON_EXEC names another; `random_id` names a job that nobody else can join.
    """
    options = parse_options(list(argv), environ)
    choice = choose_rendezvous(options, given=options.given, random_id=random_id)
    ignored = (
        f"--{name.replace('_', '-')} is ignored: {why}" for name, why in IGNORED.items() if name in options.given
    )
    if options.max_restarts < 0:
        raise UserError(f"--max-restarts={options.max_restarts}: write 0 or more")
    return LaunchConfig(
        store=choice.store,
        access=choice.access,
        job_id=choice.job_id,
        nodes_min=choice.nodes_min,
        nodes_max=choice.nodes_max,
        node_rank=choice.node_rank,
        last_call_s=choice.last_call_s,
        join_timeout_s=choice.join_timeout_s,
        nproc=parse_nproc(options.nproc_per_node),
        max_restarts=options.max_restarts,
        node=NodeId(check_name(options.node_name, what="--node-name")) if options.node_name else None,
        local_addr=options.local_addr,
        role=options.role,
        command=_command(options, environ, python),
        output=_output(options),
        signals=parse_signals(options.signals_to_handle),
        shutdown_timeout_s=_shutdown_timeout_s(options, environ),
        virtual_local_rank=options.virtual_local_rank,
        numa_binding=BindingMode(options.numa_binding) if options.numa_binding else None,
        with_controller=not options.no_controller,
        run_dir=options.run_dir,
        metrics_port=_metrics_port(options.metrics_port),
        status=StatusMode(options.status),
        notices=(*choice.notices, *ignored),
    )


def _command(options: Options, environ: Mapping[str, str], python: str) -> CommandConfig:
    entrypoint = Entrypoint.SCRIPT
    if not options.run_path:
        if options.no_python and options.module:
            raise UserError("--no-python and --module exclude each other: give one of them")
        python = environ.get("PYTHON_EXEC", python)
        if options.module:
            entrypoint = Entrypoint.MODULE
        elif options.no_python:
            entrypoint = Entrypoint.PROGRAM
    return CommandConfig(
        entrypoint=entrypoint,
        target=options.training_script,
        args=tuple(options.training_script_args),
        python=python,
    )


def _output(options: Options) -> OutputConfig:
    return OutputConfig(
        log_dir=options.log_dir,
        redirects=check_streams(options.redirects, what="--redirects"),
        tee=check_streams(options.tee, what="--tee"),
        local_ranks_filter=parse_local_ranks(options.local_ranks_filter),
        stdout_filters=tuple(options.duplicate_stdout_filters),
        stderr_filters=tuple(options.duplicate_stderr_filters),
    )


def _shutdown_timeout_s(options: Options, environ: Mapping[str, str]) -> float:
    if options.shutdown_timeout is not None:
        return parse_seconds(str(options.shutdown_timeout), what="--shutdown-timeout")
    variable = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
    return parse_seconds(environ.get(variable, SHUTDOWN_TIMEOUT_S), what=variable)


def _metrics_port(port: int | None) -> int | None:
    if port is not None and not 0 <= port < PORT_MAX:  # the controller takes the next one
        raise UserError(f"--metrics-port={port}: take 1 to {PORT_MAX - 1}, or 0 for any free one")
    return port
