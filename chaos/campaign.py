"""One campaign: start a cluster and a job, hurt them by the schedule, let them heal and end, judge the history.

Invariants:
1. Whatever happens, what was started is ended and what was paused goes on.
2. Every phase is bounded; one that takes too long is a failed check, with the history kept up to there.
"""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

from elastic_run.chaos.checkers.judge import judge
from elastic_run.chaos.checkers.verdict import Verdict
from elastic_run.chaos.etcd_members import EtcdMembers
from elastic_run.chaos.faults import processes as process_faults
from elastic_run.chaos.faults import store as store_faults
from elastic_run.chaos.history import (
    CampaignBegan,
    FaultBegan,
    FaultEnded,
    Healed,
    HealingBegan,
    History,
    LeftBehind,
    NodeStarted,
)
from elastic_run.chaos.leftovers import find_leftovers
from elastic_run.chaos.nodes import Nodes
from elastic_run.chaos.observer import Observer
from elastic_run.chaos.scenario import ETCD_MEMBERS, SAVE_EVERY, STEPS_TO_THE_END, Scenario
from elastic_run.chaos.schedule import TimedFault, Victim, make_schedule
from elastic_run.runtime.edge import store_access
from elastic_run.runtime.edge.store import Store
from elastic_run.runtime.protocol.config import StoreConfig
from elastic_run.runtime.protocol.ids import JobId
from elastic_run.runtime.protocol.records import namespace

START_S = 120.0
HEAL_S = 120.0
END_S = 120.0
POLL_S = 0.1
_OF_STORE = (Victim.ETCD_MEMBER, Victim.ETCD_LEADER, Victim.ETCD_ALL)


async def run_campaign(
    scenario: Scenario, directory: Path, say: Callable[[str], None]
) -> tuple[History, list[Verdict]]:
    """Run it in an empty private directory; return the history and the verdicts. Raises UserError without an etcd."""
    history = History(directory / "history.jsonl")
    history.add(CampaignBegan(at_s=time.monotonic(), seed=scenario.seed, nodes=scenario.nodes, save_every=SAVE_EVERY))
    (directory / "etcd").mkdir(mode=0o700)
    members = EtcdMembers(directory / "etcd", ETCD_MEMBERS)
    store = store_access.open_store(StoreConfig(endpoints=members.endpoints), namespace(JobId(scenario.job_id)))
    nodes = Nodes(scenario, directory, members.endpoints, history)
    try:
        await members.start()
        await _Campaign(scenario, history, members, nodes, store, say).run()
        for what in await find_leftovers(store, mark=nodes.mark, roots=(nodes.run_root, nodes.temporary)):
            history.add(LeftBehind(at_s=time.monotonic(), what=what))
    finally:
        await nodes.stop()
        await store.close()
        await members.stop()
        history.close()
    return history, judge(history.entries)


class _Campaign:
    """The phases. A phase that does not come to its end leaves a history that fails the checks."""

    def __init__(
        self,
        scenario: Scenario,
        history: History,
        members: EtcdMembers,
        nodes: Nodes,
        store: Store,
        say: Callable[[str], None],
    ) -> None:
        self._scenario, self._history, self._members = scenario, history, members
        self._nodes, self._store, self._say = nodes, store, say
        self._observer = Observer(store, nodes.work / "steps.jsonl", history)

    async def run(self) -> None:
        running = asyncio.create_task(self._nodes.run(), name="nodes")
        watching = [
            asyncio.create_task(self._observer.watch_keys(), name="keys"),
            asyncio.create_task(self._observer.watch_steps(), name="steps"),
        ]
        phases = asyncio.create_task(self._phases(running), name="phases")
        try:
            await asyncio.wait([phases, *watching], return_when=asyncio.FIRST_COMPLETED)
            for task in (phases, *watching):
                if task.done():
                    task.result()
        finally:
            tasks = [phases, *watching, running]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._observer.read_steps()

    async def _phases(self, running: asyncio.Task[None]) -> None:
        self._say(f"{self._scenario.nodes} nodes start")
        if not await self._until(self._whole, START_S, "the job did not start"):
            return
        self._say(f"faults come for {self._scenario.seconds:g} s")
        await self._faults()
        self._history.add(HealingBegan(at_s=time.monotonic()))
        self._say("no more faults; everything has to come back")
        if not await self._until(self._whole, HEAL_S, "the nodes did not come together again"):
            return
        self._history.add(Healed(at_s=time.monotonic()))
        self._nodes.end_after((self._observer.newest.step if self._observer.newest else 0) + STEPS_TO_THE_END)
        self._say("the job is let come to its end")
        await self._until(running.done, END_S, "the job did not end")
        if running.done():
            running.result()

    def _whole(self) -> bool:
        """Every node is up, and a step was done with all of them since the newest of them started."""
        starts = [entry.at_s for entry in self._history.entries if isinstance(entry, NodeStarted)]
        newest = self._observer.newest
        everyone = len(self._nodes.launchers()) == self._scenario.nodes
        fresh = newest is not None and newest.at_s > max(starts, default=0.0)
        return everyone and fresh and newest is not None and newest.world_size == self._scenario.nodes

    async def _until(self, holds: Callable[[], bool], seconds: float, otherwise: str) -> bool:
        try:
            async with asyncio.timeout(seconds):
                while not holds():  # noqa: ASYNC110 - other programs' state, bounded
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            self._say(f"{otherwise} within {seconds:g} s")
            return False
        return True

    async def _faults(self) -> None:
        began_s = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for fault in make_schedule(self._scenario.seed, seconds=self._scenario.seconds):
                await asyncio.sleep(max(0.0, began_s + fault.at_s - time.monotonic()))
                group.create_task(self._fault(fault), name=f"fault-{fault.number}")
            await asyncio.sleep(max(0.0, began_s + self._scenario.seconds - time.monotonic()))

    async def _fault(self, fault: TimedFault) -> None:
        if fault.victim in _OF_STORE:
            await self._store_fault(fault)
            return
        leading = self._observer.leader.rpartition("-")[0] or None
        hit = process_faults.strike(self._nodes, fault, leading)
        self._began(fault, hit.what if hit else "", hit.node if hit else "")
        if hit is not None:
            await self._last(fault, lambda: process_faults.let_go(hit))

    async def _store_fault(self, fault: TimedFault) -> None:
        hit = await store_faults.strike(self._members, fault, self._store)
        self._began(fault, ", ".join(f"etcd member m{index}" for index in hit), "")
        if hit:
            await self._last(fault, lambda: store_faults.let_go(self._members, fault, hit))

    def _began(self, fault: TimedFault, what: str, node: str) -> None:
        self._say(f"{fault.action} {fault.victim}: {what or 'nobody is there to hit'}")
        self._history.add(
            FaultBegan(
                at_s=time.monotonic(),
                number=fault.number,
                victim=str(fault.victim),
                action=str(fault.action),
                what=what,
                node=node,
            )
        )

    async def _last(self, fault: TimedFault, let_go: Callable[[], None]) -> None:
        try:
            await asyncio.sleep(fault.lasts_s)
        finally:
            let_go()
            self._history.add(FaultEnded(at_s=time.monotonic(), number=fault.number))
