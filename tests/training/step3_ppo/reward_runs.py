"""Models, prompts and reward functions of the tests of rewards, and the flags of a short run with them."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.launching import write_pairs
from tests.training.step3_ppo.small_ppo import write_models

FUNCTIONS = '''
import os
from pathlib import Path

CALLS = Path(__file__).with_name("calls.txt")


def length(prompts, answers):
    return [len(answer) / 10 for answer in answers]


def question(prompts, answers):
    return [int("1" in prompt) - len(prompt) / 100 for prompt in prompts]


def letters(prompts, answers):
    """The share of letters."""
    return [sum(map(str.isalpha, answer)) / max(len(answer), 1) for answer in answers]


def counted(prompts, answers):
    """As length; every call leaves a line. From the call on that FAIL_AT names it fails on the last answer."""
    with CALLS.open("a") as file:
        print(len(answers), file=file)
    calls = len(CALLS.read_text().splitlines())
    wrong = "FAIL_AT" in os.environ and calls >= int(os.environ["FAIL_AT"])
    return length(prompts, answers)[:-1] + [float("nan") if wrong else len(answers[-1]) / 10]


def second(prompts, answers):
    """Fails on the second process alone."""
    if os.environ["RANK"] == "1":
        raise ValueError("only here")
    return length(prompts, answers)
'''


def write_all(folder: Path) -> dict[str, Path]:
    """An SFT model, a reward model with statistics, prompts and the file of functions."""
    base, reward = write_models(folder)
    (folder / "f.py").write_text(FUNCTIONS)
    data = write_pairs(folder / "pairs.jsonl", 90)
    return {"base": base, "reward": reward, "data": data, "f": folder / "f.py"}


def flags(folders, output, *more: str, critic: str | None = "reward", processes: int = 1) -> list[str]:
    """A run of three rollouts with 8 prompts each and 6 held-out prompts."""
    models = ["--actor_model_name_or_path", str(folders["base"])]
    models += ["--critic_model_name_or_path", str(folders[critic])] if critic else []
    return [
        *models, "--data_path", str(folders["data"]), "--data_split", "0,0,1", "--output_dir", str(output), "--dtype", "fp32",
        "--max_prompt_seq_len", "48", "--max_answer_seq_len", "8", "--num_warmup_steps", "0", "--seed", "7",
        "--per_device_generation_batch_size", str(8 // processes), "--per_device_training_batch_size", str(8 // processes),
        "--actor_learning_rate", "1e-3", "--critic_learning_rate", "1e-3", "--max_steps", "3", "--eval_prompts", "6",
        "--eval_fraction", "0.2", "--eval_interval", "1", "--save_steps", "0", *more,
    ]  # fmt: skip


def by_function(folders, *names: str, model: bool = False) -> list[str]:
    found = ["--reward_function", *(f"{folders['f']}:{name}" for name in names)]
    return found if model else [*found, "--reward_model", "false"]


@contextlib.contextmanager
def score_server():
    """A real server on a port of its own, which scores an answer with its number of characters.

    replies: what it does to each request in turn, the last one for ever: seconds to wait before it scores, "hang up", or
    (HTTP status, content). asked: the requests.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked, replies = self.server.asked, self.server.replies
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            reply = replies[min(len(asked), len(replies)) - 1]
            if reply == "hang up":
                self.connection.close()
                return
            if isinstance(reply, float):
                time.sleep(reply)
                reply = (200, {"scores": [len(answer) for answer in asked[-1]["answers"]]})
            code, content = reply
            body = content.encode() if isinstance(content, str) else json.dumps(content).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def handle(self):
            with contextlib.suppress(OSError):  # who asked did not wait
                super().handle()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.replies = [], [0.0]
    server.url = f"http://127.0.0.1:{server.server_port}/score"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
