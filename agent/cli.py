"""`elastic-agent --config FILE`: the agent of one node. Started by elastic-run, which writes the file.

Exit codes: 0 the job succeeded, 1 it failed, 2 refused or misconfigured, 128+N ended by signal N.
"""

import argparse
import asyncio
import sys
from pathlib import Path

from elastic_run.agent.driver import AgentDriver
from elastic_run.agent.metrics import serve_metrics
from elastic_run.runtime.edge import store_access
from elastic_run.runtime.edge.files import read_bounded
from elastic_run.runtime.edge.log import set_up_logging
from elastic_run.runtime.edge.rundir import remove_abandoned
from elastic_run.runtime.protocol import codec
from elastic_run.runtime.protocol.config import AgentConfig
from elastic_run.runtime.protocol.errors import CodecError, UserError
from elastic_run.runtime.protocol.records import namespace

EXIT_USAGE = 2
CONFIG_BYTES_MAX = 4 * 1024 * 1024  # a command line can be long


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="elastic-agent", description="The agent of one node; elastic-run starts it. It runs the node's workers."
    )
    parser.add_argument("--config", required=True, help="an AgentConfig document, as elastic-run writes it")
    path = Path(parser.parse_args().config)
    try:
        config = codec.decode(AgentConfig, read_bounded(path, CONFIG_BYTES_MAX), where=str(path))
        sys.exit(asyncio.run(_run(config)))
    except (UserError, CodecError) as error:
        print(f"elastic-agent: {error}", file=sys.stderr)
        sys.exit(EXIT_USAGE)


async def _run(config: AgentConfig) -> int:
    set_up_logging("agent", job=config.job.job_id, node=config.node)
    store = store_access.open_store(config.store, namespace(config.job.job_id))
    driver = AgentDriver(config, store)
    metrics = serve_metrics(driver, config)
    try:
        return await driver.run()
    finally:
        if metrics is not None:
            metrics.close()
        await store.close()
        if driver.orphaned:
            remove_abandoned(Path(config.run_dir))


if __name__ == "__main__":
    main()
