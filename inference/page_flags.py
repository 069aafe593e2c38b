"""The flags of chat.py that belong to its web page."""

from __future__ import annotations

import argparse

from errors import CommandLine, language_of_user, refuse

FLAGS = ("compare", "votes", "language", "host", "port", "api_key_file", "max_batch", "max_queue", "timeout")


def add_page_flags(parser: CommandLine) -> None:
    """Define them."""
    add = parser.add_argument
    add("--web", action="store_true", help="a web page instead of the terminal", zh="打开网页，而不是在终端中对话")
    more = {"help": "with --web: further models, side by side with --path", "zh": "配合 --web：与 --path 并排回答的其他模型"}
    add("--compare", nargs="+", default=[], metavar="DIR", **more)
    running = "the page asks running servers (python -m inference.server) instead of --path"
    running_zh = "网页使用运行中的服务（python -m inference.server），代替 --path"
    add("--server", nargs="+", default=[], metavar="URL", help=running, zh=running_zh)
    votes = {"help": "votes of the page go there, for step 2 (%(default)s)", "zh": "投票写入此文件，供第 2 步使用（%(default)s）"}
    add("--votes", default="output/votes.jsonl", metavar="FILE", **votes)
    language = {"help": "of the page (by the locale: %(default)s)", "zh": "网页的语言（按系统区域设置：%(default)s）"}
    add("--language", choices=["en", "zh"], default=language_of_user(), **language)
    host = "address of the page; 0.0.0.0 for all, which needs a key (%(default)s)"
    add("--host", default="127.0.0.1", help=host, zh="网页监听的地址；0.0.0.0 为所有地址，需要密钥（%(default)s）")
    port = {"help": "port of the page; 0 takes a free one (%(default)s)", "zh": "网页的端口；0 表示任选一个空闲端口（%(default)s）"}
    add("--port", type=int, default=7860, **port)
    keys = "keys, one a line, that the page asks for and sends to --server; else SANBU_API_KEY in the environment"
    keys_zh = "密钥文件，每行一个：打开网页时需要，也发送给 --server；不给时读取环境变量 SANBU_API_KEY"
    add("--api_key_file", metavar="FILE", help=keys, zh=keys_zh)
    batch = {"help": "of the page: answers in work at a time (%(default)s)", "zh": "网页：同时生成的回答数（%(default)s）"}
    add("--max_batch", type=int, default=16, **batch)
    queue = {"help": "of the page: answers that may wait (%(default)s)", "zh": "网页：可以等待的回答数（%(default)s）"}
    add("--max_queue", type=int, default=256, **queue)
    timeout = {"help": "of the page: seconds for an answer (%(default)s)", "zh": "网页：一个回答的秒数（%(default)s）"}
    add("--timeout", type=float, default=3600.0, **timeout)
    file = "a YAML file with these flags by name; the command line goes before it"
    add("--config", metavar="FILE", help=file, zh="写有这些参数的 YAML 文件；命令行优先")


def check_page(args: argparse.Namespace, parser: CommandLine) -> None:
    """Raise UserError for flags of the page that are wrong, or that stand there without a page."""
    if not (args.web or args.server):
        given = next((name for name in FLAGS if getattr(args, name) != parser.get_default(name)), None)
        refuse(given, f"--{given} belongs to the web page; add --web.")
        return
    refuse(args.prompt is not None, "--prompt asks in the terminal; leave it out for the web page.")
    refuse(args.server and (args.path or args.compare), "--server has models of its own; leave out --path and --compare.")
    refuse(args.temperature > 2, f"--temperature {args.temperature}: the server takes 2 at most; choose a lower one.")
    for name in ("max_batch", "timeout"):
        refuse(not getattr(args, name) > 0, f"--{name} {getattr(args, name)} is out of range; it must be above 0.")
    refuse(args.max_queue < 0, f"--max_queue {args.max_queue} is out of range; it must be 0 or more.")
    refuse(not 0 <= args.port < 65536, f"--port {args.port} is out of range; ports end at 65535.")
