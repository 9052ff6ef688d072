"""Loops that wait for events end when cancelled, also in the very moment in which an event comes.

A leader that lost its lease while its process was stopped finds both waiting for it when it goes on.
"""

import asyncio
from typing import Any, cast

from fake_store import FakeStore

from elastic_run.agent.session import ControllerSession
from elastic_run.controller.core import ControllerCore
from elastic_run.controller.driver import ControllerDriver
from elastic_run.controller.events import ControllerEvent, Ticked
from elastic_run.runtime.protocol.config import ControllerConfig, JobConfig, StoreConfig
from elastic_run.runtime.protocol.ids import JobId
from elastic_run.runtime.protocol.messages import Hello

TURNS_MAX = 50
"""Turns of the event loop in which any of these tasks would end."""
MOMENTS = range(10)
"""Turns between event and cancellation."""
CONFIG = ControllerConfig(
    job=JobConfig(job_id=JobId("j"), nodes_min=1, nodes_max=1, max_restarts=0),
    store=StoreConfig(endpoints=("127.0.0.1:1",)),
    candidate="c",
    host="127.0.0.1",
    port=0,
    run_dir="",
)


class CoreWithoutAnswers:
    settled = True

    def handle(self, event: ControllerEvent) -> list[Any]:
        return []


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_a_term_ends_although_an_event_comes_with_the_cancellation() -> None:
    for moment in MOMENTS:
        driver = ControllerDriver(CONFIG, FakeStore())
        loop = asyncio.create_task(driver._consume(cast(ControllerCore, CoreWithoutAnswers())))
        await turns(TURNS_MAX)
        driver._post(Ticked(now=0.0, wall=0.0, cause="e1"))
        await turns(moment)
        loop.cancel()
        await turns(TURNS_MAX)
        assert loop.cancelled(), moment


async def test_a_session_ends_although_a_new_leader_comes_with_the_cancellation() -> None:
    def never(_: object) -> Hello:
        raise AssertionError("there is nobody to greet")

    async def no_token() -> None:
        return None

    for moment in MOMENTS:
        session = ControllerSession(read_token=no_token, hello=never, on_message=never, on_lost=never)
        session.leader_is("127.0.0.1:1")
        loop = asyncio.create_task(session.run())
        await turns(TURNS_MAX)
        session.leader_is("127.0.0.1:2")
        await turns(moment)
        loop.cancel()
        await turns(TURNS_MAX)
        assert loop.cancelled(), moment
