"""Every metric of the project, declared once, and the loopback endpoint that serves them with /healthz.

Values are taken from the owner's state at the moment of a scrape, inside its event loop: nothing is counted twice,
and an idle process does no work for metrics. Labels are bounded: a job has one id, an agent's metrics name one node.
"""

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from elastic_run.runtime.protocol.errors import UserError

SCRAPE_DEADLINE_S = 2.0
ANY_PORT = 0
HOST = "127.0.0.1"

METRICS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "elastic_run_leader": ("1 while this controller leads the job", ("job",)),
    "elastic_run_fencing_token": ("Fencing token of the leader: grows with every change of leader", ("job",)),
    "elastic_run_nodes": ("Nodes known to the leader, by condition", ("job", "condition")),
    "elastic_run_view_number": ("Number of the newest installed view", ("job",)),
    "elastic_run_world_size": ("Workers of the newest installed view", ("job",)),
    "elastic_run_restarts_used": ("Worker failures charged to the restart budget", ("job",)),
    "elastic_run_step": ("Largest optimizer step finished by a worker", ("job",)),
    "elastic_run_step_rate_hertz": ("Optimizer steps per second", ("job",)),
    "elastic_run_agent_streams": ("Open streams from agents to this controller", ("job",)),
    "elastic_run_agent_connected": ("1 while the agent has a stream to the leader", ("job", "node")),
    "elastic_run_agent_view_number": ("View this node's workers belong to", ("job", "node")),
    "elastic_run_agent_workers_alive": ("Workers of this node that run", ("job", "node")),
    "elastic_run_agent_step": ("Largest optimizer step finished by a worker of this node", ("job", "node")),
    "elastic_run_agent_lease_held": ("1 while the node's lease is certainly held", ("job", "node")),
}

T = TypeVar("T")

Sample = tuple[str, tuple[str, ...], float]
"""Metric name, label values in declared order, value."""


class _AtScrape(Collector):
    def __init__(self, samples: Callable[[], list[Sample]]) -> None:
        self._samples = samples

    def collect(self) -> Iterator[Metric]:
        families: dict[str, GaugeMetricFamily] = {}
        for name, labels, value in self._samples():
            if name not in families:
                text, label_names = METRICS[name]
                families[name] = GaugeMetricFamily(name, text, labels=label_names)
            families[name].add_metric(labels, value)
        yield from families.values()

    def describe(self) -> Iterator[Metric]:
        yield from ()


class _Quiet(WSGIRequestHandler):
    timeout = 10

    def log_message(self, format: str, *args: object) -> None:
        pass


class MetricsServer:
    """Serves until `close`. `samples` and `healthy` are called in the event loop that made this object."""

    def __init__(self, port: int, samples: Callable[[], list[Sample]], healthy: Callable[[], tuple[bool, str]]) -> None:
        """Raises UserError when the port is taken."""
        self._loop = asyncio.get_running_loop()
        registry = CollectorRegistry()
        registry.register(_AtScrape(lambda: self._in_loop(samples)))
        metrics = make_wsgi_app(registry)

        def app(environ: dict[str, object], start_response: Callable[..., object]) -> list[bytes]:
            path = environ.get("PATH_INFO")
            if path == "/metrics":
                return metrics(environ, start_response)  # type: ignore[no-any-return]
            if path == "/healthz":
                good, text = self._in_loop(healthy)
                start_response("200 OK" if good else "503 Service Unavailable", [("Content-Type", "text/plain")])
                return [f"{text}\n".encode()]
            start_response("404 Not Found", [("Content-Type", "text/plain")])
            return [b"/metrics and /healthz are here\n"]

        try:
            self._server = make_server(HOST, port, app, server_class=WSGIServer, handler_class=_Quiet)
        except OSError as error:
            raise UserError(f"metrics port {port} can not be had ({error.strerror}): choose another") from None
        self.port: int = self._server.server_port
        self.url = f"http://{HOST}:{self.port}/metrics"
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(SCRAPE_DEADLINE_S)

    def _in_loop(self, ask: Callable[[], T]) -> T:
        async def answer() -> T:
            return ask()

        return asyncio.run_coroutine_threadsafe(answer(), self._loop).result(SCRAPE_DEADLINE_S)
