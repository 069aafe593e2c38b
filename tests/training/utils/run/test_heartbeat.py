"""Who falls silent is named; who says good-bye is not; a failure is passed on. All processes are threads of this one here."""

import queue
import socket
import time

import pytest

from errors import UserError
from training.utils.run import heartbeat
from training.utils.run.heartbeat import Heartbeat, several_nodes, time_limit

NAMES = ["node 0 (a)", "node 1 (b)", "node 2 (c)"]


class Room:
    """Three processes on three nodes. ends: what each ended with."""

    def __init__(self, names: list[str]) -> None:
        self.ends: list[queue.Queue] = [queue.Queue() for _ in names]
        listener = socket.create_server(("127.0.0.1", 0))
        self.address = listener.getsockname()
        ways = [{"listener": listener}, *({"address": self.address} for _ in names[1:])]
        self.beats = [
            Heartbeat(rank, names, 1.0, "token", leave=self.ends[rank].put, **way) for rank, way in enumerate(ways)
        ]
        while len(self.known()) < len(names) - 1:   # the first process has read all names
            pass

    def known(self) -> list[int]:
        return [line.rank for line in self.beats[0].lines if line.rank]

    def code(self, rank: int) -> int:
        """What a process ended with."""
        return self.ends[rank].get(timeout=20)


@pytest.fixture
def room(monkeypatch):
    monkeypatch.setattr(heartbeat, "EVERY", 0.1)
    rooms = []

    def make(names=NAMES) -> Room:
        rooms.append(Room(names))
        return rooms[-1]

    yield make
    for one in rooms:
        for beat in one.beats:
            beat.stop()


def test_a_connection_that_ends_without_a_word_is_a_lost_node(room, capfd):
    three = room()
    three.beats[1].speaks = False
    three.beats[1].lines[0].connection.shutdown(socket.SHUT_RDWR)   # as the system does for a killed process
    assert three.code(0) == three.code(2) == heartbeat.LOST == 75
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 2 and said[0] == said[1]   # one of each node that is left
    assert said[0].startswith("error: node 1 (b) is lost: the connection to it ended (rank 1)") and "--resume" in said[0]


def test_silence_is_told_from_a_pause_of_ones_own(room, monkeypatch, capfd):
    three = room()
    three.beats[1].limit = three.beats[2].limit = 1e9   # they would complain about the rest of the first
    with three.beats[0].lock:   # for longer than its limit; then it finds beats waiting
        time.sleep(1.5)
    assert not three.beats[0].stopped.wait(1.5)
    monkeypatch.setattr(three.beats[1].lines[0], "send", lambda text: None)
    assert three.code(0) == 75 and three.code(2) == 75
    assert "node 1 (b) is lost: nothing was heard from it for 1 s" in capfd.readouterr().err


def test_the_first_node_is_missed_by_all(room, capfd):
    three = room()
    with three.beats[0].lock:
        three.beats[0].stopped.set()   # it says nothing more
        for line in three.beats[0].lines:
            line.connection.shutdown(socket.SHUT_RDWR)
    assert three.code(1) == three.code(2) == 75
    assert capfd.readouterr().err.count("node 0 (a) is lost") == 2


def test_good_bye_is_no_loss(room):
    three = room()
    three.beats[1].stop()
    assert not three.beats[0].stopped.wait(1.5) and three.known() == [2]
    three.beats[0].stop()
    assert not three.beats[2].stopped.wait(1.5)
    assert all(end.empty() for end in three.ends)


def test_a_failure_is_told_to_all_who_follow_unless_they_end_by_themselves(room, monkeypatch, capfd):
    monkeypatch.setattr(heartbeat, "GRACE", 1.0)
    three = room()
    three.beats[1].failed(2, "--data_path x.jsonl: no such file.\nSecond line.")
    assert three.code(0) == three.code(2) == 2
    assert capfd.readouterr().err.count("error: node 1 (b): --data_path x.jsonl: no such file. Second line.\n") == 2

    alike = room()   # the usual case: a wrong flag ends all of them
    for beat in reversed(alike.beats):
        beat.failed(2, "the same everywhere")
    assert all(end.empty() for end in alike.ends)


def test_a_process_lost_on_ones_own_node_is_left_to_the_launcher(room, monkeypatch, capfd):
    monkeypatch.setattr(heartbeat, "GRACE", 3.0)
    two = room(["node 0 (a)", "node 0 (a)", "node 1 (b)"])
    two.beats[1].lines[0].connection.shutdown(socket.SHUT_RDWR)
    assert two.code(2) == 75 and two.ends[0].empty()
    assert two.code(0) == 75


def test_strangers_are_not_listened_to(room):
    three = room()
    for greeting in (b"hello 1 guess\n", b"hello x token\n", b"hello 99 token\n", b"lost node 2 (c) | is gone\n", b"\xff\n"):
        with socket.create_connection(three.address) as stranger:
            stranger.sendall(greeting)
            stranger.settimeout(10)
            while stranger.recv(100):   # beats, until the line is cut
                pass
    assert not three.beats[0].stopped.is_set() and sorted(three.known()) == [1, 2]


@pytest.mark.parametrize(
    ("environ", "several"),
    [
        ({}, False),
        ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}, False),
        ({"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}, True),
        ({"WORLD_SIZE": "2", "LOCAL_SIZE": "1"}, True),
        ({"WORLD_SIZE": "2"}, False),
    ],
)
def test_only_several_nodes_are_watched(environ, several):
    assert several_nodes(environ) == several


def test_the_limit_is_seconds_or_nothing():
    assert (time_limit({}), time_limit({"SANBU_NODE_TIMEOUT": "90"}), time_limit({"SANBU_NODE_TIMEOUT": "0"})) == (45, 90, 0)
    for wrong in ("x", "-1", "1", "nan", "inf"):
        with pytest.raises(UserError, match=f"SANBU_NODE_TIMEOUT={wrong}: expected seconds, 6 or more"):
            time_limit({"SANBU_NODE_TIMEOUT": wrong})
