"""Trials on Ray, on this machine or on a cluster, through failures of everything but the study's folder.

A trial runs in a seat (`ray_seat.py`), a named actor that belongs to no driver: where a cluster outlives the driver,
the trials do too, and the next driver takes them up. Retries are the driver's, who counts attempts.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import ray
from ray import exceptions
from ray.util import list_named_actors
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, NodeLabelSchedulingStrategy, NotIn

from bo import journal
from bo.ports import Deliver, Lost, Message, Raised, Train, Underway
from bo.trial import Trial
from integrations.ray_cluster import LOCAL, connected, unusable
from integrations.ray_seat import SEAT, Room, Run, from_record, record_path, seat_on_record
from integrations.shipping import pack

if TYPE_CHECKING:
    from integrations.store import Store

OF_RAY = ("num_cpus", "num_gpus", "memory", "accelerator_type", "resources")
KINDS = (*OF_RAY, "env", "bundles", "strategy")
GRACE = 10.0  # seconds for killed actors to be gone
UNHEARD: Run = (-1, -1)  # what runs in a seat that does not answer: it may be any trial
CLAIM = "driver"  # the name of the actor that stands for the study's driver
YIELD = 10.0  # seconds for the claim of a driver that was just killed to vanish
YOUNG = 0.2  # seconds after which a trial is listened to; most trials that are shorter take one call
IDLE = 10.0  # seconds after which a seat without a trial gives back what it holds
QUEUED = 2.0  # seconds after which a trial whose seat is not up has an idle one make way: it may wait for that room
PAUSE = 0.5  # seconds until a seat that was out of reach is asked again
SLACK = 1.0  # seconds between two looks at the seats that count as awake
INLINE = 50_000  # bytes of a packed training function that travel with each seat; Ray fetches larger ones from a node
BUSY = 10  # times `silence` that a seat may be silent while its node sees its process at work

Resources = Mapping[str, Any] | Callable[[Trial], Mapping[str, Any]]
Call = Literal["place", "run", "listen", "look"]


class RayRunner:
    """An executor on Ray; several machines need a file system that all share for the study's folder, or a store.

    address: "auto" or "host:port" of a running cluster; None takes RAY_ADDRESS, or else starts a cluster on this
    machine that ends with the driver. A process that is connected to Ray already stays with that.
    workers: trials at a time; by default as many as the resources that are there allow. A cluster that grows when asked
    needs a number: what waits beyond its nodes is what it grows for.
    resources: what a trial takes by the names of Ray's options (`KINDS`), or a function of the trial that says so; by
    default one CPU, and where the cluster has GPUs one of those, or an equal share when there are more workers. `env`
    are environment variables. `bundles` makes a placement group, by `strategy` ("PACK"): the training function runs in
    the first bundle, and the tasks and actors of Ray that it starts in the others.
    isolate: whether each trial has a process of its own. By default those with GPUs do, whose memory is then free for
    the next; others follow one another in one process, hundreds a second where they are tiny.
    lease: seconds after which trials end whose driver was not heard of; they go on from their checkpoints. silence:
    seconds after which a trial that is not heard of is lost; ten times as long while its node sees its process at work,
    as one is that holds Python's lock (loads a large pickle) and so cannot answer. hang: seconds after which a training
    function that gave no sign (a report, a branch, a checkpoint) is taken as lost; None waits forever.
    """

    apart = True

    def __init__(
        self,
        address: str | None = None,
        workers: int | None = None,
        resources: Resources | None = None,
        isolate: bool | None = None,
        store: Store | None = None,
        *,
        lease: float = 600.0,
        silence: float = 30.0,
        hang: float | None = None,
    ) -> None:
        if workers is not None and (type(workers) is not int or workers < 1):
            raise ValueError(f"RayRunner needs a whole number of workers of at least 1, got {workers!r}.")
        for name, seconds in (("lease", lease), ("silence", silence), ("hang", hang)):
            if seconds is not None and not (isinstance(seconds, (int, float)) and 0 < seconds < math.inf):
                raise ValueError(f"RayRunner needs {name} in seconds above 0, got {seconds!r}.")
        if resources is not None and not callable(resources):
            _check(resources)
        self._address, self._workers, self._resources, self._isolate = address, workers, resources, isolate
        self._store = store
        self._lease, self._silence, self._hang = lease, silence, hang
        self._pulse = min(lease, silence, 3 * IDLE) / 3  # seconds that a call waits for news
        self._cluster = contextlib.ExitStack()
        self._own = False  # whether the cluster is of our own making
        self._seats: dict[str, _Seat] = {}
        self._calls: dict[Any, _Seat] = {}  # under way
        self._said: list[Message] = []  # on record, of seats that are gone
        self._lost_on: dict[int, set[str]] = {}  # trial -> nodes
        self._claim: Any = None
        self._packed: Any = None
        self._has: dict[str, float] = {}
        self._asked = -math.inf
        self._awake, self._looked = 0.0, time.monotonic()  # seconds in which silence would have been noticed

    # ------------------------------------------------------------------------------------------- as every executor

    def open(self, train: Train, folder: Path) -> None:
        packed = pack(train, self._store, folder)
        if not ray.is_initialized():
            self._connect()
        if self._resources is None:
            self._resources = _by_default(self._present().get("GPU", 0.0), self._workers or 1)
        self._typical = {"CPU": 1.0} if callable(self._resources) else _needs(self._resources)
        self._folder, self._space = folder, f"windtunnel-{journal.identity(folder)}"
        try:  # a cluster with another RAY_AUTH_MODE may fail no earlier than here
            if not self._own:
                self._claim = _claim(folder, self._space)
            # A node that Ray fetches from may be cut off, which costs ten seconds a try.
            self._packed = packed if len(packed) <= INLINE else ray.put(packed)
        except exceptions.RayError as error:
            raise unusable(self._address or os.environ.get("RAY_ADDRESS", "auto"), error) from error

    def attach(self, trials: Sequence[Trial]) -> Sequence[Trial]:
        running = {(trial.id, trial.attempt): trial for trial in trials}
        taken_up: dict[Run, Trial] = {}
        left = self._left(trials)
        unheard = any(run == UNHEARD for *_, run in left)
        for name, actor, room, run in left:
            if run in running and run not in taken_up:
                trial = taken_up[run] = running[run]
                needs = _needs(self._options(trial))
                seat = _Seat(name, "", needs, actor, room, fresh=True, trial=trial, heard=self._awake)
                self._seats[name] = seat
            else:
                _kill(room or actor)
        for run in running.keys() - taken_up.keys():
            trial = running[run]
            said = self._on_record(trial)
            if not _has_ended(said) and not self._own and (unheard or record_path(self._folder, *run).exists()):
                # Its process may be alive on a machine that is cut off: the next one is another attempt.
                said.append(Lost(*run, "an end that no driver saw", innocent=True))
            if _has_ended(said):
                taken_up[run] = trial
            self._said += said
        return tuple(taken_up.values())

    def capacity(self) -> int:
        busy = [seat for seat in self._seats.values() if seat.trial is not None]
        if self._workers is not None:
            return max(0, self._workers - len(busy))
        # Where trials differ the next one is taken to be like the last, so that at most one waits for room.
        free = self._free(busy)
        room = min((int(free.get(kind, 0.0) // amount) for kind, amount in self._typical.items() if amount), default=1)
        return max(room, 0 if busy else 1)  # an empty cluster may grow once something waits

    def submit(self, trial: Trial) -> None:
        options = self._options(trial)
        self._typical = needs = _needs(options)
        if self._own:  # elsewhere a node that fits may be started for it
            present = self._present()
            has = {kind: present.get(kind, 0.0) for kind in needs}
            if any(amount > has[kind] for kind, amount in needs.items()):
                raise ValueError(
                    f"Trial {trial.id} needs {needs}, and this machine has {has}; ask for less in `resources`, or use "
                    "a cluster."
                )
        avoid = self._lost_on.get(trial.id, set())
        kind = json.dumps(options, sort_keys=True, default=str)
        idle = [seat for seat in self._seats.values() if seat.trial is None]
        lasting = time.monotonic() - IDLE  # before which a seat may have ended itself
        fits = [seat for seat in idle if seat.kind == kind and seat.node not in avoid and seat.since >= lasting]
        if fits:
            seat = fits[-1]  # the others come nearer to their end
        else:
            self._make_room(idle, needs)
            seat = self._start(kind, options, needs, avoid)
        seat.trial, seat.since, seat.looked = trial, time.monotonic(), self._awake
        if seat.heard is not None:
            seat.heard = self._awake
        self._call(seat, "place" if seat.actor is None else "run")

    def wait(self, deliver: Deliver, timeout: float) -> None:
        until = time.monotonic() + timeout
        self._tick(0.0)
        while True:
            now = time.monotonic()
            self._listen(now)
            # The next moment to look: a young trial's, a seat's that was out of reach, or the end.
            pending = [
                max(s.since + YOUNG, s.again) for s in self._seats.values() if s.actor and not s.calling("listen")
            ]
            rest = max(0.0, min([until, now + SLACK, *pending]) - now)
            ready: list[Any] = []
            if self._said:
                rest = 0.0
            if self._calls:
                ready = ray.wait(list(self._calls), timeout=rest)[0]
            else:
                time.sleep(rest)
            self._tick(rest)
            if ready:
                ready = ray.wait(list(self._calls), num_returns=len(self._calls), timeout=0)[0]
            said, seen, dead = self._collect(ready)
            if said:
                deliver(said)
            self._settle(said, seen, dead)
            if said or time.monotonic() >= until:
                return

    def stop(self, trial: int) -> None:
        for seat in self._seats.values():
            if seat.trial is not None and seat.trial.id == trial:
                seat.stopping = True
                if seat.actor is not None:
                    seat.actor.stop.remote((trial, seat.trial.attempt))

    def close(self, leave: bool = False) -> None:
        if self._packed is not None and ray.is_initialized():
            if self._own or not leave:
                self._end_all()
            if self._claim is not None:
                _kill(self._claim)
        self._seats, self._calls, self._packed, self._claim, self._said = {}, {}, None, None, []
        self._own, self._asked = False, -math.inf
        self._cluster.close()

    def _end_all(self) -> None:
        """End every seat of the study; those that cannot be reached end by their lease."""
        for seat in self._seats.values():
            _kill(seat.room or seat.actor)
        gone = list(self._seats.values()) if self._own else []
        with contextlib.suppress(Exception):  # on the way out
            if not self._own:
                for _, actor in self._actors():
                    _kill(actor)
            # Ray would complain of calls left waiting; and who has closed may look for what is left.
            last = {seat.actor.listen.remote(0, 0.0): seat for seat in self._seats.values() if seat.actor is not None}
            calls = [*self._calls, *last]
            ended = [ref for ref in ray.wait(calls, num_returns=len(calls), timeout=GRACE)[0] if ref in last]
            for ref, answer in zip(ended, _answers(ended), strict=True):
                if isinstance(answer, exceptions.ActorDiedError):
                    gone.append(last[ref])
        for seat in gone:  # an end of ours is none that nobody saw
            if seat.trial is not None and not _has_ended(self._on_record(seat.trial)):
                record_path(self._folder, seat.trial.id, seat.trial.attempt).unlink(missing_ok=True)

    # ---------------------------------------------------------------------------------------------------- seats

    def _connect(self) -> None:
        address = self._address or os.environ.get("RAY_ADDRESS") or LOCAL
        cpus = 1 if callable(self._resources) or self._resources is None else _needs(self._resources)["CPU"]
        slots = None if self._workers is None else max(math.ceil(self._workers * cpus), os.cpu_count() or 1)
        self._cluster.enter_context(connected(address, slots))
        self._own = address == LOCAL

    def _options(self, trial: Trial) -> Mapping[str, Any]:
        options = self._resources(trial) if callable(self._resources) else self._resources
        assert options is not None
        return _check(options)

    def _start(self, kind: str, options: Mapping[str, Any], needs: dict[str, float], avoid: set[str]) -> _Seat:
        """A new seat; Ray starts its process where there is room, as soon as there is."""
        environment = dict(options.get("env", {}))
        cpus = options["bundles"][0].get("CPU", 0) if "bundles" in options else needs["CPU"]
        threads = max(1, math.floor(cpus))
        if threads > 1 and "OMP_NUM_THREADS" not in os.environ:  # one thread is what Ray sets by itself
            environment.setdefault("OMP_NUM_THREADS", str(threads))
        id = secrets.token_hex(4)
        name = f"seat-{id}"
        settings: dict[str, Any] = {"name": name, "namespace": self._space}
        settings |= {kind: options[kind] for kind in OF_RAY if kind in options}
        if environment:
            settings["runtime_env"] = {"env_vars": environment}
        seat = (self._packed, str(self._folder), self._lease, self._hang)
        actor = room = None
        if "bundles" in options:
            bundles = [dict(bundle) for bundle in options["bundles"]]
            settings |= _of_bundle(bundles[0])
            outer: Any = Room
            lasting = outer.options(name=f"room-{id}", namespace=self._space, lifetime="detached")
            room = lasting.remote(bundles, options.get("strategy", "PACK"), settings, *seat)
        else:
            settings.setdefault("num_cpus", 1)
            if avoid:
                elsewhere: Any = {"ray.io/node-id": NotIn(*avoid)}  # type: ignore[no-untyped-call]
                settings["scheduling_strategy"] = NodeLabelSchedulingStrategy(hard={}, soft=elsewhere)
            actor = SEAT.options(lifetime="detached", **settings).remote(*seat)
        fresh = room is not None or (bool(needs.get("GPU")) if self._isolate is None else self._isolate)
        self._seats[name] = made = _Seat(name, kind, needs, actor, room, fresh)
        return made

    def _present(self) -> dict[str, float]:
        """What the cluster has, free or not; asked at most once a second, for tiny trials ask all the time."""
        if time.monotonic() - self._asked > SLACK:
            self._has, self._asked = dict(ray.cluster_resources()), time.monotonic()  # type: ignore[no-untyped-call]
        return self._has

    def _free(self, seats: Iterable[_Seat]) -> dict[str, float]:
        """What the cluster has beside these seats."""
        free = dict(self._present())
        for seat in seats:
            for kind, amount in seat.needs.items():
                free[kind] = free.get(kind, 0.0) - amount
        return free

    def _make_room(self, idle: Iterable[_Seat], needs: dict[str, float]) -> None:
        """End idle seats, those first that are idle for longest, until there is room for one that needs this."""
        for seat in sorted(idle, key=lambda seat: seat.since):
            free = self._free(self._seats.values())
            if all(free.get(kind, 0.0) >= amount for kind, amount in needs.items()):
                return
            self._end(seat)

    def _end(self, seat: _Seat) -> None:
        """Let a seat go; what it may still say is not heard."""
        del self._seats[seat.name]
        for call in seat.calls:
            del self._calls[call]
        seat.calls.clear()
        _kill(seat.room or seat.actor)

    def _call(self, seat: _Seat, call: Call) -> None:
        if call == "place":
            ref = seat.room.seat.remote()
        elif call == "run":
            assert seat.trial is not None
            ref = seat.actor.run.remote(seat.trial, seat.seen)
        elif call == "look":
            ref = _ask(seat.node, seat.pid)
        else:  # the first is answered at once, to know that it is up
            ref = seat.actor.listen.remote(seat.seen, 0.0 if seat.heard is None else self._pulse)
        seat.calls[ref] = call
        self._calls[ref] = seat

    def _listen(self, now: float) -> None:
        queued = sum(
            seat.trial is not None and seat.heard is None and now - seat.since > QUEUED for seat in self._seats.values()
        )
        for seat in list(self._seats.values()):
            if seat.trial is None and (queued > 0 or now - seat.since > IDLE):
                queued -= 1
                self._end(seat)
            elif seat.actor is None:
                if not seat.calls and now >= seat.again:
                    self._call(seat, "place")
            elif now >= seat.again and now - seat.since >= YOUNG:
                if seat.unsure and not seat.calling("run"):
                    seat.unsure = False
                    self._call(seat, "run")  # it does nothing where it is known
                if not seat.calling("listen"):
                    self._call(seat, "listen")
                if not seat.calling("look"):
                    self._look(seat)

    def _look(self, seat: _Seat) -> None:
        """Ask its node for a seat that gives no news; one that was never heard of may have been started."""
        if self._awake - max(seat.looked, seat.at_work, seat.heard or seat.looked) <= self._silence / 2:
            return
        seat.looked = self._awake
        if not seat.node:
            if (known := _known(seat.actor)).get("State") != "ALIVE":
                return
            seat.node, seat.pid = known["Address"]["NodeID"], known["Pid"]
            seat.heard = self._awake if seat.heard is None else seat.heard
        self._call(seat, "look")

    def _tick(self, planned: float) -> None:
        """Count the time since the last look, as far as this process was awake and looking."""
        now = time.monotonic()
        self._awake += min(now - self._looked, planned + SLACK)
        self._looked = now

    # ----------------------------------------------------------------------------------------------------- news

    def _collect(self, ready: list[Any]) -> tuple[list[Message], dict[_Seat, int], list[_Seat]]:
        """What is new: messages, up to which number they are known of each seat, and seats that are gone."""
        said, self._said = self._said, []
        seen: dict[_Seat, int] = {}
        dead: list[_Seat] = []
        answers = _answers(ready)
        for ref, answer in zip(ready, answers, strict=True):
            seat = self._calls.pop(ref)
            call = seat.calls.pop(ref)
            if call == "place" and not isinstance(answer, Exception):
                seat.actor = answer
                self._call(seat, "run")
                if seat.stopping and seat.trial is not None:
                    self.stop(seat.trial.id)
            elif call == "look":  # no answer says nothing: the node may be gone, too
                seat.at_work = self._awake if answer is True else seat.at_work
            elif not isinstance(answer, Exception):
                seat.heard = self._awake
                seat.node, seat.pid, messages = answer
                for number, message in messages:
                    if number > seen.get(seat, seat.seen):
                        seen[seat] = number
                        said.append(message)
            elif isinstance(answer, exceptions.ActorUnavailableError):  # unknown: look again
                seat.again = time.monotonic() + PAUSE
                seat.unsure = seat.unsure or call == "run"
            elif seat not in dead:
                dead.append(seat)
                said += self._gone(seat, answer, seen.get(seat, seat.seen))
        for seat in self._seats.values():
            if seat.heard is None or (quiet := self._awake - seat.heard) <= self._silence or seat in dead:
                continue
            most = min(BUSY * self._silence, max(self._silence, self._hang or math.inf))
            if quiet <= most and self._awake - seat.at_work <= self._silence:
                continue
            dead.append(seat)
            busy = seat.at_work > seat.heard  # then no machine is to blame
            silent = f"silence: it was not heard of for {most if busy else self._silence:g} s"
            said += self._missing(
                seat, silent + (", though its process was at work" if busy else ""), not busy, seen.get(seat, seat.seen)
            )
        return said, seen, dead

    def _settle(self, said: list[Message], seen: dict[_Seat, int], dead: list[_Seat]) -> None:
        """After what was said is on the disk: what is acknowledged, and who is free."""
        ended = {(message.trial, message.attempt): message for message in said if not isinstance(message, Underway)}
        for seat, number in seen.items():
            seat.seen = number
        for seat in dead:
            if seat.name in self._seats:
                self._end(seat)
        for run in ended:
            record_path(self._folder, *run).unlink(missing_ok=True)
        for seat in seen:
            if seat.trial is None:
                continue
            last = ended.get((seat.trial.id, seat.trial.attempt))
            if last is None:
                if seat.name in self._seats and not seat.calling("listen"):
                    self._call(seat, "listen")  # at once, because it says what is on the disk
                continue
            if isinstance(last, Lost):
                self._lost_on.setdefault(last.trial, set()).add(seat.node)
            else:
                self._lost_on.pop(last.trial, None)
            seat.trial, seat.since = None, time.monotonic()
            if seat.name in self._seats and (seat.fresh or isinstance(last, Lost)):
                self._end(seat)

    def _gone(self, seat: _Seat, error: Exception, seen: int) -> list[Message]:
        """The last messages of a seat that Ray says is gone."""
        text = str(error)
        reason = text.strip().partition("\n")[0]
        if isinstance(error, exceptions.RuntimeEnvSetupError | exceptions.RayTaskError) or getattr(
            error, "actor_init_failed", False
        ):
            if isinstance(error, exceptions.RayTaskError):
                reason = f"{type(error.cause).__name__}: {error.cause}".strip().partition("\n")[0]
            if seat.trial is None:
                return []
            words = f"A worker could not run the trial: {reason}"
            return [Raised(seat.trial.id, seat.trial.attempt, words, text, diverged=False)]
        cause, innocent = _cause(error, text)
        return self._missing(seat, cause, innocent, seen)

    def _missing(self, seat: _Seat, cause: str, innocent: bool, seen: int) -> list[Message]:
        """The last messages of a seat that is gone: what is on record, and Lost where the end is not."""
        trial = seat.trial
        if trial is None:
            return []
        said = [message for number, message in self._numbered(trial) if number > seen]
        if not _has_ended(said):
            never = seat.heard is None  # it did not begin, and so does not bear the blame
            said.append(Lost(trial.id, trial.attempt, cause, innocent or never))
            if node := seat.node or _known(seat.actor).get("Address", {}).get("NodeID"):
                self._lost_on.setdefault(trial.id, set()).add(node)
        return said

    def _numbered(self, trial: Trial) -> list[tuple[int, Message]]:
        return from_record(self._folder, trial.id, trial.attempt)

    def _on_record(self, trial: Trial) -> list[Message]:
        return [message for _, message in self._numbered(trial)]

    # --------------------------------------------------------------------------------------------- what was left

    def _actors(self) -> list[tuple[str, Any]]:
        """The seats of this study, whoever made them."""
        found = []
        for place in list_named_actors(all_namespaces=True):
            if place["namespace"] == self._space and place["name"] != CLAIM:
                with contextlib.suppress(ValueError):  # gone since it was listed
                    found.append((place["name"], ray.get_actor(place["name"], self._space)))
        return found

    def _left(self, trials: Iterable[Trial]) -> list[tuple[str, Any, Any, Run | None]]:
        """The seats and rooms of an earlier driver, and what runs there, if anything does.

        For a seat that says nothing while its node sees its process at work, the record of a run speaks.
        """
        if self._own:
            return []
        actors = dict(self._actors())
        rooms = {name.partition("-")[2]: actors.pop(name) for name in list(actors) if name.startswith("room-")}
        asked = {actor.runs.remote(): (name, actor) for name, actor in actors.items()}
        until, quiet = time.monotonic() + self._silence, list(asked)
        while quiet and time.monotonic() < until:
            _, quiet = ray.wait(quiet, num_returns=len(quiet), timeout=PAUSE)
            if all(_waits_for_room(asked[ref][1]) for ref in quiet):
                break
        at_work = self._seen_at_work([asked[ref] for ref in quiet])
        runs = [(trial.id, trial.attempt) for trial in trials if at_work and not _has_ended(self._on_record(trial))]
        on_record = {seat_on_record(self._folder, *run): run for run in runs}
        found: list[tuple[str, Any, Any, Run | None]] = []
        for ref, (name, actor) in asked.items():
            run = on_record.get(name) if name in at_work else None
            if ref in quiet and run is None and not _waits_for_room(actor):
                run = UNHEARD
            if ref not in quiet:
                try:
                    run = ray.get(ref)
                except exceptions.ActorUnavailableError:
                    run = UNHEARD
                except exceptions.RayError:
                    run = None
            found.append((name, actor, rooms.pop(name.partition("-")[2], None), run))
        for room in rooms.values():  # whose seat was not there yet
            _kill(room)
        return found

    def _seen_at_work(self, seats: Iterable[tuple[str, Any]]) -> set[str]:
        """Those of these seats whose processes are at work, as far as their nodes answer."""
        asked = {}
        for name, actor in seats:
            if (known := _known(actor)).get("State") == "ALIVE":
                asked[_ask(known["Address"]["NodeID"], known["Pid"])] = name
        if not asked:
            return set()
        ready = ray.wait(list(asked), num_returns=len(asked), timeout=GRACE)[0]
        return {asked[ref] for ref, answer in zip(ready, _answers(ready), strict=True) if answer is True}


@dataclass(eq=False)
class _Seat:
    """The driver's side of a seat; where there is a room, that comes first and then has the actor.

    kind: what it has of resources and environment; it is used again for equal ones only. fresh: used once. seen: number
    of the last message that is on the disk. heard: when it was last heard of, in seconds awake; None before the first
    time. looked, at_work: when its node was last asked for its process, and had it. again: not to be asked before.
    unsure: whether it may not have been told what to run.
    """

    name: str
    kind: str
    needs: dict[str, float]
    actor: Any
    room: Any
    fresh: bool
    trial: Trial | None = None
    seen: int = 0
    node: str = ""
    pid: int = 0
    heard: float | None = None
    looked: float = -math.inf
    at_work: float = -math.inf
    since: float = 0.0
    again: float = 0.0
    unsure: bool = False
    stopping: bool = False
    calls: dict[Any, Call] = field(default_factory=dict)

    def calling(self, call: Call) -> bool:
        return call in self.calls.values()


@ray.remote(num_cpus=0, max_retries=0)
def _at_work(pid: int) -> bool:
    """Whether a process of this node is there and was not halted."""
    if os.path.isdir("/proc/self"):
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "TtZXx"
        except OSError:
            return False
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


def _ask(node: str, pid: int) -> Any:
    """Asks a node whether this process of its is at work."""
    return _at_work.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(pid)


# ------------------------------------------------------------------------------------------------- one driver a study


@ray.remote(num_cpus=0, max_restarts=-1)
class _Claim:
    """Stands for the driver of a study: its name is taken while that driver, its owner, lives."""

    def __init__(self, who: str) -> None:
        self._who = who

    def who(self) -> str:
        return self._who


def _claim(folder: Path, space: str) -> Any:
    """The claim on the study, made now; StudyInUse when another driver on the cluster has it and keeps it."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    until = time.monotonic() + YIELD
    while True:
        try:
            options = {"name": CLAIM, "namespace": space, "scheduling_strategy": here}
            return _Claim.options(**options).remote(f"pid {os.getpid()} on {socket.gethostname()}")  # type: ignore[attr-defined]
        except ValueError as error:  # the name is taken, perhaps by a driver that was just killed
            if time.monotonic() > until:
                who = "another driver"
                with contextlib.suppress(ValueError, exceptions.RayError):
                    who = str(ray.get(ray.get_actor(CLAIM, space).who.remote(), timeout=GRACE))
                raise journal.StudyInUse(f"{folder} is in use by {who}; one study has one driver.") from error
            time.sleep(PAUSE)


# ------------------------------------------------------------------------------------------------------------ helpers


def _has_ended(said: Sequence[Message]) -> bool:
    return bool(said) and not isinstance(said[-1], Underway)


def _answers(refs: list[Any]) -> list[Any]:
    """What calls that have ended gave, or the error that they ended with."""
    try:
        return list(ray.get(refs))
    except exceptions.RayError:
        pass
    answers: list[Any] = []
    for ref in refs:
        try:
            answers.append(ray.get(ref))
        except exceptions.RayError as error:
            answers.append(error)
    return answers


def _cause(error: Exception, text: str) -> tuple[str, bool]:
    """How a seat was lost, in words that follow "lost by", and whether its machine was taken away."""
    if getattr(error, "preempted", False):
        return "the preemption of its node", True
    if isinstance(error, exceptions.NodeDiedError | exceptions.LocalRayletDiedError) or "node has died" in text:
        return "the death of its node", True
    if "placement group" in text:
        return "the removal of its placement group", True
    if isinstance(error, exceptions.OutOfMemoryError) or "OUT_OF_MEMORY" in text:
        return "running out of its node's memory", False
    if isinstance(error, exceptions.ActorDiedError):
        return "a crash or kill of its process", False
    return type(error).__name__, False


def _kill(actor: Any) -> None:
    with contextlib.suppress(exceptions.RayError, ValueError):
        ray.kill(actor)


def _known(actor: Any) -> Mapping[str, Any]:
    """What Ray knows of an actor, dead or alive; nothing where its interface, which is not public, has changed."""
    try:
        from ray._private.state import actors

        return dict(actors(actor._actor_id.hex()))
    except Exception:
        return {}


def _waits_for_room(actor: Any) -> bool:
    """Whether Ray has not yet started an actor, as far as it tells."""
    return bool(_known(actor).get("State", "ALIVE") != "ALIVE")


def _check(resources: Mapping[str, Any]) -> Mapping[str, Any]:
    if not isinstance(resources, Mapping) or (wrong := set(resources) - set(KINDS)):
        wrong = wrong if isinstance(resources, Mapping) else resources
        raise ValueError(f"resources are a dictionary with keys among {', '.join(KINDS)}, got {wrong!r}.")
    if not isinstance(env := resources.get("env", {}), Mapping) or not all(isinstance(v, str) for v in env.values()):
        raise ValueError(f"env is a dictionary of environment variables, texts both, got {env!r}.")
    if "bundles" in resources:
        if not resources["bundles"] or not all(isinstance(bundle, Mapping) for bundle in resources["bundles"]):
            raise ValueError(f"bundles are at least one dictionary of resources, got {resources['bundles']!r}.")
        if beside := [kind for kind in OF_RAY if kind in resources]:
            raise ValueError(f"resources with bundles have all in these, got {beside} beside them.")
    return resources


def _needs(resources: Mapping[str, Any]) -> dict[str, float]:
    """What a trial takes, in the names of a node's resources."""
    needs: dict[str, float] = {"CPU": 0.0}
    if "bundles" in resources:
        for bundle in resources["bundles"]:
            for kind, n in bundle.items():
                needs[kind] = needs.get(kind, 0.0) + n
        return needs
    named = {"CPU": resources.get("num_cpus", 1), "GPU": resources.get("num_gpus"), "memory": resources.get("memory")}
    return {kind: float(n) for kind, n in {**named, **resources.get("resources", {})}.items() if n is not None}


def _of_bundle(bundle: Mapping[str, float]) -> dict[str, Any]:
    """All that a bundle has, as options of an actor."""
    named = {"num_cpus": bundle.get("CPU", 0), "num_gpus": bundle.get("GPU", 0), "memory": bundle.get("memory")}
    other = {kind: n for kind, n in bundle.items() if kind not in ("CPU", "GPU", "memory")}
    return {kind: n for kind, n in {**named, "resources": other}.items() if n or kind == "num_cpus"}


def _by_default(gpus: float, workers: int) -> dict[str, float]:
    """What a trial takes where nobody says so: all workers find room, as few as possible of them on one GPU."""
    return {"num_cpus": 1, "num_gpus": 1 / math.ceil(workers / gpus)} if gpus else {"num_cpus": 1}
