"""The web page: what a dialogue and a vote are, what the models answer, and the page itself in headless Chromium."""

import asyncio
import contextlib
import json
import shutil
import socket
import threading
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("gradio", reason="the packages of requirements-serve.txt are not installed")

from errors import UserError
from inference.chatbot import Sampling, load_chatbot, parse
from inference.served import open_model
from inference.server.app import build_app
from inference.server.service import Limits, Service
from inference.server.start import background, bind, url_of
from inference.web import (
    OFFSET,
    Model,
    Talk,
    add_vote,
    answered,
    build_page,
    in_process,
    models_at,
    page_server,
    read_votes,
    serve,
)
from inference.web_words import words
from models.adapters.lora import save_prefix
from models.load import load_causal_lm
from models.templates import load_template
from models.tokenizer import load_tokenizer
from tests.launching import succeed
from tests.tiny import tiny_checkpoint
from tests.tiny_chatglm import tiny_chatglm

ASK = "How do I bake bread?"
BODY = {"seed": 1234, "temperature": 0.7, "top_p": 0.95, "max_tokens": 12}
SAY = words("en")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("web")
    return [tiny_checkpoint(folder / name, "llama", seed=seed) for seed, name in enumerate(("first", "second"))]


@pytest.fixture(scope="module")
def services(folders) -> list[Service]:
    return [Service(open_model(str(folder)), Limits(max_new_tokens=200)) for folder in folders]


@pytest.fixture(scope="module")
def models(services) -> list[Model]:
    with contextlib.ExitStack() as stack:
        urls = [stack.enter_context(background(build_app(service, [b"right"]))) for service in services]
        yield models_at([urls[0], f"{urls[1]}/v1/"], "right")


@pytest.fixture
def slow(services, monkeypatch):
    """Each token of the first model takes 200 ms: 200 of them 40 s, in which a page on a busy machine is stopped or left."""
    head = services[0].served.model.lm_head  # the network's own forward is not asked for each token
    forward = head.forward
    monkeypatch.setattr(head, "forward", lambda hidden: time.sleep(0.2) or forward(hidden))


def ask(talk: Talk, question: str, models: list[Model], system: str = "", **body) -> list[str]:
    """Ask until all is answered; returns what went wrong."""

    async def wait() -> list[str]:
        talk.ask(question, [model.name for model in models], system)
        writing = answered(talk, models, BODY | body, SAY["silent"])
        return [problem async for problems in writing for problem in problems]

    return asyncio.run(wait())


def written(service: Service) -> int:
    """Tokens of all answers so far, once nothing is in work."""
    wait_until(lambda: not service.worker.in_work and not service.in_work)
    return int(service.metrics.answer_tokens._value.get())


def wait_until(true, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


# --- a dialogue -------------------------------------------------------------------------------------------------------


def test_the_left_answers_are_those_of_chat_py(models, folders):
    """Over two turns, with a system message; the right one is its own."""
    talk, bot = Talk(), load_chatbot(str(folders[0]), Sampling(max_new_tokens=12), "Be brief.")
    for number, question in enumerate((ASK, "And of France?")):
        assert ask(talk, question, models, "Be brief.") == []
        assert talk.answers[0] == bot.answer(question) and talk.whole and talk.may_vote() and talk.count == number + 1
    other = load_chatbot(str(folders[1]), Sampling(max_new_tokens=12, seed=1235 + OFFSET), "Be brief.")
    other.history = talk.history
    assert talk.answers[1] == other.answer("And of France?") != talk.answers[0]
    assert [turn["role"] for turn in talk.asked] == ["system", "user", "assistant", "user"]


def test_the_dialogue_goes_on_with_the_better_answer():
    for vote, answer in (("left", "a"), ("right", "b"), ("tie", "a"), ("bad", "a"), ("", "a")):
        talk = Talk(asked=[{"role": "user", "content": "?"}], answers=["a", "b"], whole=True, vote=vote)
        talk.settle()
        assert [turn["content"] for turn in talk.history] == ["?", answer]
        assert not talk.asked and not talk.may_vote()


def test_a_stopped_answer_stays_and_leaves_its_place(models, services, slow):
    talk = Talk()
    talk.ask(ASK, ["first"], "")
    before = written(services[0])

    async def stopped() -> None:
        async for _ in answered(talk, models[:1], BODY | {"max_tokens": 200, "temperature": 0}, SAY["silent"]):
            talk.stopping = bool(talk.answers and len(talk.answers[0]) > 5)

    asyncio.run(stopped())
    assert len(talk.answers[0]) > 5 and not talk.whole and not talk.may_vote()
    assert written(services[0]) - before < 200
    answer = talk.answers[0]
    assert ask(talk, "And?", models[1:]) == [] and talk.history[1]["content"] == answer


def test_a_visitor_who_goes_leaves_the_place(models, services, slow):
    talk = Talk()
    talk.ask(ASK, ["first"], "")
    before = written(services[0])

    async def gone() -> None:
        writing = answered(talk, models[:1], BODY | {"max_tokens": 200, "temperature": 0}, SAY["silent"])
        await anext(writing)
        await writing.aclose()

    asyncio.run(gone())
    assert written(services[0]) - before < 200


def test_what_a_server_refuses_is_told_and_the_question_taken_back(models):
    talk = Talk()
    assert ask(talk, ASK, models[:1], max_tokens=900) == ["first: max_tokens: this server writes 200 at most."]
    assert (talk.asked, talk.answers, talk.whole, talk.unanswered) == ([], [], False, ASK)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        away = Model("away", "away", f"http://127.0.0.1:{free.getsockname()[1]}", "")
        (problem,) = ask(talk, ASK, [models[0], away])
    assert problem.startswith("away does not answer (") and talk.answers[0] and not talk.may_vote()


def test_any_text_is_read(models, monkeypatch):
    """A line separator stands unescaped in the server's JSON; it ends no line of the stream."""
    monkeypatch.setattr("inference.server.prompts.AnswerText.piece", lambda self, tokens, over: "a\u2028\x85b" if over else "")
    talk = Talk()
    assert ask(talk, ASK, models[:1]) == [] and talk.answers == ["a\u2028\x85b"]


def test_chatglm2_with_a_prefix(tmp_path, shared_dir):
    folder = tiny_chatglm(tmp_path / "chatglm2", "chatglm2-6b", shared_dir)
    model, tokenizer = load_causal_lm(folder, dtype=torch.float32, pre_seq_len=5), load_tokenizer(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.5, generator=torch.Generator().manual_seed(1))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    save_prefix(model, tokenizer, load_template(folder, tokenizer), tmp_path / "prefix", trained)
    paths = [str(tmp_path / "prefix"), str(folder)]
    with in_process(parse(["--path", paths[0], "--compare", paths[1], "--web"])) as models:
        talk = Talk()
        assert [model.name for model in models] == ["prefix", "chatglm2"]
        assert ask(talk, "你好", models, temperature=0) == []
    said = [load_chatbot(path, Sampling(max_new_tokens=12, greedy=True)).answer("你好") for path in paths]
    assert talk.answers == said and said[0] != said[1]


# --- votes ------------------------------------------------------------------------------------------------------------


def voted(talk: Talk, file: Path, vote: str) -> None:
    talk.whole = True
    add_vote(file, talk.record(vote))
    talk.vote = vote


def test_step_2_reads_votes(tmp_path, folders):
    """Pairs with the dialogue before them; a tie and two bad answers are counted and left out, also on the first line."""
    file, talk = tmp_path / "votes.jsonl", Talk()
    assert not read_votes(file)
    kinds = ["tie", "left", "right", "bad"] * 5
    for number, vote in enumerate(kinds):
        talk.settle()
        talk.asked = [{"role": "system", "content": "你是助手。"}, *talk.history, {"role": "user", "content": f"{number}?"}]
        talk.names, talk.answers = ["a", "b"], [f"yes {number}", f"no {number}"]
        voted(talk, file, vote)
        if number % 4 == 3:
            talk.take_back()
            talk.history = []
    assert read_votes(file) == dict.fromkeys(("left", "right", "tie", "bad"), 5)
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [(one["chosen"], one["rejected"]) for one in records[1:3]] == [("yes 1", "no 1"), ("no 2", "yes 2")]
    assert [turn["content"] for turn in records[3]["prompt"][1:]] == ["0?", "yes 0", "1?", "yes 1", "2?", "no 2", "3?"]
    output = tmp_path / "reward"
    succeed(
        "training.step2_reward.main",
        ["--model_name_or_path", str(folders[0]), "--data_path", str(file), "--output_dir", str(output), "--data_split", "0,1,0",
         "--num_train_epochs", "1"],
    )  # fmt: skip
    told = (output / "data.txt").read_text(encoding="utf-8")
    assert "10 records; left out 10 with a vote for neither answer (first: line 1)" in told, told
    assert "fields without content, not read: vote, models, time" in told, told


def test_a_file_that_is_no_file_of_votes(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"vote": "tie"}\n{"prompt": "a"}\n')
    with pytest.raises(UserError, match=r"pairs.jsonl, line 2: no vote of this page; name another file\."):
        read_votes(file)
    with pytest.raises(UserError, match="Is a directory"):
        read_votes(tmp_path)


# --- starting it ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--web", "chat.py needs --path"),
        ("--path x --port 80", "--port belongs to the web page; add --web"),
        ("--path x --compare y", "--compare belongs to the web page"),
        ("--path x --web --prompt hello", "--prompt asks in the terminal"),
        ("--path x --web --server http://x", "leave out --path and --compare"),
        ("--path x --web --temperature 3", "takes 2 at most"),
        ("--path x --web --max_batch 0", "--max_batch 0 is out of range"),
        ("--path x --web --port 70000", "ports end at 65535"),
        ("--path x --web --language fr", "invalid choice"),
    ],
)
def test_flags_that_are_wrong(flags, sentence):
    with pytest.raises(UserError, match=sentence):
        parse(flags.split())


def test_what_cannot_be_served(tmp_path, folders, models, monkeypatch):
    monkeypatch.delenv("SANBU_API_KEY", raising=False)
    usual = ["--votes", str(tmp_path / "votes.jsonl"), "--port", "0"]

    def refused(*flags: str) -> str:
        with pytest.raises(UserError) as caught:
            serve(parse([*usual, *flags]))
        return str(caught.value)

    assert "--host 0.0.0.0 without a key" in refused("--path", str(folders[0]), "--web", "--host", "0.0.0.0")
    assert "there is no API key" in refused("--server", models[0].url)
    assert "name a running server" in refused("--server", "http://127.0.0.1:9")
    assert "name a running server" in refused("--server", "ftp://x")
    assert "holds no model" in refused("--path", str(folders[0]), "--web", "--compare", str(tmp_path))
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        assert "name another port" in refused("--path", str(folders[0]), "--web", "--port", str(port))


# --- the page ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def serving(models, votes: Path, keys=(), language="en", **sampling):
    """The page of some models at an address."""
    page = build_page(models, Sampling(**sampling), "", votes, language)
    bound, server = bind("127.0.0.1", 0), page_server(page, list(keys), words(language)["login"])
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    yield url_of(bound)
    server.should_exit = True
    thread.join()


def test_a_page_with_a_key_asks_for_it(models, tmp_path):
    import httpx

    with serving(models, tmp_path / "votes.jsonl", [b"right"]) as url, httpx.Client(base_url=url, trust_env=False) as client:
        assert client.get("/config").status_code == 401
        assert client.post("/gradio_api/queue/join", json={"data": [], "fn_index": 0, "session_hash": "x"}).status_code == 401
        assert client.post("/login", data={"username": "ann", "password": "wrong"}).status_code == 400
        assert client.post("/login", data={"username": "ann", "password": "right"}).status_code == 200
        assert client.get("/config").status_code == 200


@pytest.fixture(scope="module")
def chromium():
    missing = "playwright is not installed: pip install -r requirements-test.txt"
    playwright = pytest.importorskip("playwright.sync_api", reason=missing)
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not program:
        pytest.skip("there is no Chromium on this machine")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


def test_in_chromium(chromium, models, services, slow, tmp_path, monkeypatch):
    """Ask, stream, stop, ask again, clear, compare, vote; nothing is asked of other machines."""
    connect, asked = socket.socket.connect, []
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: asked.append(address) or connect(self, address))
    votes = tmp_path / "votes.jsonl"
    with serving(models, votes, greedy=True) as url:
        page = chromium.new_page(viewport={"width": 1100, "height": 700}, locale="en-US")
        page.set_default_timeout(120_000)
        page.on("request", lambda request: asked.append(request.url))
        page.goto(url)
        box, left, right = page.locator("#box textarea"), page.locator("#pane-0 .bot"), page.locator("#pane-1 .bot")

        def tokens(most: int) -> None:
            longest = page.locator("#longest input[type=number]")
            longest.fill(str(most))
            longest.press("Tab")

        tokens(300)
        box.fill(ASK)
        box.press("Enter")
        page.get_by_text("max_tokens: this server writes 200 at most.").first.wait_for()
        refilled = "question => document.querySelector('#box textarea')?.value === question"  # what was refused can be asked again
        page.wait_for_function(refilled, arg=ASK)
        assert left.count() == 0

        tokens(200)
        before = written(services[0])
        box.press("Enter")
        left.nth(0).wait_for()
        lengths = {len(left.nth(0).inner_text()) for _ in range(20) if not time.sleep(0.1)}
        assert len(lengths) > 2, "the answer is written piece by piece"
        page.get_by_test_id("stop-button").click()
        page.locator("#again:enabled").wait_for()
        assert page.locator("#vote-left").is_disabled(), "a stopped answer is not voted on"
        assert written(services[0]) - before < 200

        tokens(8)
        page.locator("#again").click()
        page.locator("#vote-left:enabled").wait_for()
        assert left.count() == right.count() == 1
        page.locator("#vote-right").click()
        page.get_by_text("left 0, right 1, tie 0, both bad 0").wait_for()
        assert page.locator("#vote-left").is_disabled()

        box.fill("And?")
        box.press("Enter")
        page.locator("#again:disabled").wait_for()
        page.locator("#vote-left:enabled").wait_for()
        assert left.nth(0).inner_text() == right.nth(0).inner_text(), "both go on from the better answer"
        page.locator("#vote-tie").click()
        page.get_by_text("left 0, right 1, tie 1, both bad 0").wait_for()
        first, second = [json.loads(line) for line in votes.read_text(encoding="utf-8").splitlines()]
        assert (first["models"], first["vote"], second["vote"]) == (["first", "second"], "right", "tie")
        assert [turn["content"] for turn in second["prompt"]] == [ASK, first["chosen"], "And?"]
        said = left.all_inner_texts()
        page.reload()
        left.nth(1).wait_for()
        assert left.all_inner_texts() == said
        assert page.locator("#vote-left").is_disabled(), "the vote is known after a reload"
        page.get_by_text("left 0, right 1, tie 1, both bad 0").wait_for()

        page.locator("#clear").click()
        left.nth(0).wait_for(state="detached")
        page.locator("#right input").click()
        page.get_by_role("option", name=SAY["nothing"]).click()
        page.locator("#pane-1").wait_for(state="hidden")
        tokens(200)
        before = written(services[0])
        box.fill(ASK)
        box.press("Enter")
        left.nth(0).wait_for()
        page.reload()  # in the middle of an answer
        page.wait_for_function(refilled, arg=ASK)
        assert left.count() == 0 and written(services[0]) - before < 200
        page.close()

        box = (chinese := chromium.new_page()).locator("#box textarea")
    with serving(models, votes, language="zh") as url:
        chinese.goto(url)
        box.wait_for()
        assert words("zh")["right"] in chinese.locator("#vote-right").inner_text()
        chinese.close()
    hosts = [one[0] if isinstance(one, tuple) else one for one in asked]
    assert all(host.startswith(("127.0.0.1", "http://127.0.0.1", "data:", "blob:")) for host in hosts), hosts
