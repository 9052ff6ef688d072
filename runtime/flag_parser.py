"""The flags of `elastic-run`, declared: torchrun's, in both spellings, and a group of its own.

Defaults < PET_<FLAG> in the environment < command line. Nothing here decides what a flag does.

Invariants (tests/unit/test_flags.py):
1. Every flag of torch's own parser is declared, in both spellings, with the same default and the same PET_ variable.
2. A command line that does not parse is a UserError, not an exit.
Not here: what the values mean (flags.py, flag_values.py).
"""

import argparse
from collections.abc import Mapping
from typing import Any, NoReturn

from elastic_run.runtime.affinity import BindingMode
from elastic_run.runtime.launch_config import StatusMode
from elastic_run.runtime.protocol.errors import UserError

SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT"
DESCRIPTION = "Runs a PyTorch training script on several workers and keeps it running when workers or nodes fail."
EPILOG = """\
Every flag may be spelled with - or _ and takes its default from PET_<FLAG> in the environment, as with torchrun.

exit codes:
  0      the script ended well on every worker
  1      the job failed; the first failure is named on stderr
  2      a flag or this machine is not fit for it; one line on stderr says what to do, nothing was started
  128+N  the job was ended by signal N (130: Ctrl-C; a second Ctrl-C kills at once)
"""
IGNORED = {
    "monitor_interval": "workers are watched by events, not by polling",
    "start_method": "workers are always started as new programs",
    "event_log_handler": "events are kept in the store; read them with elastic-ctl events",
    "logs_specs": "plug-ins of torchrun are not loaded; --log-dir, --redirects and --tee say where output goes",
}
"""Flags that are taken and have no effect, and why."""


class Options(argparse.Namespace):
    """Parsed flags. `given` holds the names of those set on the command line or by a PET_ variable."""

    given: frozenset[str]


def parse_options(argv: list[str], environ: Mapping[str, str]) -> Options:
    """Return the parsed flags. Raises UserError; --help prints and raises SystemExit."""
    options = Options(seen=set())
    make_parser(environ).parse_args(argv, namespace=options)
    from_environ = {name for name in vars(options) if _variable(name) in environ}
    options.given = frozenset(options.seen | from_environ)
    return options


def make_parser(environ: Mapping[str, str]) -> argparse.ArgumentParser:
    """Return the parser, its defaults taken from `environ` where a PET_ variable is set."""
    parser = _Parser(
        prog="elastic-run",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = _Adder(parser, environ)
    _add_size(add)
    _add_rendezvous(add)
    _add_workers(add)
    _add_output(add)
    _add_old_names(add)
    _add_elasticity(_Adder(parser.add_argument_group("Elasticity", "What torchrun does not have."), environ))
    parser.add_argument("training_script", help="script, module (-m) or program (--no-python) that every worker runs")
    parser.add_argument("training_script_args", nargs=argparse.REMAINDER, help="its own arguments")
    return parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (elastic-run --help lists what is possible)")


class _Store(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        namespace.seen.add(self.dest)
        setattr(namespace, self.dest, values)


class _Switch(_Store):
    def __init__(self, **options: Any) -> None:
        super().__init__(nargs=0, **options)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        super().__call__(parser, namespace, True, option_string)


class _Adder:
    """Declares flags in both spellings, with the default that the environment gives."""

    def __init__(self, target: Any, environ: Mapping[str, str]) -> None:
        self._target = target
        self._environ = environ

    def value(self, *names: str, default: Any, **options: Any) -> None:
        """A flag with a value; its last name is the long one."""
        variable = _variable(names[-1])
        default = self._environ.get(variable, default)
        if "choices" not in options:
            options.setdefault("metavar", "X")
        elif variable in self._environ and default not in options["choices"]:  # argparse does not check defaults
            raise UserError(f"{variable}={default} in the environment: write one of {', '.join(options['choices'])}")
        self._target.add_argument(*_spellings(names), action=_Store, default=default, **options)

    def switch(self, *names: str, **options: Any) -> None:
        """A flag without a value; in the environment, any number but 0 sets it."""
        variable = _variable(names[-1])
        text = self._environ.get(variable, "0").strip()
        if not text.isdecimal():
            raise UserError(f"{variable}={text} in the environment: write 0 or 1")
        self._target.add_argument(*_spellings(names), action=_Switch, default=int(text) != 0, **options)


def _spellings(names: tuple[str, ...]) -> list[str]:
    return list(dict.fromkeys([*names, "--" + _dest(names[-1])]))


def _dest(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _variable(flag: str) -> str:
    return "PET_" + _dest(flag).upper()


def _add_size(add: _Adder) -> None:
    add.value("--nnodes", default="1:1", help="nodes of the job: N, or MIN:MAX for any number between")
    add.value("--nproc-per-node", default="1", help="workers on this node: a number, auto, cpu, gpu or xpu (one each)")


def _add_rendezvous(add: _Adder) -> None:
    add.value(
        "--rdzv-backend",
        default="static",
        help="etcd: a cluster at the endpoint; c10d: the node at the endpoint's host starts the store for all; "
        "static: node rank 0 starts it",
    )
    add.value("--rdzv-endpoint", default="", help="where the nodes meet: etcd://HOST:PORT[,HOST:PORT...], or HOST:PORT")
    add.value("--rdzv-id", default="none", help="name of the job; nodes that give the same one form one job")
    add.value(
        "--rdzv-conf",
        default="",
        help="KEY=VALUE,...: join_timeout, last_call_timeout, is_host, and ca, cert, key, user, password_file of etcd",
    )
    add.switch("--standalone", help="all on this machine, with a store of its own (also when no rendezvous is given)")


def _add_workers(add: _Adder) -> None:
    add.value("--max-restarts", default=0, type=int, help="worker failures the job survives before it has failed")
    add.value("--monitor-interval", default=0.1, type=float, help="ignored: " + IGNORED["monitor_interval"])
    add.value(
        "--start-method",
        default="spawn",
        choices=["spawn", "fork", "forkserver"],
        help="ignored: " + IGNORED["start_method"],
    )
    add.value("--event-log-handler", default="null", help="ignored: " + IGNORED["event_log_handler"])
    add.value("--role", default="default", help="name of the workers' role, in their environment and output prefix")
    add.switch("-m", "--module", help="the script is the name of a module, run as python -m does")
    add.switch("--no-python", help="the script is a program of any kind, run directly")
    add.switch("--run-path", help="the script is a path; goes before --no-python")
    add.value(
        "--numa-binding",
        default=None,
        choices=[mode.value for mode in BindingMode],
        help="CPUs each worker runs on: those of the NUMA node or socket of its local rank's GPU, an exclusive share "
        "of that node's cores, or those behind one of its caches; without GPUs, workers take the nodes in turn",
    )
    add.value("--signals-to-handle", default=SIGNALS, help=f"signals that end the job in order (default: {SIGNALS})")
    add.value(
        "--shutdown-timeout",
        default=None,
        type=int,
        help="seconds between SIGTERM and SIGKILL at the end (default: TORCH_ELASTIC_SHUTDOWN_TIMEOUT, or 30)",
    )
    add.switch("--virtual-local-rank", help="workers see LOCAL_RANK 0 and only their own GPU")


def _add_output(add: _Adder) -> None:
    add.value("--log-dir", default=None, help="directory for output files; each run makes a directory of its own there")
    add.value(
        "-r", "--redirects", default="0", help="streams into files: 0 none, 1 stdout, 2 stderr, 3 both, or RANK:N,..."
    )
    add.value("-t", "--tee", default="0", help="streams into files and onto the console, same values")
    add.value("--local-ranks-filter", default="", help="only these local ranks show on the console, such as 0,1")
    for stream in ("stdout", "stderr"):
        add.value(
            f"--duplicate-{stream}-filters",
            default=[],
            type=_comma_separated,
            help=f"lines of {stream} that hold one of these words also go to a file (WORD,WORD...; ,, is a comma)",
        )
    add.value("--logs-specs", default=None, help="ignored: " + IGNORED["logs_specs"])


def _add_old_names(add: _Adder) -> None:
    add.value("--node-rank", default=0, type=int, help="rank of this node, for the static backend")
    add.value("--master-addr", default="127.0.0.1", help="address of node rank 0, for the static backend")
    add.value("--master-port", default=None, type=int, help="port of node rank 0, for the static backend (29500)")
    add.value("--local-addr", default=None, help="address at which other nodes reach this one (default: looked up)")


def _add_elasticity(add: _Adder) -> None:
    add.value("--node-name", default=None, help="name of this node in status, logs and metrics (default: the host's)")
    add.value("--last-call", default=None, help="seconds to wait for more nodes once MIN are there (default 30)")
    add.switch("--no-controller", help="this node offers no controller; elastic-controller runs elsewhere")
    add.value("--status", default="auto", choices=[mode.value for mode in StatusMode], help="the live status line")
    add.value(
        "--metrics-port", default=None, type=int, help="loopback port of the agent's /metrics; controller: next one"
    )
    add.value("--run-dir", default=None, help="directory in which to make the run directory, and to keep it afterwards")
    add.value("--store-ca", default=None, help="certificate authority of the etcd cluster; switches TLS on")
    add.value("--store-cert", default=None, help="client certificate for the etcd cluster")
    add.value("--store-key", default=None, help="key of the client certificate")
    add.value("--store-user", default=None, help="user of the etcd cluster")
    add.value("--store-password-file", default=None, help="file with that user's password on its first line")


def _comma_separated(text: str) -> list[str]:
    mark = "\0"
    return [item.replace(mark, ",") for item in text.replace(",,", mark).split(",")]
