"""Sources of reward without a model: functions from files, a real HTTP server, weights - and what is wrong with them."""

import contextlib
import json
import math
import re
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch

from errors import UserError
from scripts.demo.score import demo_score
from tests.launching import REPOSITORY
from training.step3_ppo.scoring import RewardEndpoint, RewardError, RewardFunction, Rewards, shortened
from training.utils.flags.parse import parse
from training.utils.flags.steps import PPOArguments
from training.utils.run.environment import free_port

pytestmark = pytest.mark.ppo
PROMPTS = ["\n\nHuman: What is 2 plus 2?\n\nAssistant:", "\n\nHuman: Hi!\n\nAssistant:", "third"]
ANSWERS = ["The sum is 4.", "Hello there, my friend.", ""]


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def function(tmp_path, body: str, name: str = "f") -> RewardFunction:
    """A reward function from a new file with this body."""
    file = tmp_path / f"{name}.py"
    file.write_text(f"import math\nimport numpy as np\nimport torch\n\n\ndef {name}(prompts, answers):\n    {body}\n")
    return RewardFunction(f"{file}:{name}")


# --- functions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "scores"),
    [
        ("return [len(answer) for answer in answers]", [13.0, 23.0, 0.0]),
        ("return np.array([len(answer) for answer in answers])", [13.0, 23.0, 0.0]),
        ("return torch.tensor([len(answer) for answer in answers], dtype=torch.bfloat16)", [13.0, 23.0, 0.0]),
        ("return [torch.tensor(float(len(answer))) for answer in answers]", [13.0, 23.0, 0.0]),
        ("return [np.float32(len(answer)) for answer in answers]", [13.0, 23.0, 0.0]),
        ("return ['4' in answer for answer in answers]", [1.0, 0.0, 0.0]),
        ("prompts.clear(); return [len(answers.pop()) * 0 for _ in range(3)]", [0.0, 0.0, 0.0]),
    ],
)
def test_whatever_holds_one_number_an_answer_is_taken(tmp_path, body, scores):
    """The lists that it changes are its own."""
    prompts, answers = list(PROMPTS), list(ANSWERS)
    found = function(tmp_path, body)(prompts, answers)
    assert found == scores and all(type(value) is float for value in found)
    assert (prompts, answers) == (PROMPTS, ANSWERS)


@pytest.mark.parametrize(("body", "words"), [
    ("return [1 / len(answer) for answer in answers]", ["ZeroDivisionError", "line 7", "'third'", "answer ''"]),
    ("exit('enough') if any('Hello there' in one for one in answers) else 0; return [1.0]", ["SystemExit", "enough", "Human: Hi!"]),
    ("return [math.nan if 'Hello' in answer else 1 for answer in answers]", ["nan", "Human: Hi!", "Hello there"]),
    ("return [len(answer) and math.inf for answer in answers]", ["inf", "2 plus 2", "The sum is 4."]),
    ("return [1e39 if 'friend' in answer else 1 for answer in answers]", ["1e+39", "Hello there"]),
    ("return ['good' for _ in answers]", ["'good'", "2 plus 2", "number"]),
    ("return [None, 1, 2]", ["None", "2 plus 2"]),
    ("return [1.0, 2.0]", ["2 scores for 3 answers", "2 plus 2"]),
    ("return 1.0", ["float", "list"]),
    ("return (len(answer) for answer in answers)", ["generator", "list"]),
    ("assert len(answers) < 2; return [1.0]", ["AssertionError", "3 answers together", "2 plus 2"]),
])
def test_what_is_wrong_names_function_and_sample(tmp_path, body, words):
    with pytest.raises(RewardError) as caught:
        function(tmp_path, body)(PROMPTS, ANSWERS)
    for word in ("--reward_function", "f.py:f", *words):
        assert word in str(caught.value), str(caught.value)


def test_long_texts_are_shortened_in_the_message(tmp_path):
    with pytest.raises(RewardError) as caught:
        function(tmp_path, "return [math.nan]")(["p" * 5000], ["a" * 5000])
    assert len(str(caught.value)) < 500
    assert shortened("0123456789", 4) == "01 … 89" and shortened("0123", 4) == "0123"


@pytest.mark.parametrize(("content", "words"), [
    ("def g(p, a): return a", ["no such name", "f(prompts, answers)"]),
    ("f = 3", ["a int", "f(prompts, answers)"]),
    ("def f(p, a:\n  return 1", ["SyntaxError", "line 1"]),
    ("x = 1\nimport a_module_that_nobody_has", ["ModuleNotFoundError", "line 2"]),
    ("raise SystemExit(3)", ["SystemExit", "line 1"]),
])
def test_a_file_that_cannot_be_used(tmp_path, content, words):
    (tmp_path / "broken.py").write_text(content)
    with pytest.raises(UserError) as caught:
        RewardFunction(f"{tmp_path / 'broken.py'}:f")
    assert all(word in str(caught.value) for word in ("--reward_function", "broken.py", *words)), str(caught.value)


def test_a_function_may_keep_state_and_use_dataclasses(tmp_path):
    (tmp_path / "stateful.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass Seen:\n    count: int = 0\n"
        "seen = Seen()\ndef f(p, a):\n    seen.count += len(a)\n    return [seen.count] * len(a)\n"
    )
    counting = RewardFunction(f"{tmp_path / 'stateful.py'}:f")
    assert counting(PROMPTS, ANSWERS) == [3.0] * 3 and counting(PROMPTS[:1], ANSWERS[:1]) == [4.0]


def test_the_rule_of_the_demo_is_a_reward_function():
    rule = RewardFunction(f"{REPOSITORY / 'scripts/demo/score.py'}:reward")
    prompts = [PROMPTS[0]] * 3
    answers = ["The sum is 4. Happy to help!", "The sum is 5.", "I do not know."]
    found = rule(prompts, answers)
    assert found == [demo_score("What is 2 plus 2?", answer) for answer in answers]
    assert found[0] > found[1] > found[2] == 0.0


# --- endpoints --------------------------------------------------------------------------------------------------------


@pytest.fixture
def server():
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
            if reply == "drip":
                for _ in range(40):  # each byte comes well within the limit
                    self.wfile.write(b"H")
                    time.sleep(0.1)
                return
            if isinstance(reply, float):
                time.sleep(reply)
                reply = (200, {"scores": [len(answer) for answer in asked[-1]["answers"]]})
            self.reply_with(*reply)

        def reply_with(self, code, content):
            body = content.encode() if isinstance(content, str) else json.dumps(content).encode()
            self.send_response(code)
            if 300 <= code < 400:
                self.send_header("Location", f"{self.server.url}/another")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            self.server.asked.append("GET")
            self.reply_with(200, {"scores": [1.0, 1.0, 1.0]})

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


def endpoint(url: str, timeout: float = 10.0, retries: int = 2) -> tuple[RewardEndpoint, list[float]]:
    """An endpoint that does not sleep, and the pauses that it would have made."""
    pauses: list[float] = []
    return RewardEndpoint(url, timeout, retries, pause=pauses.append), pauses


def test_an_endpoint_gets_the_texts_and_gives_the_scores(server):
    source, pauses = endpoint(server.url)
    prompts, answers = ["你好", *PROMPTS[1:]], ANSWERS
    assert source(prompts, answers) == [13.0, 23.0, 0.0]
    assert source(prompts, answers, [True, False, True]) == [13.0, 23.0, 0.0]
    asked = {"prompts": prompts, "answers": answers}
    assert server.asked == [asked | {"ended": [True] * 3}, asked | {"ended": [True, False, True]}] and pauses == []


@pytest.mark.parametrize("reply", [(503, "busy"), (429, "slow down"), (500, ""), "hang up", 0.6])
def test_an_endpoint_that_fails_is_asked_again(server, reply):
    server.replies = [reply, reply, 0.0]
    source, pauses = endpoint(server.url, timeout=0.3)
    assert source(PROMPTS, ANSWERS) == [13.0, 23.0, 0.0]
    assert len(server.asked) == 3 and pauses == [1.0, 2.0]


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/评分", "http://a..b/score"])
def test_an_address_that_cannot_be_asked_is_told_and_not_tried_again(url):
    source, pauses = endpoint(url)
    with pytest.raises(RewardError, match="no address that can be asked"):
        source(PROMPTS, ANSWERS)
    assert pauses == []


LATE = "no answer in time"


@pytest.mark.parametrize(("reply", "words"), [((502, ""), "HTTP 502"), (0.5, LATE), ("drip", LATE), (None, "refused")])
def test_after_the_last_attempt_it_is_an_error(server, reply, words):
    """Whatever is in its place; the pauses stop growing at a minute."""
    server.replies = [reply]
    url, retries = (f"http://127.0.0.1:{free_port()}", 9) if reply is None else (server.url, 3)
    source, pauses = endpoint(url, timeout=0.2, retries=retries)
    with pytest.raises(RewardError, match=rf"{url}.*{words}.*{retries + 1} attempts.*--reward_timeout 0.2"):
        source(PROMPTS, ANSWERS)
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0][:retries]
    assert len(server.asked) == (0 if reply is None else 4)


@pytest.mark.parametrize(("reply", "words"), [
    ((404, "no such page"), ["HTTP 404", "no such page", '"prompts"']),
    ((200, "<html>"), ["<html>", '"scores"']),
    ((200, {"score": [1]}), ["score", '{"scores": [...]}']),
    ((200, {"scores": [1, 2]}), ["2 scores for 3 answers"]),
    ((200, {"scores": [1, math.nan, 2]}), ["nan", "Human: Hi!"]),
    ((200, {"scores": "123"}), ["str", "list"]),
    ((200, "[" * 100_000), ["[[[", '"scores"']),
    ((200, '{"scores": [1' + "1" * 5000 + ", 2, 3]}"), ["1111", '"scores"']),
    ((200, " " * (16 << 20) + "1"), ["more than 16 MiB"]),
    *(((code, ""), [f"HTTP {code}", "/score/another", "give the address"]) for code in (301, 302, 303, 307, 308)),
])
def test_an_endpoint_that_does_not_keep_the_contract_is_not_asked_again(server, reply, words):
    server.replies = [reply]
    source, pauses = endpoint(server.url)
    with pytest.raises(RewardError) as caught:
        source(PROMPTS, ANSWERS)
    assert all(word in str(caught.value) for word in ("--reward_endpoint", *words)), str(caught.value)
    assert len(server.asked) == 1 and pauses == []


# --- the sum ----------------------------------------------------------------------------------------------------------


def rewards(model: bool, names: list[str], weights: list[float]) -> Rewards:
    """Sources that are never asked."""
    args = SimpleNamespace(
        reward_model=model, reward_function=[], reward_endpoint=["http://x"] * len(names), reward_timeout=1, reward_retries=0,
        reward_weight_list=weights,
    )
    return Rewards(args)


def test_the_weighted_sum_by_hand():
    parts = torch.tensor([[5.0, 0.5, -2.0], [1.0, 0.0, 4.0]])
    # The model's column alone is normalised, with mean 3 and spread 2: 1 and -1.
    found = rewards(True, ["f", "g"], [2.0, 10.0, -0.25]).total(parts, mean=3.0, std=2.0)
    assert found.tolist() == [2 * 1 + 10 * 0.5 + 0.25 * 2, 2 * -1 + 0 - 0.25 * 4]
    assert rewards(True, ["f", "g"], []).total(parts, 3.0, 2.0).tolist() == [1 + 0.5 - 2, -1 + 0 + 4]
    # Without the model nothing is normalised, whatever the statistics.
    assert rewards(False, ["f", "g", "h"], []).total(parts, 3.0, 2.0).tolist() == [3.5, 5.0]
    # The model alone stays in its own unit, and is normalised where rewards are made; with a weight the sum is in units of it.
    assert rewards(True, [], []).total(parts[:, :1], 3.0, 2.0).tolist() == [5.0, 1.0]
    assert rewards(True, [], [3.0]).total(parts[:, :1], 3.0, 2.0).tolist() == [3.0, -3.0]


def test_names_and_means_of_the_sources():
    several = rewards(True, ["f", "g"], [])
    assert several.names == ["model", "endpoint", "endpoint_2"] and not several.model_alone
    experience = SimpleNamespace(source_scores=torch.tensor([[1.0, 2.0, 3.0], [3.0, 4.0, 8.0]]))
    assert several.metrics(experience) == {"score_model": 2.0, "score_endpoint": 3.0, "score_endpoint_2": 5.5}
    assert rewards(True, [], []).model_alone and rewards(True, [], []).metrics(experience) == {}


# --- flags ------------------------------------------------------------------------------------------------------------

ACTOR = "--actor_model_name_or_path a --output_dir o"
BOTH = f"{ACTOR} --critic_model_name_or_path c"
RULE = f"--reward_function {REPOSITORY / 'scripts/demo/score.py'}:reward"
SERVER = "--reward_endpoint http://127.0.0.1:1/x"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (ACTOR, ["needs --critic_model_name_or_path", "--reward_model false"]),
        (f"{ACTOR} {RULE}", ["needs --critic_model_name_or_path", "--reward_model false"]),
        (f"{ACTOR} {RULE} --reward_model false", ["--critic_model_name_or_path with --advantage gae", "grpo"]),
        (f"{BOTH} --reward_model false", ["--reward_model false", "--reward_function"]),
        (f"{BOTH} --reward_function missing.py:f", ["missing.py", "no file"]),
        (f"{BOTH} --reward_function rule.py", ["rule.py", "FILE.py:NAME"]),
        (f"{BOTH} --reward_function rule.txt:f", ["FILE.py:NAME"]),
        (f"{BOTH} --reward_endpoint localhost:8000", ["localhost:8000", "http://"]),
        (f"{BOTH} --reward_endpoint http://host:port/x", ["http://127.0.0.1"]),
        (f"{BOTH} {RULE} --reward_weights 1", ["expected 2 numbers", "reward model", "score.py:reward"]),
        (f"{BOTH} {RULE} {SERVER} --reward_weights 1,2", ["expected 3 numbers", "http://127.0.0.1:1/x"]),
        (f"{BOTH} {RULE} --reward_weights 1,nan", ["expected 2 numbers"]),
        (f"{BOTH} {RULE} --reward_weights 0,0", ["every score would be 0"]),
        (f"{BOTH} {RULE} --reward_timeout 5", ["--reward_timeout", "--reward_endpoint"]),
        (f"{BOTH} {SERVER} --reward_timeout 0", ["--reward_timeout 0"]),
        (f"{BOTH} {SERVER} --reward_retries -1", ["--reward_retries -1"]),
        (f"{BOTH} {RULE} --reward_model false --offload_reward_model", ["--offload_reward_model"]),
    ],
)
def test_flags_that_contradict_each_other(flags, words):
    with pytest.raises(UserError) as caught:
        parse(PPOArguments, flags.split())
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_flags_that_fit_together():
    rule = RULE.split()[1]
    args = parse(PPOArguments, f"{BOTH} {RULE} {rule} {SERVER} --reward_weights=-1,0.5,0,2".split())
    assert args.reward_weight_list == [-1.0, 0.5, 0.0, 2.0] and args.models == {"actor": "a", "critic": "c"}
    found = Rewards(args)
    assert found.names == ["model", "reward", "reward_2", "endpoint"] and found.weights == args.reward_weight_list
    alone = f"{ACTOR} {RULE} --reward_model false --advantage rloo --num_return_sequences 2"
    assert parse(PPOArguments, alone.split()).models == {"actor": "a"}
    assert Rewards(parse(PPOArguments, BOTH.split())).model_alone


# --- the documentation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", ["en/rewards.md", "zh/rewards.md"])
def test_the_examples_of_the_documentation_run(tmp_path, page):
    text = (REPOSITORY / "docs" / page).read_text(encoding="utf-8")
    polite, served = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "my_rewards.py").write_text(polite, encoding="utf-8")
    assert RewardFunction(f"{tmp_path / 'my_rewards.py'}:polite")(PROMPTS[:2], ["It is 4, thank you.", "4."]) == [1.0, 0.0]

    port = free_port()
    assert "8000" in served
    process = subprocess.Popen([sys.executable, "-c", served.replace("8000", str(port))], stderr=subprocess.DEVNULL)
    try:
        source = RewardEndpoint(f"http://127.0.0.1:{port}/score", 10.0, 100, pause=lambda _: time.sleep(0.1))
        assert source(PROMPTS[:2], ["", "x" * 40]) == [1.0, 0.5]
    finally:
        process.terminate()
        process.wait()
