"""Real controller and agent cores joined by streams that keep order and lose what is in flight when they break.

No clocks, no chance: a test chooses every step. Workers are a state per node. The controller's side is a
ControllerHarness, so durability and invariants are checked all along.
"""

from collections import deque
from collections.abc import Callable

from builders import AgentHarness, ControllerHarness, agent_config, failure

from elastic_run.agent import actions
from elastic_run.runtime.protocol import codec
from elastic_run.runtime.protocol.messages import AgentMessage, AgentPhase
from elastic_run.runtime.protocol.records import CURRENT_KEY, CurrentView

Event = Callable[[AgentHarness], AgentHarness]


class Station:
    """One life of a node: its agent, and what is under way to and from it."""

    def __init__(self, world: "SmallWorld", node: str, life: str) -> None:
        self.world, self.node, self.life = world, node, life
        self.agent = AgentHarness(agent_config(node, nproc=1, job=world.leader.job))
        self.agent.now = world.leader.now
        #: answers to what the agent asked of its machine
        self.local: deque[Event] = deque()
        #: told, not yet heard by the controller
        self.up: deque[AgentMessage] = deque()
        #: how much of its mail it has read
        self.read = 0
        self.working = False
        self.exit_code: int | None = None

    @property
    def connected(self) -> bool:
        return self.node in self.world.leader.connections

    def act(self, event: Event) -> None:
        if self.exit_code is not None:
            return
        self.agent.now = self.world.leader.now
        event(self.agent)
        for action in self.agent.out:
            self._do(action)

    def _do(self, action: actions.Action) -> None:
        match action:
            case actions.Tell():
                if self.connected:
                    self.up.append(action.message)
            case actions.ReservePort():
                self.local.append(lambda agent: agent.port(4000))
            case actions.StopWorkers():
                starts = self.agent.core.starts
                self.working = False
                self.local.append(lambda agent: agent.stopped(starts))
            case actions.AskToPark():
                view = action.view
                self.local.append(lambda agent: agent.parked(view) if self.working else agent)
            case actions.StartWorkers():
                assert not self.working, "two generations of workers at once"
                self.working = True
            case actions.Exit():
                assert not self.working
                self.exit_code = action.code
                self.world.vanish(self)
            case _:
                pass


class SmallWorld:
    def __init__(self, nodes: str, max_restarts: int) -> None:
        self.leader = ControllerHarness(nodes, max_restarts, last_call_s=2.0, join_s=30.0)
        self.stations: dict[str, Station] = {}
        self.gone: list[Station] = []

    # Steps a test may choose

    def start(self, node: str) -> None:
        """The node's agent starts, or starts anew after it died."""
        if node not in self.stations:
            lives = sum(station.node == node for station in self.gone)
            self.stations[node] = Station(self, node, str(lives + 1))

    def connect(self, node: str) -> None:
        station = self.stations.get(node)
        if station is None or station.connected:
            return
        core = station.agent.core
        station.read = len(self.leader.mail.get(node, []))
        port = core.master_port if core.phase is AgentPhase.PREPARED else None
        self.leader.join(
            node,
            station.life,
            nproc=1,
            state=core.state,
            master_port=port,
            failures=core.aged_failures(self.leader.now),
        )
        self._notice_closed()

    def cut(self, node: str) -> None:
        station = self.stations.get(node)
        if station is not None and station.connected:
            self.leader.cut(node)
            self._lost(station)

    def kill(self, node: str) -> None:
        """The machine is gone, its lease stays until somebody lets it expire."""
        station = self.stations.pop(node, None)
        if station is not None:
            self.gone.append(station)
            if station.connected:
                self.leader.cut(node)

    def expire(self) -> None:
        """Leases of what is gone run out."""
        for station in self.gone:
            self.leader.unlease(station.node, station.life)
            self._notice_closed()

    def up(self, node: str) -> None:
        """The controller hears one word."""
        station = self.stations.get(node)
        if station is not None and station.up and station.connected:
            self.leader.say(node, station.up.popleft())
            self._notice_closed()

    def down(self, node: str) -> None:
        """The agent hears one word."""
        station = self.stations.get(node)
        if station is None or not station.connected:
            return
        mail = self.leader.mail.get(node, [])
        if station.read < len(mail):
            message = mail[station.read]
            station.read += 1
            station.act(lambda agent: agent.hear(message))

    def local(self, node: str) -> None:
        station = self.stations.get(node)
        if station is not None and station.local:
            station.act(station.local.popleft())

    def sync(self, node: str) -> None:
        """The store's word on the current view arrives."""
        station = self.stations.get(node)
        if station is not None and CURRENT_KEY in self.leader.stored:
            current = codec.decode(CurrentView, self.leader.stored[CURRENT_KEY], where="current")
            station.act(lambda agent: agent.current(current.number))

    def worker_ends(self, node: str, *, well: bool) -> None:
        station = self.stations.get(node)
        if station is None or not station.working:
            return
        station.working = False
        view = station.agent.core.current_view
        said = None if well else failure(0, node)
        station.act(lambda agent: agent.exited(0, said, view))

    def signal(self, node: str, number: int) -> None:
        if node in self.stations:
            self.stations[node].act(lambda agent: agent.signal(number))

    def tick(self, seconds: float) -> None:
        self.leader.tick(seconds)
        self._notice_closed()
        for station in tuple(self.stations.values()):
            station.act(lambda agent: agent.tick(0.0, step=5 if agent.core.busy else 0, rate_hz=1.0))

    def take_over(self) -> None:
        connected = [station for station in self.stations.values() if station.connected]
        for key in [key for key in self.leader.stored if key.startswith("nodes/")]:
            del self.leader.stored[key]
        self.leader.take_over()
        for station in connected:
            self._lost(station)

    # The calm after it

    def settle(self, rounds: int, until: Callable[["SmallWorld"], bool] = lambda _: False) -> None:
        """Let everything be heard and done, again and again; no fault happens any more."""
        for _ in range(rounds):
            if until(self):
                return
            self.expire()
            for node in tuple(self.stations):
                self.connect(node)
                self.sync(node)
            for _ in range(20):
                for node in tuple(self.stations):
                    self.local(node)
                    self.up(node)
                    self.down(node)
            self.tick(0.5)

    def vanish(self, station: Station) -> None:
        self.gone.append(station)
        if self.stations.get(station.node) is station:
            del self.stations[station.node]
        if station.connected:
            for message in station.up:  # what was told is flushed before the agent ends
                if station.connected:
                    self.leader.say(station.node, message)
            self.leader.cut(station.node)
        self.leader.unlease(station.node, station.life)

    def _lost(self, station: Station) -> None:
        station.up.clear()
        station.act(lambda agent: agent.lost())

    def _notice_closed(self) -> None:
        """Streams the controller closed end after what was queued."""
        closed = {number for number, _ in self.leader.closed}
        for station in tuple(self.stations.values()):
            if self.leader.connections.get(station.node) in closed:
                while station.connected and station.read < len(self.leader.mail.get(station.node, [])):
                    self.down(station.node)
                if station.connected:
                    self.leader.cut(station.node)
                    self._lost(station)
