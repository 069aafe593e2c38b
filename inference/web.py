"""A web page to talk to models of a server, side by side, and to vote: python chat.py --path DIR --web, or --server URL.

The page holds no model. It asks a server over HTTP: one in this process, or those at the URLs of --server. A vote becomes a
line of a JSONL file that step 2 reads; one that prefers neither answer is there, too, and step 2 counts and leaves it out.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import secrets
import ssl
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import httpx
import uvicorn
from fastapi import FastAPI

from errors import UserError, refuse
from inference.chatbot import Sampling, chat_folder, quiet
from inference.served import default_name, open_model
from inference.server.app import build_app
from inference.server.limits import is_loopback, knows, read_keys
from inference.server.service import Limits, Service
from inference.server.start import background, bind, url_of
from inference.web_words import words

LONGEST = 512  # tokens of an answer that the slider offers at least
OFFSET = 1_000_003  # of the right answer's seed, so that one model on both sides gives two answers
MOMENT = 0.1  # seconds between two looks at what was written
HEIGHT = "calc(100vh - 260px)"  # of a dialogue: what the rest of the page leaves
VOTES = ("left", "right", "tie", "bad")


# --- models of servers ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A model that a server answers with. name: on the page; id: at the server."""

    name: str
    id: str
    url: str
    key: str

    def client(self) -> httpx.AsyncClient:
        """Return a client for the model's server; an answer may take any time."""
        return httpx.AsyncClient(timeout=httpx.Timeout(None, connect=10), **connection(self.url, self.key))


def connection(url: str, key: str) -> dict[str, Any]:
    """Return settings of a client. A proxy of the environment would look for the loopback on its own machine."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return {"headers": headers, "trust_env": not is_loopback(httpx.URL(url).host), "verify": certificates()}


@cache
def certificates() -> ssl.SSLContext:
    """Return what a connection trusts. To read it costs 50 ms, for each client if httpx does."""
    return httpx.create_ssl_context()


def models_at(urls: list[str], key: str) -> list[Model]:
    """Return the models that talk at servers of OpenAI's protocol. UserError for a server that has none, or does not answer."""
    found: list[tuple[str, str]] = []
    for given in urls:
        url = given.rstrip("/").removesuffix("/v1")
        try:
            answer = httpx.get(f"{url}/v1/models", timeout=10, **connection(url, key))
            rows = answer.json()["data"] if answer.is_success else refused(answer.content)
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as error:
            reason = str(error) or type(error).__name__
            raise UserError(f"--server {given}: {reason}; name a running server, such as http://127.0.0.1:8000.") from error
        except UserError as error:
            raise UserError(f"--server {given}: {error}") from error
        names = [row["id"] for row in rows if row.get("kind") != "reward"]
        refuse(not names, f"--server {given} serves a reward model, which does not talk; name one of an SFT model or an actor.")
        found += [(name, url) for name in names]
    often = Counter(name for name, _ in found)
    where = {url: f" ({httpx.URL(url).netloc.decode()})" for _, url in found}
    return [Model(name + where[url] * (often[name] > 1), name, url, key) for name, url in found]


def refused(body: bytes) -> None:
    """Raise UserError with what a server says of a request that it does not answer."""
    try:
        raise UserError(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"the server says {body[:200].decode(errors='replace')!r}") from None


async def pieces(model: Model, body: dict[str, Any]) -> AsyncIterator[str]:
    """Yield an answer as it is written. UserError if the server refuses or breaks off."""
    body = body | {"model": model.id, "stream": True}
    async with model.client() as client, client.stream("POST", f"{model.url}/v1/chat/completions", json=body) as answer:
        if not answer.is_success:
            refused(await answer.aread())
        rest = b""
        async for part in answer.aiter_bytes():  # aiter_lines would also end a line at U+2028 inside a text
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise UserError(event["error"]["message"])
                for choice in event["choices"]:
                    yield choice["delta"].get("content") or ""


# --- dialogue and votes -----------------------------------------------------------------------------------------------


@dataclass
class Talk:
    """A dialogue of one visitor; changed in place, as its handlers run side by side.

    history: turns that all models read. asked: messages of the last question, its own included. names, answers: of each side.
    whole: True once all answers are complete. vote: one of VOTES. stopping: True once the visitor wants no more of an answer.
    unanswered: a question that was taken back. count: questions so far, forgotten ones too.
    """

    history: list[dict[str, str]] = field(default_factory=list)
    asked: list[dict[str, str]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    whole: bool = False
    vote: str = ""
    stopping: bool = False
    unanswered: str = ""
    count: int = 0

    def ask(self, question: str, names: list[str], system: str) -> None:
        """Begin a turn. The dialogue goes on with the right answer if it was voted the better one, else with the left one."""
        self.settle()
        before = [{"role": "system", "content": system}] if system.strip() else []
        self.asked = [*before, *self.history, {"role": "user", "content": question}]
        self.names, self.answers, self.unanswered, self.stopping = names, [""] * len(names), "", False
        self.count += 1

    def settle(self) -> None:
        """Put the last turn, with one of its answers, behind the others."""
        if self.asked:
            answer = self.answers[self.vote == "right"] or "".join(self.answers)  # a side may be stopped before its first word
            self.history = [*self.history, self.asked[-1], {"role": "assistant", "content": answer}]
            self.take_back()

    def take_back(self) -> str:
        """Remove the last question and its answers; returns the question."""
        question = self.asked[-1]["content"] if self.asked else ""
        self.asked, self.answers, self.whole, self.vote = [], [], False, ""
        return question

    def may_vote(self) -> bool:
        """Return True if there are two complete answers without a vote."""
        return self.whole and len(self.answers) == 2 and not self.vote

    def shown(self, side: int, empty: str) -> list[dict[str, str]]:
        """Return what a side's pane shows; empty: instead of a complete answer without text."""
        texts = [text or empty for text in self.answers[side : side + 1] if text or self.whole]
        return [*self.history, *self.asked[-1:], *({"role": "assistant", "content": text} for text in texts)]

    def record(self, vote: str) -> dict[str, Any]:
        """Return a vote as a record for step 2; a tie and two bad answers have an empty chosen and rejected, and "answers"."""
        left, right = self.answers
        chosen, rejected = {"left": (left, right), "right": (right, left)}.get(vote, ("", ""))
        record = {"prompt": self.asked, "chosen": chosen, "rejected": rejected, "vote": vote, "models": self.names}
        answers = {} if chosen else {"answers": self.answers}
        return record | answers | {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}


async def answered(talk: Talk, models: list[Model], settings: dict[str, Any], silent: str) -> AsyncIterator[list[str]]:
    """Let the models answer the question of a dialogue. Yields every MOMENT, in the end what went wrong.

    settings: of the request's body, with the seed of the dialogue's first answer. silent: what is said of a server that does not
    answer. A stopped answer stays as far as it was written, as in chat.py; without any text the question is taken back.
    """
    answers, problems = talk.answers, []  # a dialogue that is cleared gets another list of answers
    body = settings | {"messages": talk.asked}

    async def write(side: int, model: Model) -> None:
        seed = settings["seed"] + talk.count - 1 + side * OFFSET
        try:
            async for piece in pieces(model, body | {"seed": seed}):
                answers[side] += piece
        except UserError as error:
            problems.append(f"{model.name}: {error}")
        except Exception as error:  # a connection that breaks, or what is no protocol of OpenAI's
            problems.append(silent.format(model.name, str(error) or type(error).__name__))

    tasks = pending = [asyncio.create_task(write(side, model)) for side, model in enumerate(models)]
    try:
        while pending and not talk.stopping:
            _, pending = await asyncio.wait(pending, timeout=MOMENT)
            yield []
    finally:  # also if the visitor has gone
        for task in tasks:
            task.cancel()
    if talk.answers is answers:
        talk.whole = not problems and not pending
        if not talk.whole and not any(answers):
            talk.unanswered = talk.take_back()
    yield problems


def read_votes(path: Path) -> Counter[str]:
    """Return how many votes of each kind a file holds; begin it where there is none. UserError if it holds something else."""
    votes: Counter[str] = Counter()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+", encoding="utf-8") as file:
            file.seek(0)
            for number, line in enumerate(file, 1):
                try:
                    votes[json.loads(line)["vote"]] += 1
                except (ValueError, KeyError, TypeError):
                    raise UserError(f"--votes {path}, line {number}: no vote of this page; name another file.") from None
    except OSError as error:
        raise UserError(f"--votes {path}: {error.strerror}; name a file that can be written.") from error
    except UnicodeDecodeError:
        raise UserError(f"--votes {path} holds no text; name another file.") from None
    return votes


def add_vote(path: Path, record: dict[str, Any]) -> None:
    """Append a vote to a file, in one write, so that lines of several visitors do not mix. OSError if that fails."""
    with path.open("ab", buffering=0) as file:
        file.write(f"{json.dumps(record, ensure_ascii=False)}\n".encode())


# --- the page ---------------------------------------------------------------------------------------------------------


def build_page(models: list[Model], sampling: Sampling, system: str, path: Path, language: str) -> gr.Blocks:
    """Return the page. sampling, system: its settings at the start. path: of the votes. UserError for what is wrong with them."""
    say = words(language)
    with gr.Blocks(title=f"Sanbu: {say['title']}", analytics_enabled=False, fill_width=True) as page:
        parts = layout([model.name for model in models], sampling, system, say)
        parts.status.value = counted(path, say)
        connect(page, parts, models, sampling, path, say)
    return page


def layout(names: list[str], sampling: Sampling, system: str, say: dict[str, str]) -> SimpleNamespace:
    """Place the parts of the page. names: of the models; a second one is compared with the first from the start."""
    other = names[1] if len(names) > 1 else ""
    # The browser keeps the dialogue over a reload, encrypted with a key that is new at each start of the page.
    parts = SimpleNamespace(talk=gr.State(Talk()), kept=gr.BrowserState(storage_key="sanbu-dialogue"))
    with gr.Sidebar(label=say["settings"], width=300):
        gr.Markdown(f"### Sanbu 三步\n{say['title']}")
        parts.left = gr.Dropdown(names, value=names[0], label=say["model"], elem_id="left")
        parts.right = gr.Dropdown([(say["nothing"], ""), *names], value=other, label=say["compare"], elem_id="right")
        parts.system = gr.Textbox(system, label=say["system"], lines=2, max_lines=8, elem_id="system")
        warmth, longest = 0.0 if sampling.greedy else sampling.temperature, sampling.max_new_tokens
        parts.temperature = gr.Slider(0, 2, warmth, step=0.05, label=say["temperature"])
        parts.top_p = gr.Slider(min(0.01, sampling.top_p), 1, sampling.top_p, step=0.01, label=say["top_p"])
        parts.longest = gr.Slider(1, max(LONGEST, longest), longest, step=1, label=say["max_new_tokens"], elem_id="longest")
    with gr.Row():
        parts.panes = [
            gr.Chatbot(label=name, visible=bool(name), height=HEIGHT, min_height=240, buttons=["copy_all"], elem_id=f"pane-{side}")
            for side, name in enumerate((names[0], other))
        ]
    with gr.Row(visible=bool(other)) as parts.voting:
        parts.votes = [gr.Button(say[vote], size="sm", min_width=80, interactive=False, elem_id=f"vote-{vote}") for vote in VOTES]
    parts.box = gr.Textbox(
        placeholder=say["ask"], show_label=False, submit_btn=True, autofocus=True, max_lines=8, elem_id="box"
    )  # fmt: skip
    with gr.Row():
        parts.again = gr.Button(say["again"], size="sm", interactive=False, elem_id="again")
        parts.clear = gr.Button(say["clear"], size="sm", elem_id="clear")
    parts.status = gr.Markdown(visible=bool(other), elem_id="status")
    return parts


def connect(
    page: gr.Blocks, parts: SimpleNamespace, models: list[Model], sampling: Sampling, path: Path, say: dict[str, str]
) -> None:
    """Give the parts of the page what they do."""
    by_name = {model.name: model for model in models}
    settings = {"seed": sampling.seed, **beyond_sliders(sampling)}

    def panes(talk: Talk) -> dict[Any, Any]:
        return {pane: talk.shown(side, say["empty"]) for side, pane in enumerate(parts.panes)}

    def state(talk: Talk, writing: bool = False, **box: Any) -> dict[Any, Any]:
        """Return what the whole page shows of a dialogue."""
        shown = {
            button: gr.Button(interactive=talk.may_vote(), variant="primary" if talk.vote == vote else "secondary")
            for button, vote in zip(parts.votes, VOTES, strict=True)
        }
        shown[parts.box] = gr.Textbox(submit_btn=not writing, stop_btn=writing, **box)
        shown[parts.again] = gr.Button(interactive=bool(talk.asked) and not writing)
        shown[parts.kept] = asdict(talk)
        return shown | panes(talk)

    async def ask(
        talk: Talk, question: str, left: str, right: str, system: str, temperature: float, top_p: float, longest: int
    ) -> AsyncIterator[dict[Any, Any]]:
        if not question.strip():
            return
        body = settings | {"temperature": temperature, "top_p": top_p, "max_tokens": longest}
        sides = [by_name[name] for name in (left, right) if name]
        talk.ask(question.strip(), [model.name for model in sides], system)
        yield state(talk, writing=True, value="")
        async for problems in answered(talk, sides, body, say["silent"]):
            for problem in problems:
                gr.Warning(problem, duration=20)
            yield panes(talk)
        yield state(talk, **({"value": talk.unanswered} if talk.unanswered else {}))

    async def ask_again(talk: Talk, *inputs: Any) -> AsyncIterator[dict[Any, Any]]:
        async for shown in ask(talk, talk.take_back(), *inputs):
            yield shown

    def restore(talk: Talk, kept: dict[str, Any] | None) -> dict[Any, Any]:
        vars(talk).update(kept or {})
        unanswered = talk.asked and not talk.whole and not any(talk.answers)  # reloaded before the answer was done
        return {parts.status: counted(path, say)} | state(talk, **({"value": talk.take_back()} if unanswered else {}))

    def stop(talk: Talk) -> None:
        talk.stopping = True

    def clear(talk: Talk) -> dict[Any, Any]:
        talk.stopping = True
        talk.take_back()
        talk.history = []
        return state(talk)

    def vote(kind: str, talk: Talk) -> dict[Any, Any]:
        if talk.may_vote():
            try:
                add_vote(path, talk.record(kind))
            except OSError as error:
                raise gr.Error(f"{path}: {error.strerror}") from error
            talk.vote = kind
        return {parts.status: counted(path, say)} | state(talk)

    def sides(left: str, right: str) -> list[Any]:
        shown = bool(right)
        return [gr.Chatbot(label=left), gr.Chatbot(label=right, visible=shown), gr.Row(visible=shown), gr.Markdown(visible=shown)]

    knobs = [parts.left, parts.right, parts.system, parts.temperature, parts.top_p, parts.longest]
    all_parts = [*parts.panes, *parts.votes, parts.box, parts.again, parts.kept]
    several = {"concurrency_limit": None, "show_progress": "hidden"}
    parts.box.submit(ask, [parts.talk, parts.box, *knobs], all_parts, **several)
    parts.again.click(ask_again, [parts.talk, *knobs], all_parts, **several)
    parts.box.stop(stop, parts.talk, queue=False)
    page.load(restore, [parts.talk, parts.kept], [*all_parts, parts.status], **several)
    for clearing in (parts.clear.click, *(pane.clear for pane in parts.panes)):
        clearing(clear, parts.talk, all_parts, **several)
    for kind, button in zip(VOTES, parts.votes, strict=True):
        button.click(partial(vote, kind), parts.talk, [*all_parts, parts.status], **several)
    for choice in (parts.left, parts.right):
        choice.change(sides, [parts.left, parts.right], [*parts.panes, parts.voting, parts.status], **several)


def beyond_sliders(sampling: Sampling) -> dict[str, Any]:
    """Return settings of a request that only the command line has. Not OpenAI's, and so only sent where they have an effect."""
    found = {"top_k": sampling.top_k, "stop": list(sampling.stop_strings), "repetition_penalty": sampling.repetition_penalty}
    return {name: value for name, value in found.items() if value not in (0, [], 1.0)}


def counted(path: Path, say: dict[str, str]) -> str:
    """Return how many votes the file holds, in words."""
    votes = read_votes(path)
    return say["votes"].format(path, sum(votes.values()), *(votes[vote] for vote in VOTES))


# --- serving it -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def in_process(args: argparse.Namespace) -> Iterator[list[Model]]:
    """Serve the models of --path and --compare in threads of this process, each at a port of the loopback and with one key."""
    paths = [args.path, *args.compare]
    for path in paths:
        chat_folder(path)  # before any is loaded, which takes a while
    quiet()
    names = [default_name(path) for path in paths]
    names = [name if names.count(name) == 1 else path for name, path in zip(names, paths, strict=True)]
    limits = Limits(args.max_batch, args.max_queue, max(LONGEST, args.max_new_tokens), args.timeout)
    key, models = secrets.token_hex(16), []
    with contextlib.ExitStack() as servers:
        for name, path in zip(names, paths, strict=True):
            service = Service(open_model(path, name, dtype=args.dtype), limits)
            models.append(Model(name, name, servers.enter_context(background(build_app(service, [key.encode()]))), key))
        yield models


def serve(args: argparse.Namespace) -> None:
    """Serve the page of chat.py's flags until a signal ends it. UserError for what is wrong with them."""
    say, keys = words(args.language), read_keys(args.api_key_file)
    refuse(
        not keys and not is_loopback(args.host),
        f"--host {args.host} without a key would let everybody ask; give --api_key_file or SANBU_API_KEY, or --host 127.0.0.1.",
    )
    path = Path(args.votes).expanduser()
    read_votes(path)
    bound = bind(args.host, args.port)
    servers = contextlib.nullcontext(models_at(args.server, keys[0].decode() if keys else "")) if args.server else in_process(args)
    with servers as models:
        page = build_page(models, args.sampling, args.system or "", path, args.language)
        bound.listen()
        print(say["open"].format(url_of(bound)), flush=True)
        page_server(page, keys, say["login"]).run(sockets=[bound])


def page_server(page: gr.Blocks, keys: list[bytes], login: str) -> uvicorn.Server:
    """Return uvicorn's server for the page. With keys a visitor gives one as the password.

    Not Blocks.launch: it asks its own address through the proxy of the environment, and looks for a free port by itself.
    """
    auth = (lambda _, given: knows(keys, f"Bearer {given}".encode())) if keys else None
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app = gr.mount_gradio_app(
        app, page, path="", auth=auth, auth_message=login, footer_links=[], run_history=False, ssr_mode=False, pwa=False
    )  # fmt: skip
    # An open page stays connected; a second is for what is being sent.
    return uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=1))
