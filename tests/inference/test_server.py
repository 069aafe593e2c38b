"""The server over HTTP: what OpenAI's own client gets, what leaves its place, how it ends, what it refuses."""

import contextlib
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request

import pytest
import torch

pytest.importorskip("fastapi", reason="the packages of requirements-serve.txt are not installed")
openai = pytest.importorskip("openai", reason="the openai client is not installed: pip install -r requirements-test.txt")

from errors import UserError  # noqa: E402
from inference.chatbot import Sampling, load_chatbot  # noqa: E402
from inference.served import ServedModel, open_model  # noqa: E402
from inference.server.__main__ import main, parse  # noqa: E402
from inference.server.app import build_app  # noqa: E402
from inference.server.limits import knows, read_keys  # noqa: E402
from inference.server.service import Limits, Service  # noqa: E402
from inference.server.start import background  # noqa: E402
from models.adapters.lora import add_lora, save_adapter  # noqa: E402
from models.heads import TokenScores, at_last_token  # noqa: E402
from models.load import load_causal_lm, load_scalar_model  # noqa: E402
from models.save import save_model  # noqa: E402
from models.templates import load_template  # noqa: E402
from models.tokenizer import load_tokenizer  # noqa: E402
from tests.http import post, raw  # noqa: E402
from tests.launching import FORKS, _run, environment  # noqa: E402
from tests.tiny import TEXT, tiny_checkpoint  # noqa: E402
from training.step3_ppo.scoring import RewardEndpoint  # noqa: E402

ASK = [{"role": "user", "content": "How do I bake bread?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("server") / "tiny", "llama")


@pytest.fixture(scope="module")
def adapter(folder):
    model = add_lora(load_causal_lm(folder, dtype=torch.float32), 4, 8.0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    save_adapter(model, folder.parent / "law")
    return str(folder.parent / "law")


@pytest.fixture(scope="module")
def served(folder, adapter) -> ServedModel:
    return open_model(str(folder), adapters={"law": adapter})


@pytest.fixture(scope="module")
def url(served):
    with background(build_app(Service(served, Limits(max_new_tokens=64)))) as address:
        yield address


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as one:
        yield one


@contextlib.contextmanager
def serving(served, keys=(), **limits):
    """A server of its own, its client, and the service behind it."""
    service = Service(served, Limits(**limits))
    with contextlib.ExitStack() as stack:
        address = stack.enter_context(background(build_app(service, keys)))
        yield address, stack.enter_context(openai.OpenAI(base_url=f"{address}/v1", api_key="right", max_retries=0)), service


def chatbot_says(path, question: str, **sampling) -> str:
    return load_chatbot(str(path), Sampling(**sampling)).answer(question)


# --- OpenAI's client --------------------------------------------------------------------------------------------------


def test_chat_says_what_chat_py_says(client, folder, adapter):
    """The same answer as in the terminal, greedy or sampled by a seed; n answers have seeds of their own; adapters by name."""
    settings = {"messages": ASK, "model": "tiny", "max_tokens": 12}
    greedy = client.chat.completions.create(**settings, temperature=0)
    assert greedy.choices[0].message.content == chatbot_says(folder, ASK[0]["content"], greedy=True, max_new_tokens=12)
    assert greedy.usage.completion_tokens == 12 and greedy.choices[0].finish_reason == "length"
    sampled = client.chat.completions.create(**settings, temperature=0.7, top_p=0.9, seed=5, n=3)
    for number, choice in enumerate(sampled.choices):
        assert choice.index == number
        said = chatbot_says(folder, ASK[0]["content"], seed=5 + number, top_p=0.9, max_new_tokens=12)
        assert choice.message.content == said
    law = client.chat.completions.create(**settings | {"model": "law"}, temperature=0)
    assert law.choices[0].message.content == chatbot_says(adapter, ASK[0]["content"], greedy=True, max_new_tokens=12)
    assert law.choices[0].message.content != greedy.choices[0].message.content
    assert [one.id for one in client.models.list()] == ["tiny", "law"]
    assert client.models.retrieve("law").parent == "tiny"


def test_a_stream_gives_the_same_text_in_pieces(client):
    settings = {"messages": ASK, "model": "tiny", "max_tokens": 30, "temperature": 1.3, "seed": 9, "n": 2, "logprobs": True}
    whole = client.chat.completions.create(**settings, top_logprobs=2)
    texts, rows, ends, pieces, usage = ["", ""], [[], []], ["", ""], 0, None
    for chunk in client.chat.completions.create(**settings, top_logprobs=2, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            rows[choice.index] += choice.logprobs.content if choice.logprobs else []
            ends[choice.index] = choice.finish_reason or ends[choice.index]
            pieces += 1
    assert texts == [choice.message.content for choice in whole.choices]
    assert rows == [choice.logprobs.content for choice in whole.choices]
    assert ends == [choice.finish_reason for choice in whole.choices] and usage == whole.usage
    assert pieces > 10


def test_a_stop_text_ends_the_answer_and_is_not_shown(client):
    settings = {"messages": ASK, "model": "tiny", "max_tokens": 60, "temperature": 0}
    whole = client.chat.completions.create(**settings).choices[0].message.content
    stop = whole[9:13]
    expected = whole[: whole.index(stop)]
    cut = client.chat.completions.create(**settings, stop=["never said", stop]).choices[0]
    assert (cut.message.content, cut.finish_reason) == (expected, "stop")
    pieces = client.chat.completions.create(**settings, stop=stop, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in pieces) == expected


def test_completions_continue_text_or_tokens(client, served):
    first = client.completions.create(model="tiny", prompt="The capital", max_tokens=8, temperature=0, logprobs=3)
    ids = served.tokenizer("The capital")["input_ids"]
    with torch.no_grad():
        made = served.model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :]
    assert first.choices[0].text == served.tokenizer.decode(made)
    assert "".join(first.choices[0].logprobs.tokens) == first.choices[0].text
    both = client.completions.create(model="tiny", prompt=[ids, ids[:2]], max_tokens=8, temperature=0, n=2)
    assert [choice.text for choice in both.choices[:2]] == [first.choices[0].text] * 2
    assert len(both.choices) == 4 and both.usage.prompt_tokens == len(ids) + 2


def test_many_clients_get_what_each_gets_alone(client):
    """24 at once, greedy and sampled, streamed and not, with two models."""

    def ask(number: int) -> str:
        text = TEXT[number % len(TEXT)][: 10 + 3 * number]
        settings = {
            "messages": [{"role": "user", "content": text}], "model": ("tiny", "law")[number % 2], "seed": number,
            "max_tokens": 5 + 7 * (number % 4), "temperature": 0 if number % 3 else 0.8,
        }  # fmt: skip
        if number % 4 == 0:
            pieces = client.chat.completions.create(**settings, stream=True)
            return "".join(piece.choices[0].delta.content or "" for piece in pieces)
        return client.chat.completions.create(**settings).choices[0].message.content

    together: dict[int, str] = {}
    threads = [threading.Thread(target=lambda number=number: together.update({number: ask(number)})) for number in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == {number: ask(number) for number in range(24)}


def test_a_long_dialogue_loses_its_oldest_turns_and_a_long_question_is_refused(client, served):
    turns = [{"role": role, "content": f"{number} " + "bread " * 8} for number in range(20) for role in ("user", "assistant")]
    system = {"role": "system", "content": "Be brief."}
    answer = client.chat.completions.create(model="tiny", messages=[system, *turns, *ASK], max_tokens=16, temperature=0)
    assert answer.usage.prompt_tokens <= 256 - 16

    def tokens(messages):
        return served.template.encode_prompt(served.tokenizer, messages)

    kept = next(first for first in range(0, 42, 2) if len(tokens([system, *turns[first:], *ASK])) <= 256 - 16)
    assert 0 < kept < 40
    assert answer.usage.prompt_tokens == len(tokens([system, *turns[kept:], *ASK]))
    shorter = client.chat.completions.create(model="tiny", messages=[system, *turns[kept:], *ASK], max_tokens=16, temperature=0)
    assert shorter.choices[0].message.content == answer.choices[0].message.content
    with pytest.raises(openai.BadRequestError, match="the 256 that the model reads") as caught:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "bread " * 400}])
    assert caught.value.code == "context_length_exceeded"


# --- tools ------------------------------------------------------------------------------------------------------------

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {}}}}}
WITH_TOOLS = (
    "{% if tools %}tools: {{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% for c in m.tool_calls or [] %}<tool_call>\n{{ c.function | tojson }}\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_tools_are_called_where_the_template_has_them(tmp_path, client, monkeypatch):
    path = tiny_checkpoint(tmp_path / "qwen", "qwen2", max_position_embeddings=1024)
    tokenizer = load_tokenizer(path)
    tokenizer.chat_template = WITH_TOOLS
    tokenizer.save_pretrained(path)
    served = open_model(str(path))
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
    with serving(served) as (_, one, _service):
        said = {"text": f"Let me look. {call}"}
        monkeypatch.setattr("inference.server.prompts.AnswerText.whole", lambda self, tokens: said["text"])
        settings = {"model": "qwen", "messages": ASK, "tools": [TOOL], "max_tokens": 4}
        choice = one.chat.completions.create(**settings).choices[0]
        assert choice.finish_reason == "tool_calls" and choice.message.content == "Let me look."
        made = choice.message.tool_calls[0]
        assert (made.function.name, json.loads(made.function.arguments)) == ("weather", {"city": "Paris"})
        pieces = [piece.choices[0] for piece in one.chat.completions.create(**settings, stream=True)]
        calls = [piece.delta.tool_calls[0] for piece in pieces if piece.delta.tool_calls]
        assert [calls[0].function.name, calls[0].function.arguments] == [made.function.name, made.function.arguments]
        assert pieces[-1].finish_reason == "tool_calls"
        result = {"role": "tool", "tool_call_id": made.id, "content": "sunny"}
        said["text"] = "It is sunny."
        second = one.chat.completions.create(**settings | {"messages": [*ASK, choice.message.model_dump(), result]})
        assert second.choices[0].finish_reason != "tool_calls" and second.choices[0].message.content == "It is sunny."
    with pytest.raises(openai.BadRequestError, match="know none"):
        client.chat.completions.create(model="tiny", messages=ASK, tools=[TOOL])


# --- places, keys, limits, the end ------------------------------------------------------------------------------------


def wait_until(true, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def slow(served, monkeypatch):
    """Each token takes 20 ms."""
    network = served.model.get_base_model()
    forward = network.lm_head.forward
    monkeypatch.setattr(network.lm_head, "forward", lambda hidden: time.sleep(0.02) or forward(hidden))


LONG = {"model": "tiny", "messages": ASK, "max_tokens": 200, "temperature": 1.5, "seed": 2}


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_frees_its_place(served, slow, stream):
    with serving(served) as (address, _, service):
        body = json.dumps(LONG | {"stream": stream}).encode()
        raw(address, post("/v1/chat/completions", body), wait=False)
        wait_until(lambda: service.worker.in_work == 0 and not service.in_work)
        assert service.metrics.answer_tokens._value.get() < 100


def test_a_full_queue_says_when_to_come_again(served, slow):
    with serving(served, max_batch=1, max_queue=1) as (_, one, service):
        first = one.chat.completions.create(**LONG, stream=True)
        next(iter(first))
        second = one.chat.completions.create(**LONG, stream=True)
        wait_until(lambda: service.worker.in_work == 1 and len(service.worker.waiting) == 1)
        with pytest.raises(openai.RateLimitError) as caught:
            one.chat.completions.create(**LONG)
        assert int(caught.value.response.headers["retry-after"]) >= 1
        first.close(), second.close()
        wait_until(lambda: not service.worker.in_work)
        assert one.chat.completions.create(**LONG | {"max_tokens": 2}).choices


def test_time_is_limited(served, slow):
    with serving(served, timeout=0.3) as (_, one, service):
        with pytest.raises(openai.InternalServerError, match=r"after 0\.3 s") as caught:
            one.chat.completions.create(**LONG)
        assert caught.value.status_code == 504
        with pytest.raises(openai.APIError, match=r"after 0\.3 s"):
            list(one.chat.completions.create(**LONG, stream=True))
        wait_until(lambda: not service.worker.in_work)


def test_keys(served, tmp_path, monkeypatch):
    file = tmp_path / "keys"
    file.write_text("# clients\nright\nother\n")
    keys = read_keys(str(file))
    assert keys == [b"right", b"other"]
    monkeypatch.setenv("SANBU_API_KEY", "right, second")
    assert read_keys(None) == [b"right", b"second"]
    assert knows(keys, b"bearer other") and not knows(keys, b"Bearer righ") and not knows(keys, b"Basic right")
    with serving(served, keys) as (address, one, _):
        assert one.models.list().data
        with pytest.raises(openai.AuthenticationError, match="the API key is wrong"):
            one.with_options(api_key="wrong").models.list()
        assert b"there is no API key" in raw(address, b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert raw(address, b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").startswith(b"HTTP/1.1 200")


def test_the_end_answers_what_is_in_work_and_refuses_the_rest(served, slow):
    with serving(served, max_batch=1) as (address, one, service):
        running = one.chat.completions.create(**LONG | {"max_tokens": 30}, stream=True)
        next(iter(running))
        waiting: list[Exception] = []

        def ask() -> None:
            try:
                one.chat.completions.create(**LONG)
            except openai.APIError as error:
                waiting.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        wait_until(lambda: service.worker.in_work == 1 and len(service.worker.waiting) == 1)
        service.end()
        thread.join()
        assert waiting[0].status_code == 503
        with pytest.raises(openai.InternalServerError, match="stopping"):
            one.chat.completions.create(**LONG)
        with pytest.raises(urllib.error.HTTPError, match="503"):
            urllib.request.urlopen(f"{address}/health")
        assert [piece for piece in running if piece.choices][-1].choices[0].finish_reason == "length"


def test_the_log_has_a_line_a_request_and_no_text_unless_asked(served, caplog):
    secret = "a secret about bread"
    for log_text in (False, True):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="sanbu"), serving(served, log_text=log_text) as (address, one, _):
            one.chat.completions.create(model="law", messages=[{"role": "user", "content": secret}], max_tokens=3, temperature=0)
            raw(address, post("/v1/%0aforged", b"{}"))
        lines = [record.getMessage() for record in caplog.records if record.name == "sanbu"]
        assert len(lines) == 2 and not any("\n" in line for line in lines)
        assert "POST /v1/chat/completions 200" in lines[0] and "model=law" in lines[0] and "answer=3" in lines[0]
        assert (secret in lines[0]) == log_text


def test_metrics(served):
    with serving(served) as (address, one, _):
        tokens = one.chat.completions.create(model="tiny", messages=ASK, max_tokens=3).usage.completion_tokens
        with pytest.raises(openai.NotFoundError):
            one.chat.completions.create(model="nobody", messages=ASK)
        text = urllib.request.urlopen(f"{address}/metrics").read().decode()
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert lines['sanbu_requests_total{path="/v1/chat/completions",status="200"}'] == "1.0"
    assert lines['sanbu_requests_total{path="/v1/chat/completions",status="404"}'] == "1.0"
    assert lines["sanbu_answer_tokens_total"] == str(float(tokens)) and lines["sanbu_answers_in_work"] == "0.0"


# --- scores -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def reward(request, tmp_path_factory):
    """A reward model with statistics, of a family without and one with a chat template."""
    base = tiny_checkpoint(tmp_path_factory.mktemp("base"), request.param)
    model, tokenizer = load_scalar_model(base, dtype=torch.float32, seed=3), load_tokenizer(base)
    model.config.reward_mean, model.config.reward_std = 0.5, 2.0
    folder = tmp_path_factory.mktemp("reward")
    save_model(model, tokenizer, load_template(base, tokenizer), folder)
    return open_model(str(folder), "reward")


def test_step_3_gets_the_scores_of_its_own_reward_model(reward):
    """Prompts as step 3 sends them, with a system message and earlier turns: the scores are those of the dialogue's tokens."""
    tokenizer, template = reward.tokenizer, reward.template
    dialogues = [
        ASK,
        [{"role": "system", "content": "Be brief."}, *ASK],
        [*ASK, {"role": "assistant", "content": "Mix flour and water."}, {"role": "user", "content": "And then?\n\nI wait."}],
    ]
    answers, ended = ["Mix it.", "Wait an hour, and bake", ""], [True, False, True]
    rows = [
        [*template.encode_prompt(tokenizer, dialogue), *template.encode_answer(tokenizer, answer)][: None if whole else -1]
        for dialogue, answer, whole in zip(dialogues, answers, ended, strict=True)
    ]
    with torch.no_grad():
        ids = [torch.tensor([row]) for row in rows]
        expected = [float(at_last_token(TokenScores(reward.model)(one, torch.ones_like(one)), torch.ones_like(one))) for one in ids]
    prompts = [tokenizer.decode(template.encode_prompt(tokenizer, dialogue), skip_special_tokens=True) for dialogue in dialogues]
    with serving(reward, max_batch=2) as (address, one, _):
        assert RewardEndpoint(f"{address}/v1/score", 60, 0)(prompts, answers, ended) == pytest.approx(expected, rel=1e-4)
        in_units = RewardEndpoint(f"{address}/v1/score?normalised=true", 60, 0)(prompts, answers, ended)
        assert in_units == pytest.approx([(score - 0.5) / 2.0 for score in expected], rel=1e-4)
        asked = {"prompts": [dialogues[1], ASK[0]["content"]], "answers": [answers[1], answers[0]]}
        body = json.dumps(asked | {"ended": [False, True]}).encode()
        reply = json.loads(raw(address, post("/v1/score", body)).partition(b"\r\n\r\n")[2])
        assert reply["scores"] == pytest.approx([expected[1], expected[0]], rel=1e-4)
        assert b"one an answer" in raw(address, post("/v1/score", json.dumps(asked | {"ended": [True]}).encode()))
        with pytest.raises(openai.BadRequestError, match="reward model, which does not talk"):
            one.chat.completions.create(model="reward", messages=ASK)


def test_a_chat_model_gives_no_scores(url):
    assert b"is no reward model" in raw(url, post("/v1/score", b'{"prompts": ["a"], "answers": ["b"]}'))


# --- the command ------------------------------------------------------------------------------------------------------


def test_flags_from_a_file_and_the_command_line(tmp_path):
    file = tmp_path / "server.yaml"
    file.write_text("path: some/folder\nmax_batch: 3\nport: 9000\nlog_text: true\nadapter: {law: a/b, art: c}\n")
    args = parse(["--config", str(file), "--port", "9001", "--max-queue", "5"])
    assert (args.path, args.max_batch, args.port, args.log_text, args.max_queue) == ("some/folder", 3, 9001, True, 5)
    assert args.adapter == {"law": "a/b", "art": "c"}


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("", "needs --path"),
        ("--path x --prot 1", "did you mean --port"),
        ("--path {folder} --max_batch 0", "--max_batch 0 is out of range"),
        ("--path {folder} --max_queue -1", "--max_queue -1"),
        ("--path {folder} --host 0.0.0.0", "without a key"),
        ("--path {folder} --port 99999", "--port 99999"),
        ("--path {folder} --port {taken}", "--port {taken}: Address already in use"),
        ("--path {folder} --host nowhere.invalid --api_key_file {keys}", "--host nowhere.invalid"),
        ("--path {folder} --api_key_file {folder}/none", "No such file"),
        ("--path {folder} --api_key_file {empty}", "holds no key"),
        ("--path {folder}/none --port 0", "does not exist"),
        ("--path {folder}/.. --port 0", "holds no model itself"),
        ("--path {folder} --adapter law", "expected NAME=DIR"),
        ("--path {folder} --adapter a=x a=y", "stands there twice"),
        ("--path {folder} --adapter law={folder} --port 0", "no folder of a LoRA adapter"),
        ("--path {folder} --adapter tiny={folder} --port 0", "the name of the model itself"),
        ("--config {keys}", "holds no flags"),
        ("--config {misspelt}", "there is no flag prot; did you mean port?"),
        ("--config {folder}/none.yaml", "No such file"),
        ("--path {folder} --dtype fp64 --port 0", "--dtype: invalid choice: 'fp64'"),
    ],
)
def test_wrong_flags_end_it_with_a_sentence(folder, url, tmp_path, capsys, monkeypatch, flags, sentence):
    monkeypatch.delenv("SANBU_API_KEY", raising=False)
    for name, text in (("keys", "right\n"), ("empty", "# none\n"), ("misspelt", "path: x\nprot: 1\n")):
        (tmp_path / name).write_text(text)
    words = {name: tmp_path / name for name in ("keys", "empty", "misspelt")} | {"folder": folder, "taken": url.split(":")[-1]}
    assert main(flags.format(**words).split()) == 2
    error = capsys.readouterr().err
    assert sentence.format(**words) in error and error.startswith("error: ") and error.count("\n") == 1


def test_a_signal_ends_the_command_when_all_is_answered(folder, tmp_path):
    """The process listens, a stream is in work when SIGTERM comes, it is answered to its end, and the exit code is 0."""
    flags = ["--path", str(folder), "--port", "0", "--max_new_tokens", "200"]
    process = FORKS.Process(target=_run, args=("inference.server", flags, environment(), tmp_path / "out"))
    process.start()
    log = tmp_path / "out.stderr"
    wait_until(lambda: log.exists() and "/v1" in log.read_text(), 300)
    address = re.search(r"at (http://\S+)", log.read_text())[1]
    with openai.OpenAI(base_url=address, api_key="none", max_retries=0) as one:
        stream = one.chat.completions.create(**LONG, stream=True)
        next(piece for piece in stream if piece.choices[0].delta.content)  # the first one comes before it is in work
        os.kill(process.pid, signal.SIGTERM)
        pieces = [piece.choices[0] for piece in stream]
    assert pieces[-1].finish_reason in ("length", "stop") and len(pieces) > 20
    process.join(60)
    assert process.exitcode == 0 and log.read_text().endswith("stopped\n")


def test_an_adapter_of_another_model_is_refused(tmp_path, adapter):
    other = tiny_checkpoint(tmp_path / "wide", "llama", hidden_size=16)
    with pytest.raises(UserError, match="does not fit the model"):
        open_model(str(other), adapters={"law": adapter})


def test_the_unit_of_the_guide_is_valid(tmp_path, repository):
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is not installed")
    text = re.search(r"```ini\n(.*?)```", (repository / "docs/en/serving.md").read_text(encoding="utf-8"), re.S)[1]
    unit = tmp_path / "sanbu.service"
    unit.write_text(text.replace("/srv/sanbu/.venv/bin/python", sys.executable))
    done = subprocess.run([program, "verify", "--man=no", str(unit)], capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    words = re.search(r"^ExecStart=.* -m inference.server (.*)", text, re.M)[1].split()
    assert words == ["--config", "server.yaml"]
    assert int(re.search(r"^TimeoutStopSec=(\d+)", text, re.M)[1]) > parse(["--path", str(tmp_path)]).timeout
