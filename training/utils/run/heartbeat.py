"""Several nodes: every process tells the first one that it lives, and hears the same; who falls silent ends the run by name.

What the libraries do alone: gloo notices within a second that a neighbour was killed, but names a socket; gloo after a
pulled cable, and NCCL and HCCL in most cases, wait for the timeout of the process group, which is half an hour because
models load at different speeds. Here a killed process is noticed at once (its connection ends), one that cannot be
reached after SANBU_NODE_TIMEOUT seconds. The default of 45 leaves room within a minute to end everything, and is far
above what holds Python's interpreter lock in a step - the beats come from a thread of their own, so compiling, loading,
saving and collectives do not delay them; only a single C call that keeps the lock does, such as DeepSpeed's CPU Adam,
about a second for 1e9 parameters. 0 turns all this off. Imports no torch; no effect on what is computed.
"""

import contextlib
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, MutableMapping

from errors import UserError

LOST = 75  # exit code, EX_TEMPFAIL of sysexits.h: the same command may be tried again
EVERY = 2.0  # seconds between two beats
GRACE = 15.0  # seconds for a process to fail by itself as another one did, see entry.errors_told
CONNECT = 10.0  # seconds to reach the first process
VARIABLE = "SANBU_NODE_TIMEOUT"


def several_nodes(environ: MutableMapping[str, str] = os.environ) -> bool:
    """Tell whether the launcher (torchrun, DeepSpeed, OpenMPI) has put processes on more than one node."""
    world = int(environ.get("WORLD_SIZE") or 1)
    return world > int(environ.get("LOCAL_WORLD_SIZE") or environ.get("LOCAL_SIZE") or world)


def time_limit(environ: MutableMapping[str, str] = os.environ) -> float:
    """Return the seconds without a beat after which a node is lost; 0: nobody watches. UserError for what is no such number."""
    text = environ.get(VARIABLE) or "45"
    try:
        limit = float(text)
    except ValueError:
        limit = -1.0
    if limit != 0 and not 3 * EVERY <= limit < float("inf"):
        raise UserError(f"{VARIABLE}={text}: expected seconds, {3 * EVERY:.0f} or more, or 0 to watch over no node.")
    return limit


class Line:
    """A connection that carries lines of text and is never waited for."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connection = connection
        self.rest = b""
        self.rank: int | None = None  # of the process at the other end, once it is known
        self.heard = time.monotonic()

    def fileno(self) -> int:
        """Return the descriptor, for poll."""
        return self.connection.fileno()

    def send(self, text: str) -> None:
        """Send one line; to a peer that is gone, nothing: its end shows when reading."""
        with contextlib.suppress(OSError):
            self.connection.send(text.replace("\n", " ").encode() + b"\n")

    def read(self) -> list[str] | None:
        """Return the lines that have come, perhaps none; None at the end of the connection."""
        try:
            chunk = self.connection.recv(65536)
        except BlockingIOError:
            return []
        except OSError:
            return None
        if not chunk:
            return None
        self.heard = time.monotonic()
        *lines, self.rest = (self.rest + chunk).split(b"\n")
        return [line.decode(errors="replace") for line in lines]

    def close(self) -> None:
        """Hang up."""
        with contextlib.suppress(OSError):
            self.connection.close()


class Heartbeat:
    """The thread of one process that speaks and listens; the first process has a line to each, the others one to it.

    rank: of this process. names: of every rank, what to call the node it runs on. limit: seconds of silence. listener: a
    listening socket on rank 0; elsewhere address is where that one is. token: a word that all processes of the run know.
    """

    def __init__(
        self,
        rank: int,
        names: list[str],
        limit: float,
        token: str,
        *,
        speaks: bool = True,
        listener: socket.socket | None = None,
        address: tuple[str, int] | None = None,
        leave: Callable[[int], None] = os._exit,
    ) -> None:
        self.rank, self.names, self.limit, self.token = rank, names, limit, token
        self.speaks = speaks  # one process of a node tells what happened
        self.listener, self.leave = listener, leave  # how to end the process
        self.lines: list[Line] = []
        self.failure: tuple[float, int, str] | None = None  # when to follow another process, exit code, what it said
        self.lock = threading.RLock()
        self.stopped = threading.Event()
        if address:
            line = Line(socket.create_connection(address, timeout=CONNECT))
            line.rank = 0
            line.send(f"hello {rank} {token}")
            self.lines.append(line)
        self.thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self.thread.start()

    # --- what the main thread calls ---

    def stop(self) -> None:
        """Say good-bye and end the thread."""
        self._end("bye")

    def failed(self, code: int, text: str) -> None:
        """Tell the others what this process ends with; then end the thread."""
        self._end(f"failed {code} {self.names[self.rank]}: {text}")

    def hurry(self) -> bool:
        """If another process has failed, follow it now. Says whether one has."""
        with self.lock:
            if self.failure:
                self.failure = (0.0, *self.failure[1:])
            return self.failure is not None

    def _end(self, word: str) -> None:
        with self.lock:
            if self.stopped.is_set():
                return
            self.stopped.set()
            for line in self.lines:
                line.send(word)
        self.thread.join(timeout=10)

    # --- the thread ---

    def _run(self) -> None:
        next_beat = 0.0
        while not self.stopped.is_set():
            ready = self._wait()
            with self.lock:
                if self.stopped.is_set():
                    break
                for one in ready:
                    self._accept() if one is self.listener else self._hear(one)
                now = time.monotonic()
                if now >= next_beat:
                    next_beat = now + EVERY
                    for line in self.lines:
                        line.send("beat")
                for line in [line for line in self.lines if now - line.heard > self.limit]:
                    self._hear(line)  # a pause of this very process leaves beats waiting, and makes nobody silent
                    if line in self.lines and now - line.heard > self.limit:
                        self._lost(line, f"nothing was heard from it for {self.limit:.0f} s")
                if self.failure and now > self.failure[0]:
                    self._leave(self.failure[1], self.failure[2])
        for line in self.lines:
            line.close()
        if self.listener:
            self.listener.close()

    def _wait(self) -> list:
        watched = [*self.lines, *([self.listener] if self.listener else [])]
        poll = select.poll()  # select.select knows no descriptor above 1023
        by_number = {one.fileno(): one for one in watched}
        for number in by_number:
            poll.register(number, select.POLLIN)
        return [by_number[number] for number, _ in poll.poll(250)]

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            self.lines.append(Line(self.listener.accept()[0]))

    def _hear(self, line: Line) -> None:
        """Act on what a line brings."""
        texts = line.read()
        if texts is None:
            return self._lost(line, "the connection to it ended")
        for text in texts:
            word, _, more = text.partition(" ")
            if line.rank is None:  # nothing counts before the name
                rank, _, token = more.partition(" ")
                if word != "hello" or token != self.token or not rank.isdigit() or int(rank) >= len(self.names):
                    return self._drop(line)
                line.rank = int(rank)
            elif word == "bye":
                self._drop(line)
            elif word == "failed":
                code, _, reason = more.partition(" ")
                self._tell_others(text, line)
                self.failure = self.failure or (time.monotonic() + GRACE, int(code), reason)
                self._drop(line)
            elif word == "lost":
                name, _, reason = more.partition(" | ")
                self._conclude(name, f"{name} {reason}")

    def _lost(self, line: Line, why: str) -> None:
        self._drop(line)
        if line.rank is None or self.failure:
            return  # a stranger; or one of those that end because another has failed
        name = self.names[line.rank]
        text = (
            f"is lost: {why} (rank {line.rank}); its own log may tell more. The run ends on all nodes; the same command on "
            "every node with --resume continues from the newest checkpoint."
        )
        self._tell_others(f"lost {name} | {text}", line)
        self._conclude(name, f"{name} {text}")

    def _conclude(self, name: str, text: str) -> None:
        """Leave, because of a node. Of one's own, the launcher ends the rest, and knows what ended the lost process."""
        if name == self.names[self.rank]:
            self.failure = self.failure or (time.monotonic() + GRACE, LOST, text)
        else:
            self._leave(LOST, text)

    def _tell_others(self, text: str, line: Line) -> None:
        for other in self.lines:
            if other is not line:
                other.send(text)

    def _drop(self, line: Line) -> None:
        if line in self.lines:
            self.lines.remove(line)
            line.close()

    def _leave(self, code: int, text: str) -> None:
        """End this process: the main thread may wait in a collective that nobody can end."""
        self.stopped.set()
        if self.speaks:
            with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
                sys.stderr.write(f"error: {text}\n")  # one piece; print writes the line end apart, and others may come between
                sys.stderr.flush()
        self.leave(code)


# --- the one of this process ------------------------------------------------------------------------------------------

current: Heartbeat | None = None


def open_listener() -> socket.socket:
    """Open a listening socket on any free port of all addresses of this machine."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):  # compiled in, but switched off
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", 0), backlog=1024)


def start(rank: int, names: list[str], token: str, *, speaks: bool, listener: socket.socket | None, port: int) -> str | None:
    """Watch over the other nodes from now on. Returns why not, if the first process does not answer on that port."""
    global current
    address = None if listener else (os.environ["MASTER_ADDR"], port)
    try:
        current = Heartbeat(rank, names, time_limit(), token, speaks=speaks, listener=listener, address=address)
    except OSError as error:
        return f"{address[0]}:{port} does not answer ({error})" if address else str(error)
    return None


def stop() -> None:
    """Say good-bye: the run has come to its end."""
    global current
    if current:
        current.stop()
        current = None


def failed(code: int, text: str, patience: float = 0.0) -> None:
    """Tell that this process is about to end with an exit code.

    patience: seconds in which the loss or the failure of another one can still show; that is the true cause then, and ends
    this process too.
    """
    global current
    if current:
        ends = time.monotonic() + patience
        while time.monotonic() < ends:
            if current.hurry() or current.stopped.wait(0.1):
                time.sleep(2)  # it is ending the process
        current.failed(code, text)
        current = None
