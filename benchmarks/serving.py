"""Compare the server with one question at a time, and with transformers serve, on the same folder and the same questions.

    OMP_NUM_THREADS=1 python -m benchmarks.serving --path output/demo/ppo/actor
    OMP_NUM_THREADS=1 python -m benchmarks.serving --path output/demo/ppo/actor --seconds 120 --requests 5000

All servers run at once, and idle but for the one that is asked: slices of time go round, so that what else the machine does
falls on all of them. Answers are greedy. CPU seconds are those of the server's process; the clients have their own. 32 questions
go round, so that sanbu has read each before; sanbu-cold keeps nothing of what it read (--prompt_cache 0).
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import count

import psutil

from benchmarks.runs import print_table
from training.utils.run.environment import free_port

PLACES = ("France", "Japan", "Italy", "Spain", "Kenya", "Peru", "China", "Egypt")
ASKED = ("What is the capital of {}?", "Tell me about {}.", "Which food is {} known for?", "Say hello to people from {}.")
QUESTIONS = [words.format(place) for words in ASKED for place in PLACES]


@dataclass
class Server:
    """A server that runs. counts, walls, cpus: of each number of clients; firsts: seconds to the first token."""

    name: str
    port: int
    process: psutil.Process
    model: str
    counts: dict[int, int] = field(default_factory=dict)
    walls: dict[int, float] = field(default_factory=dict)
    cpus: dict[int, float] = field(default_factory=dict)
    firsts: dict[int, list[float]] = field(default_factory=dict)
    said: dict[str, set[str]] = field(default_factory=dict)

    def cpu(self) -> float:
        """Return the CPU seconds of the process and its children so far."""
        times = [one.cpu_times() for one in (self.process, *self.process.children(recursive=True))]
        return sum(time.user + time.system for time in times)

    def resident(self) -> float:
        """Return the resident memory in MiB."""
        return self.process.memory_info().rss / 2**20


@contextmanager
def running(name: str, command: list[str], port: int, model: str, log: str) -> Iterator[Server]:
    """Start a server and wait until it answers."""
    with open(log, "w") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:  # noqa: PTH123
        server = Server(name, port, psutil.Process(process.pid), model)
        try:
            for attempt in count():
                try:
                    ask(server, QUESTIONS[0])
                    break
                except (OSError, http.client.HTTPException):
                    if process.poll() is not None or attempt == 240:
                        raise
                    time.sleep(0.5)
            yield server
        finally:
            process.terminate()


def ask(server: Server, question: str, stream: bool = False) -> tuple[str, float]:
    """Return the answer to a question, and of a stream the seconds to its first text."""
    body = {
        "model": server.model, "messages": [{"role": "user", "content": question}], "max_tokens": 48, "temperature": 0,
        "stream": stream,
    }  # fmt: skip
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=300)
    begin = time.monotonic()
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(f"{server.name}: HTTP {response.status} {response.read()[:300]!r}")
    first, text = 0.0, ""
    if stream:
        for line in response:
            if line.startswith(b"data: {"):
                choices = json.loads(line[6:])["choices"]
                text += (choices and choices[0]["delta"].get("content")) or ""
                first = first or (time.monotonic() - begin if text else 0.0)
    else:
        text = json.loads(response.read())["choices"][0]["message"]["content"]
    connection.close()
    return text, first


def load(server: Server, clients: int, seconds: float, most: int | None = None, stream: bool = False) -> None:
    """Let so many clients ask one question after another, for a time or for a number of questions; add up what came."""
    numbers, end, lock, errors = count(), time.monotonic() + seconds, threading.Lock(), []

    def client() -> None:
        try:
            while time.monotonic() < end:
                number = next(numbers)
                if most is not None and number >= most:
                    break
                question = QUESTIONS[number % len(QUESTIONS)]
                text, first = ask(server, question, stream)
                with lock:
                    server.said.setdefault(question, set()).add(text)
                    if stream:
                        server.firsts.setdefault(clients, []).append(first)
                    else:
                        server.counts[clients] = server.counts.get(clients, 0) + 1
        except Exception as error:  # told by the caller, in whose thread it is raised
            errors.append(error)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    wall, cpu = time.monotonic(), server.cpu()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    if not stream:
        server.walls[clients] = server.walls.get(clients, 0.0) + time.monotonic() - wall
        server.cpus[clients] = server.cpus.get(clients, 0.0) + server.cpu() - cpu


def servers(stack: ExitStack, args: argparse.Namespace) -> list[Server]:
    """Start all servers."""
    started = []
    for name in args.servers:
        port = free_port()
        if name in ("sanbu", "sanbu-cold"):
            command = [sys.executable, "-m", "inference.server", "--path", args.path, "--port", str(port), "--name", "model"]
            command += ["--prompt_cache", "0"] if name == "sanbu-cold" else []
        else:
            command = [sys.executable, "-m", "transformers.cli.transformers", "serve", args.path, "--port", str(port)]
            command += ["--device", args.device]
            if name == "transformers-cb":  # without the share its cache takes most of the free memory, on a CPU, too
                command += ["--continuous-batching", "--cb-max-memory-percent", str(args.cb_memory)]
        model = "model" if name.startswith("sanbu") else args.path
        started.append(stack.enter_context(running(name, command, port, model, f"{args.log}-{name}.log")))
    return started


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", required=True, help="folder of a model")
    parser.add_argument("--servers", nargs="+", default=["sanbu", "sanbu-cold", "transformers", "transformers-cb"])
    parser.add_argument("--seconds", type=float, default=20, help="a server; for a lone client and streams a quarter")
    parser.add_argument("--rounds", type=int, default=4, help="slices that this time is cut into")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--requests", type=int, default=0, help="also ask our server so many questions and watch its memory")
    parser.add_argument("--device", default="cpu", help="for transformers serve; ours takes what there is")
    parser.add_argument("--cb-memory", type=float, default=0.1, help="share of the memory that transformers-cb may take")
    parser.add_argument("--log", default="serving", help="beginning of the names of the servers' logs")
    args = parser.parse_args()
    with ExitStack() as stack:
        started = servers(stack, args)
        for server in started:  # warm, and each question's answer to a lone client
            for question in QUESTIONS:
                server.said[question] = {ask(server, question)[0]}
        for _ in range(args.rounds):
            for clients in args.clients:
                for server in started:
                    load(server, clients, args.seconds / args.rounds / (4 if clients == 1 else 1))
            for clients in (1, 4):
                for server in started:
                    load(server, clients, args.seconds / args.rounds / 4, stream=True)
        print_results(started, args)
        if args.requests:
            watch_memory(next(server for server in started if server.name == "sanbu"), args.requests)


def print_results(started: list[Server], args: argparse.Namespace) -> None:
    """Print answers per second and per CPU second, first tokens, and whether answers were the lone client's."""
    rows = []
    for server in started:
        differing = sum(len(texts) > 1 for texts in server.said.values())
        for clients in args.clients:
            number = server.counts.get(clients, 0)
            speed, work = number / server.walls[clients], number / max(server.cpus[clients], 1e-9)
            rows.append([server.name, clients, number, f"{speed:.1f}", f"{work:.1f}", differing])
    print_table(["server", "clients", "answers", "answers/s", "answers/CPU s", "questions with several answers"], rows)
    rows = []
    for server in started:
        lone, four = (1000 * statistics.median(server.firsts[clients]) for clients in (1, 4))
        rows.append([server.name, f"{lone:.0f}", f"{four:.0f}", f"{four / lone:.2f}", f"{server.resident():.0f}"])
    print_table(["server", "first token of a lone client, ms", "of 4 clients, ms", "ratio", "resident MiB"], rows)


def watch_memory(server: Server, requests: int) -> None:
    """Print the resident memory in the course of many questions."""

    def rows() -> Iterator[list[object]]:
        for _ in range(10):
            load(server, 16, 3600, most=requests // 10)
            yield [sum(server.counts.values()), f"{server.resident():.0f}"]

    print_table(["questions so far", "resident MiB"], rows())


if __name__ == "__main__":
    main()
