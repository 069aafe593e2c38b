"""Answer the questions that stand in a table of a database; any number of workers may share it.

    python -m inference.worker create-tables --database sqlite:///questions.db
    python -m inference.worker --database sqlite:///questions.db --path output/step3-models/1.3b
    python -m inference.worker ask "What is the capital of France?" --session ann      prints the answer
    python -m inference.worker watch                                                   counts questions by status
    python -m inference.worker --http --port 8080                                      a front end asks; no --path: others answer

--database takes a URL of SQLite, postgresql://user:password@host/name or mysql://...; SANBU_DATABASE in the environment holds
it, too, so that no password stands in the list of processes. docs/en/serving.md says more.
"""

import argparse
import logging
import os
import signal
import sys
import threading
import time
import uuid
from typing import Any

from errors import CommandLine, UserError, refuse, told, without_secrets
from inference.chatbot import DTYPES, add_sampling_flags, quiet, sampling_of
from inference.command_line import add_http_flags, read
from inference.served import check_served

CHINESE = """回答数据库表中的问题；可有任意多个 worker 共用一张表。

    python -m inference.worker create-tables --database sqlite:///questions.db
    python -m inference.worker --database sqlite:///questions.db --path output/step3-models/1.3b
    python -m inference.worker ask "What is the capital of France?" --session ann      打印回答
    python -m inference.worker watch                                                   按状态统计问题数
    python -m inference.worker --http --port 8080                                      由前端提问；没有 --path：由别的 worker 回答

--database 为 SQLite、postgresql://user:password@host/name 或 mysql://... 的 URL；也可写在环境变量 SANBU_DATABASE 中，密码便不会
出现在进程列表里。详见 docs/zh/serving.md。
"""
COMMANDS = ("create-tables", "ask", "watch")
ABOVE_ZERO = ("max_batch", "timeout", "lease", "tries", "poll", "max_body")


def build_parser(command: str | None) -> CommandLine:
    """Define the flags of a command; of None those of a worker."""
    prog = f"python -m inference.worker{f' {command}' if command else ''}"
    parser = CommandLine(f"{prog} --help lists the flags.", prog=prog, description=__doc__, zh=CHINESE)
    add = parser.add_argument
    database = os.environ.get("SANBU_DATABASE", "sqlite:///questions.db")
    add("--database", metavar="URL", default=database, help="of SQLite, PostgreSQL or MySQL (SANBU_DATABASE, or sqlite:///questions.db)",
        zh="SQLite、PostgreSQL 或 MySQL 的 URL（SANBU_DATABASE，或 sqlite:///questions.db）")
    add("--retry", type=float, default=60.0, help="seconds to try again where the database does not answer (%(default)s)",
        zh="数据库无响应时重试的秒数（%(default)s）")
    if command == "ask":
        add("question", help="the question", zh="问题")
        add("--session", help="the dialogue that it continues (a new one)", zh="要接续的对话（缺省：新对话）")
        add("--bot_type", default="", help="which workers answer, where they keep to one type",
            zh="由哪一类 worker 回答（worker 只答一类问题时）")
        add("--sub_type", default="", help="the same, finer", zh="同上，更细的一类")
        add("--wait", type=float, default=300.0, help="seconds for the answer; 0 prints the number of the question (%(default)s)",
            zh="等待回答的秒数；0 则打印问题的编号（%(default)s）")
    elif command == "watch":
        add("--once", action="store_true", help="print one line and end", zh="打印一行后结束")
    elif command is None:
        add_worker_flags(parser)
    return parser


def add_worker_flags(parser: CommandLine) -> None:
    """Define the flags of a worker and of its HTTP."""
    add = parser.add_argument
    add("--path", help="folder of an SFT model, an actor or a LoRA adapter, output folder of step 3, or a hub id",
        zh="SFT 模型、actor 或 LoRA 适配器的文件夹，第三步的输出文件夹，或 hub 上的名称")
    add("--bot_type", help="answer only questions of this type (all)", zh="只回答这一类问题（缺省：全部）")
    add("--sub_type", help="answer only questions of this sub type (all)", zh="只回答这一子类问题（缺省：全部）")
    add("--system", help="a system message at the start of every dialogue", zh="每个对话开头的系统消息")
    add("--turns", type=int, default=3, help="answered questions of the session that the model reads (%(default)s)",
        zh="模型读取该对话中已回答的问题数（%(default)s）")
    add("--max_batch", type=int, default=16, help="answers in work at a time (%(default)s)",
        zh="同时生成的回答数（%(default)s）")
    add("--timeout", type=float, default=300.0, help="seconds for an answer; above it the question has failed (%(default)s)",
        zh="一个回答的时限，秒；超时则该问题失败（%(default)s）")
    add("--lease", type=float, default=60.0, help="seconds after which a killed worker's questions come back (%(default)s)",
        zh="worker 被杀后，其问题在多少秒后重新可取（%(default)s）")
    add("--tries", type=int, default=3, help="workers that a question may cost before it has failed (%(default)s)",
        zh="一个问题最多可让几个 worker 出错，之后算作失败（%(default)s）")
    add("--poll", type=float, default=0.5, help="seconds between looks at the table (%(default)s)",
        zh="查看表的间隔秒数（%(default)s）")
    add_sampling_flags(parser)
    add("--dtype", default="auto", choices=DTYPES, help="of the weights (%(default)s)",
        zh="权重的数值类型（%(default)s）")
    add("--http", action="store_true", help="take questions of a front end over HTTP", zh="经 HTTP 接收前端的问题")
    add_http_flags(parser, 8080)
    add("--max_queue", type=int, default=1000, help="questions that may wait; above it 429 (%(default)s)",
        zh="可排队的问题数，超过则返回 429（%(default)s）")
    add("--config", metavar="FILE", help="a YAML file with these flags by name; the command line goes before it",
        zh="按名称写这些参数的 YAML 文件；命令行优先")


def parse(argv: list[str]) -> tuple[str | None, argparse.Namespace]:
    """Return the command and its flags. UserError for whatever is wrong."""
    command = argv[0] if argv and not argv[0].startswith("-") else None
    names = ", ".join(COMMANDS)
    refuse(command not in (None, *COMMANDS), f"There is no command {command}; there are {names}; without one it answers.")
    args = read(build_parser(command), argv[1:] if command else argv)
    if command == "ask":
        refuse(not args.question.strip(), "The question is empty; write one.")
        for name, longest in (("session", 128), ("bot_type", 64), ("sub_type", 64)):
            long = len(getattr(args, name) or "")
            refuse(long > longest, f"--{name} has {long} characters; the table takes {longest}.")
    if command is None:
        check_worker(args)
    return command, args


def check_worker(args: argparse.Namespace) -> None:
    """Raise UserError for flags of a worker that are wrong."""
    refuse(not (args.path or args.http), "the worker needs --path, the folder of a model that talks, or --http to take questions.")
    args.sampling = sampling_of(args)
    for name in ABOVE_ZERO:
        refuse(not getattr(args, name) > 0, f"--{name} {getattr(args, name)} is out of range; it must be above 0.")
    for name in ("turns", "max_queue", "retry"):
        refuse(getattr(args, name) < 0, f"--{name} {getattr(args, name)} is out of range; it must be 0 or more.")
    refuse(not 0 <= args.port < 65536, f"--port {args.port} is out of range; ports end at 65535.")


@told
def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 for a question that failed, or 2 for wrong input."""
    command, args = parse(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format="%(asctime)s %(message)s", stream=sys.stderr)
    logging.getLogger("sanbu").setLevel(logging.INFO)
    if command is None and args.path:
        check_served(args.path, None, {})
    try:
        from inference.worker import table
    except ModuleNotFoundError as error:
        raise UserError(f"the worker needs {error.name}; install its packages: pip install -r requirements-serve.txt.") from error
    engine = table.connect(args.database)
    if command == "create-tables":
        table.patient(lambda: table.create_tables(engine), engine, args.retry)
    table.patient(lambda: table.check_table(engine), engine, args.retry)
    try:
        if command == "ask":
            return ask(engine, args)
        if command == "watch":
            return watch(engine, args)
    except KeyboardInterrupt:
        return 130
    return work(engine, args) if command is None else 0


def ask(engine: Any, args: argparse.Namespace) -> int:
    """Add a question, wait for its answer and print it."""
    from inference.worker import table

    def row() -> Any:
        with engine.connect() as database:
            return database.execute(select_row).one()

    session = args.session or uuid.uuid4().hex
    id = table.patient(lambda: table.ask(engine, session, args.question, args.bot_type, args.sub_type), engine, args.retry)
    select_row = table.select(table.Question.status, table.Question.answer, table.Question.error).where(table.Question.id == id)
    deadline = time.monotonic() + args.wait
    while (found := table.patient(row, engine, args.retry)).status in ("pending", "running"):
        if time.monotonic() > deadline:
            print(f"question {id} of session {session}: {found.status}")
            return 1 if args.wait else 0
        time.sleep(0.2)
    print(found.answer if found.status == "done" else f"question {id} failed: {found.error}")
    return 0 if found.status == "done" else 1


def watch(engine: Any, args: argparse.Namespace) -> int:
    """Print how many questions there are of each status, a line whenever it changes."""
    from inference.worker import table

    shown = None
    while True:
        found = table.patient(lambda: table.counts(engine), engine, args.retry)
        if found != shown:
            print(time.strftime("%H:%M:%S"), *(f"{state} {number}" for state, number in found.items()), flush=True)
            shown = found
        if args.once:
            return 0
        time.sleep(1)


def work(engine: Any, args: argparse.Namespace) -> int:
    """Answer questions, or take them over HTTP, or both, until a signal ends it. A second signal ends it at once."""
    stop = threading.Event()

    def end(number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_DFL)
        stop.set()

    answers = load(args) if args.path else None
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    if args.http:
        listen(engine, args)
    if answers is None:
        stop.wait()
        return 0
    from inference.worker.answering import Settings, Worker

    names = ("max_batch", "lease", "tries", "turns", "poll", "retry")
    kind = {name: value for name in ("bot_type", "sub_type") if (value := getattr(args, name)) is not None}
    logging.getLogger("sanbu").info("answering the questions of %s with %s", without_secrets(str(engine.url)), args.path)
    Worker(engine, answers, Settings(**{name: getattr(args, name) for name in names}, kind=kind)).run(stop)
    return 0


def load(args: argparse.Namespace) -> Any:
    """Load the model that answers. UserError for a folder of none."""
    quiet()
    from inference.served import open_model
    from inference.worker.model import ModelAnswers

    served = open_model(args.path, dtype=args.dtype)
    return ModelAnswers(served, args.sampling, args.system, args.max_batch, args.timeout)


def listen(engine: Any, args: argparse.Namespace) -> None:
    """Serve HTTP in a thread."""
    import uvicorn

    from inference.server.limits import is_loopback, read_keys
    from inference.server.start import bind, url_of
    from inference.worker.http import build_app

    keys = read_keys(args.api_key_file)
    refuse(
        not keys and not is_loopback(args.host),
        f"--host {args.host} without a key would let everybody ask; give --api_key_file or SANBU_API_KEY, or --host 127.0.0.1.",
    )
    bound = bind(args.host, args.port)
    bound.listen()
    app = build_app(engine, keys, args.max_queue, int(args.max_body * 2**20))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, server_header=False, lifespan="off"))
    threading.Thread(target=server.run, kwargs={"sockets": [bound]}, name="http", daemon=True).start()
    logging.getLogger("sanbu").info("taking questions at %s/questions", url_of(bound))


if __name__ == "__main__":
    sys.exit(main())
