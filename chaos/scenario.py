"""What a campaign runs: sizes, names, bounds."""

from dataclasses import dataclass
from pathlib import Path

ETCD_MEMBERS = 3
NODES_MAX = 8
SECONDS_MAX = 24 * 3600.0
LAST_CALL_S = 2
SAVE_EVERY = 5
"""Steps between two snapshots of the workload (scripts/train_steps.py is told)."""
PACE_S = 0.05
"""The workload's pause between steps: processors are left for recovery, as on a cluster."""
STEPS_TO_THE_END = 10
MAX_RESTARTS = 1_000_000
"""Workers are ended on purpose, more often than any real job would allow."""
WORKLOAD = Path(__file__).parent / "scripts" / "train_steps.py"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One campaign. The same scenario gives the same schedule of faults."""

    seed: int
    seconds: float
    """Length of the phase with faults; starting and healing come on top."""
    nodes: int

    @property
    def job_id(self) -> str:
        return f"chaos-{self.seed}"

    @property
    def command(self) -> str:
        """The command line that runs it again."""
        return f"python -m elastic_run.chaos --seconds {self.seconds:g} --seed {self.seed} --nodes {self.nodes}"
