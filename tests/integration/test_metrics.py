"""/metrics and /healthz of the controller and the agent of a running job, as Prometheus would fetch them."""

import re
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from launching import SCRIPTS, Bench, free_port_pair, wait_until
from prometheus_client.parser import text_string_to_metric_families

from elastic_run.runtime.edge.metrics import METRICS

FETCH_S = 5.0
NODE_CONDITIONS = {"alive", "suspect", "dead"}


def fetch(port: int, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=FETCH_S) as response:
        text: str = response.read().decode()
        return text


def values(page: str) -> dict[str, float]:
    """Value of each metric; of several samples, the sum."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(page):
        found[family.name] = sum(sample.value for sample in family.samples)
    return found


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with Bench() as made:
        yield made


@pytest.fixture(scope="module")
def ports(bench: Bench) -> Iterator[tuple[int, int]]:
    """Of agent and controller of a job whose two workers run."""
    first = free_port_pair()
    run = bench.run(f"--metrics-port={first}", "--node-name=here", SCRIPTS / "wait_for_go.py", bench.files)
    bench.await_files("rank-0.0", "rank-1.0")
    wait_until(lambda: values(fetch(first + 1, "/metrics")).get("elastic_run_world_size") == 2, "the view of two")
    yield first, first + 1
    (bench.files / "go").touch()
    assert run.end() == 0, run.err
    bench.assert_nothing_left()


def test_every_declared_metric_is_served_and_nothing_else(ports: tuple[int, int]) -> None:
    agent, controller = (set(values(fetch(port, "/metrics"))) for port in ports)
    assert agent | controller == set(METRICS)
    assert agent.isdisjoint(controller)


def test_values_are_those_of_the_running_job(ports: tuple[int, int]) -> None:
    agent, controller = (values(fetch(port, "/metrics")) for port in ports)
    assert controller["elastic_run_leader"] == controller["elastic_run_agent_streams"] == 1
    assert controller["elastic_run_nodes"] == controller["elastic_run_view_number"] == 1
    assert agent["elastic_run_agent_connected"] == agent["elastic_run_agent_lease_held"] == 1
    assert agent["elastic_run_agent_view_number"] == 1
    assert agent["elastic_run_agent_workers_alive"] == 2


def test_labels_are_the_declared_ones_with_bounded_values(ports: tuple[int, int], bench: Bench) -> None:
    job = bench.ask("status")["job_id"]
    for port in ports:
        for family in text_string_to_metric_families(fetch(port, "/metrics")):
            for sample in family.samples:
                assert set(sample.labels) == set(METRICS[family.name][1])
                assert sample.labels["job"] == job
                assert sample.labels.get("node", "here") == "here"
                assert sample.labels.get("condition", "alive") in NODE_CONDITIONS


def test_names_end_in_a_unit_or_say_what_is_counted() -> None:
    assert all(re.fullmatch(r"elastic_run_[a-z_]+", name) for name in METRICS)
    assert all(text and not text.endswith(".") for text, _ in METRICS.values())


def test_both_call_themselves_healthy_and_know_no_other_page(ports: tuple[int, int]) -> None:
    assert [fetch(port, "/healthz") for port in ports] == ["running\n", "leads\n"]
    for port in ports:
        with pytest.raises(urllib.error.HTTPError) as caught:
            fetch(port, "/other")
        assert caught.value.code == 404
        caught.value.close()


def test_free_ports_are_told_on_stderr_and_by_elastic_ctl() -> None:
    with Bench() as alone:
        run = alone.run("--metrics-port=0", "--node-name=here", SCRIPTS / "wait_for_go.py", alone.files)
        alone.await_files("rank-0.0", "rank-1.0")
        agent = alone.ask("nodes")["nodes"][0]["metrics_port"]
        controller = alone.ask("status")["leader_metrics_port"]
        assert values(fetch(agent, "/metrics"))["elastic_run_agent_view_number"] == 1
        assert values(fetch(controller, "/metrics"))["elastic_run_leader"] == 1
        assert f"metrics of this node's agent: http://127.0.0.1:{agent}/metrics\n" in run.err
        assert f"metrics of this controller: http://127.0.0.1:{controller}/metrics\n" in run.err
        (alone.files / "go").touch()
        assert run.end() == 0, run.err
        alone.assert_nothing_left()


def test_given_ports_are_shown_by_elastic_ctl(ports: tuple[int, int], bench: Bench) -> None:
    shown = (bench.ask("nodes")["nodes"][0]["metrics_port"], bench.ask("status")["leader_metrics_port"])
    assert shown == ports


def test_promtool_finds_no_fault(ports: tuple[int, int]) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed")
    for port in ports:
        page = fetch(port, "/metrics")
        check = subprocess.run(
            [promtool, "check", "metrics"], input=page, capture_output=True, text=True, check=False, timeout=60
        )
        assert (check.returncode, check.stderr) == (0, ""), check.stderr
