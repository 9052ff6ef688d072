"""What the controller tells Prometheus, and when it calls itself healthy."""

import sys

from elastic_run.controller.driver import ControllerDriver
from elastic_run.controller.report import report
from elastic_run.runtime.edge.metrics import ANY_PORT, MetricsServer, Sample


def serve_metrics(driver: ControllerDriver, port: int | None) -> MetricsServer | None:
    """Serve /metrics and /healthz on loopback until closed; None when no port was asked for. Before driver.run()."""
    if port is None:
        return None
    server = MetricsServer(port, lambda: samples(driver), lambda: _healthy(driver))
    driver.metrics_port = server.port
    if port == ANY_PORT:  # else whoever asked for it knows it
        print(f"elastic-controller: metrics of this controller: {server.url}", file=sys.stderr, flush=True)
    return server


def samples(driver: ControllerDriver) -> list[Sample]:
    job = (str(driver.job_id),)
    core = driver.core
    result: list[Sample] = [
        ("elastic_run_leader", job, float(core is not None)),
        ("elastic_run_agent_streams", job, float(driver.server.open_streams)),
    ]
    if core is None:
        return result
    status = report(core)
    conditions: dict[str, int] = {"alive": 0, "suspect": 0}
    for node in status.nodes:
        conditions[node.condition] = conditions.get(node.condition, 0) + 1
    result += [("elastic_run_nodes", (*job, name), float(count)) for name, count in conditions.items()]
    result += [
        ("elastic_run_fencing_token", job, float(status.fencing_token)),
        ("elastic_run_view_number", job, float(status.view)),
        ("elastic_run_world_size", job, float(status.world_size)),
        ("elastic_run_restarts_used", job, float(status.restarts_used)),
        ("elastic_run_step", job, float(status.step)),
        ("elastic_run_step_rate_hertz", job, status.step_rate_hz),
    ]
    return result


def _healthy(driver: ControllerDriver) -> tuple[bool, str]:
    """A candidate that follows is as healthy as one that leads; one that lost the store for long is not."""
    return not driver.outage.away, "leads" if driver.core is not None else "follows"
