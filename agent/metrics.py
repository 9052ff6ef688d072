"""What the agent tells Prometheus, and where it says so: in the node's record, hence in elastic-ctl."""

import dataclasses

from elastic_run.agent.driver import AgentDriver
from elastic_run.runtime.edge.metrics import ANY_PORT, MetricsServer, Sample
from elastic_run.runtime.protocol.config import AgentConfig


def serve_metrics(driver: AgentDriver, config: AgentConfig) -> MetricsServer | None:
    """Serve /metrics and /healthz on loopback until closed; None when no port was asked for. Before driver.run()."""
    if config.metrics_port is None:
        return None
    labels = (str(config.job.job_id), str(config.node))

    def samples() -> list[Sample]:
        core = driver.core
        return [
            ("elastic_run_agent_connected", labels, float(core.connected)),
            ("elastic_run_agent_view_number", labels, float(core.view)),
            ("elastic_run_agent_workers_alive", labels, float(core.alive)),
            ("elastic_run_agent_step", labels, float(core.state.step_max)),
            ("elastic_run_agent_lease_held", labels, float(driver.presence.held)),
        ]

    server = MetricsServer(config.metrics_port, samples, lambda: (True, str(driver.core.phase)))
    driver.presence.record = dataclasses.replace(driver.presence.record, metrics_port=server.port)
    if config.metrics_port == ANY_PORT:  # else whoever asked for it knows it
        driver.say(f"metrics of this node's agent: {server.url}")
    return server
