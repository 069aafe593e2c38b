"""Questions in a database: each answered once whatever happens to workers, in the order of its session, by the real model too."""

import contextlib
import logging
import os
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

pytest.importorskip("sqlalchemy", reason="the packages of requirements-serve.txt are not installed")
import sqlalchemy as sa
from starlette.testclient import TestClient

from errors import UserError
from inference.chatbot import Sampling, load_chatbot
from inference.served import open_model
from inference.worker.__main__ import main
from inference.worker.answering import Settings, Worker
from inference.worker.http import build_app
from inference.worker.model import ModelAnswers
from inference.worker.table import Question, ask, check_table, claim, connect, counts, create_tables, finish
from tests.launching import FORKS
from tests.postgres import postgres
from tests.tiny import tiny_checkpoint

QUICK = Settings(max_batch=4, lease=1.0, poll=0.02, retry=20.0)
WRITTEN = {  # what notes each answer that is written, in the database itself
    "sqlite": ["create trigger noting after update of answer on questions begin insert into written values (new.id); end"],
    "postgresql": [
        "create function note() returns trigger language plpgsql as "
        "'begin if new.answer is not null then insert into written values (new.id); end if; return new; end'",
        "create trigger noting after update of answer on questions for each row execute function note()",
    ],
}


@pytest.fixture(scope="module")
def server():
    with postgres() as running:
        yield running


@pytest.fixture
def empty(server) -> str:
    """The URL of an empty table in PostgreSQL."""
    with connect(server.url).begin() as database:
        database.execute(sa.text("drop schema public cascade"))
        database.execute(sa.text("create schema public"))
    create_tables(connect(server.url))
    return server.url


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path) -> str:
    """The URL of an empty table."""
    if request.param == "postgresql":
        return request.getfixturevalue("empty")
    address = f"sqlite:///{tmp_path}/questions.db"
    create_tables(connect(address))
    return address


@pytest.fixture
def engine(url):
    return connect(url)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("worker") / "tiny", "llama")


def rows(engine):
    with engine.connect() as database:
        return database.execute(sa.select(Question).order_by(Question.id)).all()


def echo(one) -> str:
    """An answer that tells what was read, and who answered."""
    time.sleep(0.05)
    return f"{one.question} after {len(one.history) // 2} by {os.getpid()}"


def stub_worker(url: str) -> None:
    """A worker in a process of its own, slow enough to be met at work on a busy machine."""

    def slowly(one) -> str:
        time.sleep(0.2)
        return echo(one)

    logging.disable()
    Worker(connect(url), slowly, QUICK).run(threading.Event())


def until(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@contextlib.contextmanager
def running(engine, answer, settings=QUICK):
    """A worker in this process."""
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        worker = pool.submit(Worker(engine, answer, settings).run, stop)
        try:
            yield worker
        finally:
            stop.set()
        worker.result()


def run_here(engine, answer, settings=QUICK, *, until_there_are: int) -> None:
    """Run a worker in this process until so many questions have ended."""
    with running(engine, answer, settings) as worker:
        until(lambda: worker.done() or sum(map(counts(engine).get, ("done", "failed"))) == until_there_are)


def kill_with_questions(engine, worker) -> None:
    """Kill a worker at a moment when it has taken a question and not answered it."""

    def stopped_with_questions() -> bool:
        os.kill(worker.pid, signal.SIGSTOP)
        with contextlib.suppress(sa.exc.OperationalError):  # SQLite's, where it stopped in the middle of writing
            if any(row.status == "running" and f":{worker.pid}:" in row.worker for row in rows(engine)):
                return True
        os.kill(worker.pid, signal.SIGCONT)
        return False

    until(stopped_with_questions)
    os.kill(worker.pid, signal.SIGKILL)


def test_killed_workers_leave_no_question_unanswered_and_none_is_answered_twice(url, engine):
    with engine.begin() as database:
        database.execute(sa.text("create table written (id integer)"))
        for statement in WRITTEN[engine.dialect.name]:
            database.execute(sa.text(statement))
    questions = int(os.environ.get("SANBU_TEST_QUESTIONS", "30"))
    for number in range(questions):
        ask(engine, f"session {number % (questions // 3)}", f"question {number}")
    workers = [FORKS.Process(target=stub_worker, args=(url,)) for _ in range(3)]
    for worker in workers:
        worker.start()
    try:
        for worker, done in ((workers[0], questions // 4), (workers[1], questions // 2)):
            until(lambda done=done: counts(engine)["done"] >= done)
            kill_with_questions(engine, worker)
        until(lambda: counts(engine)["done"] == questions)
    finally:
        for worker in workers:
            worker.kill()
            worker.join()
    found = rows(engine)
    assert {row.answer.rpartition(" by ")[0] for row in found} == {
        f"question {number} after {number // (questions // 3)}" for number in range(questions)
    }
    with engine.connect() as database:
        assert Counter(database.scalars(sa.text("select id from written"))) == {row.id: 1 for row in found}
    assert max(row.attempts for row in found) > 1, "no worker was killed in the middle of a question"


def test_claims_of_many_at_once_never_share_a_row(engine):
    ids = [ask(engine, str(number), "?") for number in range(40)]

    def take(worker: int) -> list[int]:
        taken = []
        while found := claim(engine, f"worker {worker}", 3):
            taken += [one.id for one in found]
        return taken

    with ThreadPoolExecutor(6) as pool:
        taken = [one for many in pool.map(take, range(6)) for one in many]
    assert sorted(taken) == ids


def test_a_late_answer_does_not_touch_a_row_that_another_worker_took(engine):
    ask(engine, "s", "?")
    [late] = claim(engine, "slow", 1, lease=-1.0)
    [again] = claim(engine, "quick", 1)
    assert finish(engine, "slow", [(late, {"status": "done", "answer": "late"})]) == [late]
    assert finish(engine, "quick", [(again, {"status": "done", "answer": "in time"})]) == []
    assert [(row.answer, row.attempts) for row in rows(engine)] == [("in time", 2)]


def test_a_question_that_costs_every_worker_fails_and_the_next_of_its_session_is_answered(engine):
    first = ask(engine, "s", "deadly")
    for _ in range(3):
        assert [one.id for one in claim(engine, "w", 2, lease=-1.0)] == [first]
    ask(engine, "s", "harmless")
    assert [one.question for one in claim(engine, "w", 2)] == ["harmless"]
    assert rows(engine)[0].status == "failed" and "3 workers" in rows(engine)[0].error


def test_a_lease_is_renewed_while_an_answer_takes_long(engine):
    ask(engine, "s", "?")
    held, taken = threading.Event(), []

    def slow(one) -> str:
        held.set()
        for _ in range(45):  # three leases, each longer than a busy machine keeps a thread waiting
            time.sleep(0.1)
            taken.extend(claim(engine, "other", 1))
        return "mine"

    run_here(engine, slow, replace(QUICK, lease=1.5), until_there_are=1)
    assert held.is_set() and not taken and rows(engine)[0].answer == "mine"


def test_what_fails_is_told_in_the_row_and_an_error_of_the_machine_is_tried_again(engine, caplog):
    for question in ("too long", "unlucky", "hopeless"):
        ask(engine, question, question)

    def answer(one) -> str:
        if one.question == "too long":
            raise UserError("it is too long")
        if one.question == "hopeless" or one.attempt == 1:
            raise RuntimeError("out of memory")
        return "an answer\0"

    run_here(engine, answer, until_there_are=3)
    assert [(row.status, row.answer, row.error, row.attempts) for row in rows(engine)] == [
        ("failed", None, "it is too long", 1),
        ("done", "an answer", None, 2),
        ("failed", None, "RuntimeError: out of memory", 3),
    ]


def test_a_worker_whose_answers_always_fail_ends_before_it_uses_up_all_tries(engine, caplog):
    for number in range(20):
        ask(engine, str(number), "?")
    with pytest.raises(UserError, match="answers failed"):
        Worker(engine, lambda one: 1 // 0, replace(QUICK, max_batch=2)).run(threading.Event())
    assert counts(engine)["pending"] >= 16


def test_kinds_and_plain_sql(engine):
    with engine.begin() as database:
        for kind in ("law", "math"):
            database.execute(sa.text(f"insert into questions (session, question, bot_type) values ('s', '{kind}', '{kind}')"))
    assert [one.question for one in claim(engine, "w", 5, kind={"bot_type": "math"})] == ["math"]


def test_a_database_that_goes_away_and_comes_back(server, empty, caplog):
    engine = connect(empty)
    for number in range(20):
        ask(engine, str(number), "?")
    with running(engine, echo) as worker:
        until(lambda: counts(engine)["done"])
        server.stop()
        time.sleep(0.5)
        server.start()
        until(lambda: worker.done() or counts(engine)["done"] == 20)
    assert "trying again" in caplog.text


def test_the_model_answers_as_chat_does_with_the_last_turns_as_history(folder, tmp_path):
    address = f"sqlite:///{tmp_path}/q.db"
    engine = connect(address)
    create_tables(engine)
    sampling = Sampling(greedy=True, max_new_tokens=12)
    dialogues = {"ann": ["How do I bake bread?", "And cake?", "Thanks."], "bob": ["Tell me a story."]}
    for session, questions in dialogues.items():
        for question in questions:
            ask(engine, session, question)
    ask(engine, "eve", "long " * 3000)
    answers = ModelAnswers(open_model(str(folder)), sampling, "Be kind.", 4, 60.0)
    run_here(engine, answers, replace(QUICK, turns=1), until_there_are=5)
    answers.scheduler.stop(wait=True)
    found = {(row.session, row.question): row for row in rows(engine)}
    for session, questions in dialogues.items():
        bot = load_chatbot(str(folder), sampling, "Be kind.")
        for question in questions:
            bot.history = bot.history[-2:]
            assert found[session, question].answer == bot.answer(question)
    assert "more tokens than" in found["eve", "long " * 3000].error


def test_a_front_end_asks_and_fetches_over_http(engine):
    with TestClient(build_app(engine, [b"right"], 2, 2000)) as client:
        assert client.get("/health").json()["status"] == "ok"
        assert client.get("/sessions/s").status_code == 401
        client.headers["Authorization"] = "Bearer right"
        asked = client.post("/questions", json={"question": "你好", "session": "a/b"})
        assert asked.status_code == 201 and asked.json()["status"] == "pending"
        run_here(engine, echo, until_there_are=1)
        shown = client.get(f"/questions/{asked.json()['id']}?wait=5").json()
        assert shown["status"] == "done" and shown["answer"].startswith("你好 after 0")
        assert client.get("/sessions/a/b").json() == [shown]
        for body, status in (({"question": ""}, 400), ({"questoin": "?"}, 400), ({"question": "x" * 3000}, 413)):
            assert client.post("/questions", json=body).status_code == status
        assert client.get("/questions/999").status_code == 404
        assert client.get("/questions/one").status_code == client.get("/questions/1?wait=1e9").status_code == 400
        codes = [client.post("/questions", json={"question": "?"}).status_code for _ in range(3)]
        assert codes == [201, 201, 429]


def test_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SANBU_DATABASE", f"sqlite:///{tmp_path}/q.db")
    assert main(["watch", "--once"]) == 2
    assert "has no table questions" in capsys.readouterr().err
    assert main(["create-tables"]) == main(["create-tables"]) == 0
    assert main(["ask", "What?", "--session", "s", "--wait", "0"]) == 0
    engine = connect(os.environ["SANBU_DATABASE"])
    with ThreadPoolExecutor(1) as pool:
        worker = pool.submit(run_here, engine, echo, until_there_are=2)
        assert main(["ask", "And?", "--session", "s"]) == 0
        worker.result()
    assert main(["watch", "--once"]) == 0
    out = capsys.readouterr().out
    assert "And? after 1 by" in out and "pending 0 running 0 done 2 failed 0" in out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["watch", "--database", "questions.db"], "is no URL"),
        (["watch", "--database", "oracle://h/d"], "oracle is not known"),
        (["watch", "--database", "sqlite:////no/such/folder/q.db"], "folder"),
        (["watch", "--database", "postgresql://ann:secret@127.0.0.1:1/d", "--retry", "0.2"], "does not answer within 0.2 s"),
        (["wach"], "no command wach"),
        ([], "needs --path"),
        (["--path", "x", "--lease", "0"], "--lease 0.0 is out of range"),
        (["--path", "x", "--temperature", "-1"], "--temperature -1.0 is out of range"),
        (["ask", " "], "empty"),
        (["ask", "?", "--session", "s" * 200], "--session has 200 characters"),
    ],
)
def test_wrong_input_is_one_sentence(words, told, capsys, monkeypatch):
    monkeypatch.delenv("SANBU_DATABASE", raising=False)
    assert main(words) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and told in lines[0] and "secret" not in lines[0]


def test_a_table_of_another_schema_is_told(tmp_path):
    engine = connect(f"sqlite:///{tmp_path}/other.db")
    with engine.begin() as database:
        database.execute(sa.text("create table questions (id integer, question text)"))
    with pytest.raises(UserError, match="another schema: no column answer, answered"):
        check_table(engine)
