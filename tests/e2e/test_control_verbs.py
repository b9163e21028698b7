"""The verbs at a running tidegate: what they show, what they change, how long it lasts."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from harness.backends import Backend
from harness.line_client import LineClient
from harness.proc import Tidegate, tcp_config
from harness.processes import stopped
from harness.waiting import wait_until

from tidegate.control.client import ControlError, call, stream


@pytest.fixture
def backend() -> Iterator[Backend]:
    with Backend("echo") as one:
        yield one


@pytest.fixture
def gate(backend: Backend) -> Iterator[Tidegate]:
    # nobody takes over from a stopped worker for being killed
    config = tcp_config([backend.address], workers=2, top={"kill_hung_after": "60s"})
    with Tidegate(config) as one:
        yield one


def refused(gate: Tidegate, verb: str, **args: Any) -> str:
    with pytest.raises(ControlError) as error:
        gate.call(verb, args)
    return error.value.code


def speak(*clients: LineClient) -> None:
    for client in clients:
        assert client.ask("hello") == "hello"


def test_sessions_are_listed_filtered_and_killed(gate: Tidegate, backend: Backend) -> None:
    clients = []
    for _ in range(6):
        clients.append(LineClient(gate.port()))
        speak(clients[-1])
    ports = [client.sock.getsockname()[1] for client in clients]
    listed = gate.call("sessions")
    assert listed["matched"] == 6
    assert listed["notes"] == []
    assert [int(one["client"].rpartition(":")[2]) for one in listed["sessions"]] == ports, "oldest first"
    first = listed["sessions"][0]
    assert first["backend"] == backend.address
    assert first["listener"] == "front"
    assert first["bytes_in"] == first["bytes_out"] == len("hello\n")
    pids = gate.worker_pids()
    assert first["token"].startswith(f"{pids[first['worker']]}:")

    limited = gate.call("sessions", {"limit": 2})
    assert (limited["matched"], len(limited["sessions"])) == (6, 2)
    for args, count in [
        ({"listener": "front"}, 6),
        ({"cluster": "back"}, 6),
        ({"backend": backend.address}, 6),
        ({"backend": "127.0.0.1:1"}, 0),
        ({"client": "127.0.0.0/8"}, 6),
        ({"client": "10.0.0.0/8"}, 0),
        ({"client": f"127.0.0.1:{ports[2]}"}, 1),
        ({"older": "1h"}, 0),
        ({"older": "1ns"}, 6),
        ({"idle": "1h"}, 0),
    ]:
        assert gate.call("sessions", args)["matched"] == count, args
    assert refused(gate, "sessions", listener="fornt") == "not_found"
    assert refused(gate, "sessions", worker=2) == "no_such_worker"

    assert gate.call("sessions.kill", {"token": first["token"]})["killed"] == 1
    assert clients[0].end() in ("reset", "eof")
    assert refused(gate, "sessions.kill", token=first["token"]) == "not_found"
    assert refused(gate, "sessions.kill", token=f"1:{first['token'].partition(':')[2]}") == "not_found"
    assert refused(gate, "sessions.kill") == "bad_argument", "nothing said must not mean everything"
    assert refused(gate, "sessions.kill", worker=0) == "bad_argument"
    assert gate.call("sessions.kill", {"client": f"127.0.0.1:{ports[2]}"})["killed"] == 1
    assert clients[2].end() in ("reset", "eof")
    speak(clients[1], *clients[3:])
    assert gate.call("sessions.kill", {"all": True})["killed"] == 4
    assert all(client.end() in ("reset", "eof") for client in [clients[1], *clients[3:]])
    wait_until(lambda: gate.listener()["ended"]["killed"] == 6, 5, "six killed to be counted")
    assert [event["verb"] for event in gate.events("control")] == ["sessions.kill"] * 7


def test_a_backend_comes_drains_and_goes_at_runtime(gate: Tidegate, backend: Backend) -> None:
    with Backend("echo") as other:
        place = {"cluster": "back", "backend": other.address}
        gate.call("backend.add", {**place, "weight": 3})
        assert refused(gate, "backend.add", **place) == "conflict"
        assert refused(gate, "backend.add", cluster="back", backend="nonsense") == "bad_argument"
        assert refused(gate, "backend.add", cluster="kcab", backend=other.address) == "not_found"
        weights = {b["address"]: b["weight"] for b in gate.status()["clusters"][0]["backends"]}
        assert weights == {backend.address: 1, other.address: 3}
        assert gate.status()["runtime_changes"] == ["cluster back: backends"]

        old = {"cluster": "back", "backend": backend.address}
        gate.call("backend.drain", old)
        clients = [LineClient(gate.port()) for _ in range(6)]
        speak(*clients)
        assert {one["backend"] for one in gate.call("sessions")["sessions"]} == {other.address}

        # workers forked later know too
        victim = gate.worker_pids()[0]
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: gate.worker_pids()[0] not in (0, victim), 10, "the replacement")
        wait_until(lambda: gate.status()["workers"][0]["state"] == "active", 10, "it to be active")
        seen = gate.call("clusters")["clusters"][0]["backends"]
        assert [(b["address"], b["mode"], len(b["seen"])) for b in seen] == [
            (backend.address, "drain", 0),
            (other.address, "ready", 2),
        ]
        late = [LineClient(gate.port()) for _ in range(6)]
        speak(*late)
        assert {one["backend"] for one in gate.call("sessions")["sessions"]} == {other.address}

        # maintenance ends what is there, drain does not
        gate.call("backend.ready", old)
        before = gate.call("sessions")["matched"]
        gate.call("backend.drain", place)
        assert gate.call("sessions")["matched"] == before
        assert gate.call("backend.maintenance", place)["killed"] == before
        assert all(client.end() in ("reset", "eof") for client in late)
        with LineClient(gate.port()) as client:
            speak(client)
            assert gate.call("sessions")["sessions"][0]["backend"] == backend.address

        gate.call("backend.weight", {**place, "weight": 9})
        assert refused(gate, "backend.weight", **place, weight=0) == "bad_argument"
        assert refused(gate, "backend.weight", **place, weight=100_000) == "bad_argument"
        for weight in (0, 5000):
            with pytest.raises(ControlError, match=r"from 1 to 1000$"):
                gate.call("backend.weight", {**place, "weight": weight})
        gate.call("backend.remove", place)
        assert refused(gate, "backend.remove", **place) == "not_found"
        assert refused(gate, "backend.remove", **old) == "conflict", "the last one"
        assert gate.status()["runtime_changes"] == []


def test_a_cluster_with_everything_drained_refuses(gate: Tidegate, backend: Backend) -> None:
    gate.call("backend.drain", {"cluster": "back", "backend": backend.address})
    with LineClient(gate.port()) as client:
        assert client.end() in ("reset", "eof")
    wait_until(lambda: gate.listener()["ended"]["no_backend"] == 1, 5, "it to be counted")
    gate.call("backend.ready", {"cluster": "back", "backend": backend.address})
    with LineClient(gate.port()) as client:
        speak(client)


def test_admission_changes_at_once_and_until_the_next_reload(gate: Tidegate) -> None:
    kept = {"stale_after_ms": 1000.0, "policy": "deadline", "max_connections": None, "accept_queue": 1024}
    assert {key: gate.listener()[key] for key in kept} == kept
    gate.call("admission.set", {"listener": "front", "stale_after": "200ms", "max_connections": 1})
    assert gate.listener()["stale_after_ms"] == 200
    assert gate.listener()["max_connections"] == 1
    assert gate.status()["runtime_changes"] == ["listener front: max_connections, stale_after"]
    assert refused(gate, "admission.set", listener="front") == "bad_argument"
    assert refused(gate, "admission.set", listener="nope", stale_after="1s") == "not_found"
    assert refused(gate, "admission.set", stale_after="1") == "bad_argument"
    assert refused(gate, "admission.set", max_connections=0) == "bad_argument"
    assert refused(gate, "admission.set", policy="codle") == "bad_argument"

    # one session per worker: the third waits, and is refused when it is 200 ms old
    clients = [LineClient(gate.port()) for _ in range(5)]
    wait_until(lambda: gate.listener()["dropped"]["stale"] == 3, 5, "three of five to go stale")
    gate.call("sessions.kill", {"all": True})

    saved = gate.call("state.save")["state"]
    assert saved == {
        "version": 1,
        "listeners": {"front": {"stale_after": "200ms", "max_connections": 1}},
        "clusters": {},
    }
    gate.call("reload")
    assert {key: gate.listener()[key] for key in kept} == kept
    assert gate.status()["runtime_changes"] == []
    assert gate.call("state.save")["state"] == {"version": 1, "listeners": {}, "clusters": {}}
    many = [LineClient(gate.port()) for _ in range(5)]
    speak(*many)

    gate.call("state.load", {"state": saved})
    assert gate.listener()["max_connections"] == 1
    assert gate.call("state.save")["state"] == saved
    assert clients


def test_a_saved_state_is_loaded_whole_or_not_at_all(gate: Tidegate, backend: Backend) -> None:
    good = {"front": {"stale_after": "300ms"}}
    for state, code in [
        ({}, "bad_argument"),
        ({"version": 2}, "bad_argument"),
        ({"version": 1, "more": 1}, "bad_argument"),
        ({"version": 1, "listeners": {**good, "nope": {"stale_after": "1s"}}}, "not_found"),
        ({"version": 1, "listeners": {**good, "front": {"address": "127.0.0.1:1"}}}, "bad_argument"),
        ({"version": 1, "listeners": good, "clusters": {"back": []}}, "bad_argument"),
        ({"version": 1, "listeners": good, "clusters": {"back": ["x"]}}, "bad_argument"),
        ({"version": 1, "listeners": good, "clusters": {"nope": [backend.address]}}, "not_found"),
        ({"version": 1, "listeners": good, "clusters": {"back": [backend.address] * 2}}, "conflict"),
        ({"version": 1, "listeners": good, "log_level": "loud"}, "bad_argument"),
    ]:
        assert refused(gate, "state.load", state=state) == code, state
        assert gate.status()["runtime_changes"] == []
    other = {"address": "127.0.0.1:1", "weight": 2, "mode": "drain"}
    state = {
        "version": 1,
        "log_level": "error",
        "listeners": good,
        "clusters": {"back": [backend.address, other]},
    }
    gate.call("state.load", {"state": state})
    status = gate.status()
    assert status["log_level"] == "error"
    assert status["listeners"][0]["stale_after_ms"] == 300
    assert [(b["address"], b["weight"], b["mode"]) for b in status["clusters"][0]["backends"]] == [
        (backend.address, 1, "ready"),
        ("127.0.0.1:1", 2, "drain"),
    ]
    gate.call("state.load", {"state": gate.call("state.save")})  # its whole answer serves as well
    assert gate.status()["runtime_changes"] == status["runtime_changes"]


def test_the_log_level_reaches_workers_and_audits_itself(gate: Tidegate, backend: Backend) -> None:
    gate.call("log.level", {"level": "error"})
    with LineClient(gate.port()) as client:
        speak(client)
        gate.call("sessions.kill", {"all": True})
        client.end()
    assert not gate.events("session_ended"), "workers log errors only"
    assert [event["verb"] for event in gate.events("control")] == ["log.level", "sessions.kill"]
    gate.call("log.level", {"level": "info"})
    with LineClient(gate.port()) as client:
        speak(client)
        gate.call("sessions.kill", {"all": True})
    wait_until(lambda: gate.events("session_ended"), 5, "a worker to log it")


def test_zombies_are_remembered_over_their_workers_death(backend: Backend) -> None:
    config = tcp_config([backend.address], zombie_after="300ms", top={"zombie_interval": "100ms"})
    with Tidegate(config) as gate:
        assert gate.call("zombies") == {"total": 0, "zombies": []}
        with LineClient(gate.port()) as client:
            speak(client)
            port = client.sock.getsockname()[1]
            assert client.end() in ("reset", "eof")
        wait_until(lambda: gate.call("zombies")["total"] == 1, 5, "the zombie to be told of")
        (victim,) = gate.worker_pids()
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: gate.worker_pids()[0] not in (0, victim), 10, "the replacement")
        (zombie,) = gate.call("zombies")["zombies"]
        assert zombie["reason"] == "zombie"
        assert zombie["client"] == f"127.0.0.1:{port}"
        assert zombie["token"].startswith(f"{victim}:")


def test_nothing_was_refused_yet(gate: Tidegate) -> None:
    assert gate.call("errors") == {"total": 0, "workers": 2, "answered": 2, "errors": [], "notes": []}


def test_help_names_every_verb_and_its_arguments(gate: Tidegate) -> None:
    verbs = gate.call("help")["verbs"]
    assert {"status", "sessions", "backend.add", "events", "state.load"} <= set(verbs)
    assert verbs["backend.add"]["mutates"]
    assert not verbs["sessions"]["mutates"]
    assert verbs["backend.add"]["args"]["cluster"]["required"]


def test_events_stream_from_supervisor_and_workers(gate: Tidegate) -> None:
    seen: list[dict[str, Any]] = []

    def watch() -> None:
        for line in stream(gate.control, "events", {"level": "info"}):
            seen.append(line["event"])

    def names() -> list[str]:
        return [event["event"] for event in seen]

    thread = threading.Thread(target=watch)
    thread.start()
    wait_until(lambda: gate.call("log.level", {"level": "info"}) and "control" in names(), 5, "the stream")
    with LineClient(gate.port()) as client:
        speak(client)
        gate.call("sessions.kill", {"all": True})
        wait_until(lambda: "session_ended" in names(), 5, "an event of a worker")
    ended = next(event for event in seen if event["event"] == "session_ended")
    assert ended["reason"] == "killed"
    assert ended["worker_process"] in (0, 1)
    # a replacement passes its events on too
    victim = gate.worker_pids()[1]
    os.kill(victim, signal.SIGKILL)
    wait_until(lambda: "worker_died" in names(), 5, "the death")
    wait_until(lambda: gate.worker_pids()[1] not in (0, victim), 10, "the replacement")
    wait_until(lambda: gate.status()["workers"][1]["state"] == "active", 10, "it to be active")
    with stopped(gate.worker_pids()[0]), LineClient(gate.port()) as client:
        speak(client)
        gate.call("sessions.kill", {"all": True}, timeout_s=5)
        wait_until(lambda: any(event.get("worker_process") == 1 for event in seen), 5, "an event of worker 1")
    gate.call("drain")
    thread.join(10)
    assert not thread.is_alive(), "the stream ends with tidegate"
    assert "draining" in names()
    gate.wait()


def test_a_stopped_worker_costs_its_part_of_the_answer_and_a_note(gate: Tidegate) -> None:
    clients = [LineClient(gate.port()) for _ in range(12)]
    speak(*clients)
    by_worker = [sum(s["worker"] == i for s in gate.call("sessions")["sessions"]) for i in (0, 1)]
    victim = gate.worker_pids()[0]
    with stopped(victim):
        begun = time.monotonic()
        answer = gate.call("sessions")
        assert time.monotonic() - begun < 2.0
        assert answer["matched"] == by_worker[1]
        assert answer["notes"] == ["worker 0 did not answer within 1000 ms"]
        begun = time.monotonic()
        for _ in range(50):
            answer = gate.call("sessions")
            assert answer["notes"] == ["worker 0 hangs: it has not answered an earlier question"]
        assert time.monotonic() - begun < 5.0, "nobody waits for it a second time"
        # a change is applied by the others, and noted
        answer = gate.call("admission.set", {"stale_after": "7s"})
        assert answer["notes"] == ["worker 0 hangs: it will apply it when it wakes"]
        # a kill that it did not get in time must not strike later
        assert gate.call("sessions.kill", {"worker": 0, "all": True})["killed"] == 0
    wait_until(lambda: gate.call("sessions")["matched"] == 12, 10, "it to answer again")
    assert gate.call("sessions")["notes"] == []
    assert gate.worker_pids()[0] == victim
    speak(*clients)


def test_a_worker_killed_while_it_is_asked_is_noted(gate: Tidegate) -> None:
    victim = gate.worker_pids()[0]
    found: list[dict[str, Any]] = []
    with stopped(victim):
        thread = threading.Thread(target=lambda: found.append(gate.call("sessions")))
        thread.start()
        time.sleep(0.2)
        os.kill(victim, signal.SIGKILL)
        thread.join(5)
    assert found[0]["notes"] == ["worker 0 died before it answered"]


def test_many_sessions_and_a_large_answer(gate: Tidegate) -> None:
    clients = [LineClient(gate.port()) for _ in range(400)]
    wait_until(lambda: gate.call("sessions")["matched"] == 400, 10, "all of them")
    answer = gate.call("sessions", {"limit": 2_000})
    assert len(answer["sessions"]) == 400
    assert len(json.dumps(answer)) > 100_000, "more than fits into one message of a worker"
    assert len({one["token"] for one in answer["sessions"]}) == 400
    assert gate.call("sessions.kill", {"older": "1ns"})["killed"] == 400
    assert len(clients) == 400


def test_nothing_is_changed_while_it_ends(backend: Backend) -> None:
    config = tcp_config([backend.address], top={"drain_timeout": "20s"})
    with Tidegate(config) as gate, LineClient(gate.port()) as client:
        speak(client)
        gate.call("drain")
        assert refused(gate, "admission.set", stale_after="1s") == "ending"
        assert gate.call("sessions")["matched"] == 1
        assert gate.call("sessions.kill", {"all": True})["killed"] == 1
        gate.wait()


def test_a_worker_that_finished_in_a_drain_has_ended_and_is_not_dead(backend: Backend) -> None:
    config = tcp_config([backend.address], workers=2, top={"drain_timeout": "20s"})
    with Tidegate(config) as gate, LineClient(gate.port()) as client:
        speak(client)
        gate.call("drain")
        wait_until(
            lambda: sorted(one["state"] for one in gate.call("workers")["workers"]) == ["draining", "ended"],
            5,
            "the idle one to end",
        )
        (ended,) = [one for one in gate.call("workers")["workers"] if one["state"] == "ended"]
        assert ended["pid"] == 0
        client.sock.close()
        gate.wait()


def test_a_key_that_takes_a_restart_is_said_once(gate: Tidegate, backend: Backend) -> None:
    config = tcp_config([backend.address], workers=3, top={"kill_hung_after": "60s"})
    config["listener"][0]["address"] = f"127.0.0.1:{gate.port()}"
    gate.write_config(config)
    answer = gate.call("reload")
    assert (answer["message"], answer["changes"]) == ("reloaded: nothing changed", ["nothing changed"])
    assert answer["notes"] == ["workers keeps its old value until a restart"]
    (event,) = gate.events("reloaded")
    assert event["changes"].count("workers keeps its old value until a restart") == 1


def test_draining_twice_cuts_nobody(backend: Backend) -> None:
    config = tcp_config([backend.address], top={"drain_timeout": "20s"})
    with Tidegate(config) as gate, LineClient(gate.port()) as client:
        speak(client)
        assert gate.call("drain")["message"] == "draining; ends within 20 s"
        wait_until(lambda: gate.events("draining"), 5, "the drain to begin")
        for _ in range(2):
            said = gate.call("drain")["message"]
            before, after = said.split("ends within ")
            assert before == "draining already; "
            assert 0 < int(after.removesuffix(" s")) <= 20
            speak(client)
        # nor does the first signal: only a second one means "now"
        gate.child.signal(signal.SIGTERM)
        wait_until(lambda: len(gate.events("draining")) == 2, 5, "the signal to be seen")
        speak(client)
        gate.child.signal(signal.SIGTERM)
        assert client.end() in ("eof", "reset")
        gate.wait()


def test_concurrent_changes_all_take_effect(gate: Tidegate) -> None:
    failed: list[BaseException] = []

    def add(number: int) -> None:
        try:
            call(gate.control, "backend.add", {"cluster": "back", "backend": f"127.0.0.1:{number}"})
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=add, args=(number,)) for number in range(1, 21)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert not failed
    seen = gate.call("clusters")["clusters"][0]["backends"]
    assert len(seen) == 21
    assert all([one["worker"] for one in backend["seen"]] == [0, 1] for backend in seen)
