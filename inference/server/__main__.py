"""Serve a model over HTTP, with OpenAI's protocol: chat completions, completions, models, and the scores of a reward model.

    python -m inference.server --path output/step3-models/1.3b
    python -m inference.server --path output/actor-models/1.3b --adapter law=output/law/adapter --port 9000
    python -m inference.server --config server.yaml          # flags by their names, such as  path: output/step3-models/1.3b

--path takes what chat.py takes, or a reward model. Keys come from --api_key_file or the environment (SANBU_API_KEY=key1,key2);
without one the server listens on the loopback only. docs/en/serving.md says more.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import sys
from typing import Any

from errors import CommandLine, UserError, refuse, told
from inference.chatbot import DTYPES, quiet
from inference.command_line import add_http_flags, read
from inference.served import check_served

CHINESE = """以 OpenAI 的协议经 HTTP 提供模型服务：chat completions、completions、models，以及奖励模型的打分。

    python -m inference.server --path output/step3-models/1.3b
    python -m inference.server --path output/actor-models/1.3b --adapter law=output/law/adapter --port 9000
    python -m inference.server --config server.yaml          # 按名称写的参数，例如  path: output/step3-models/1.3b

--path 与 chat.py 的相同，也可以是奖励模型。密钥取自 --api_key_file 或环境变量（SANBU_API_KEY=key1,key2）；没有密钥时只监听本机。
详见 docs/zh/serving.md。
"""
ABOVE_ZERO = ("max_batch", "max_new_tokens", "timeout", "max_body")


def build_parser() -> CommandLine:
    """Define the flags."""
    prog = "python -m inference.server"
    parser = CommandLine(f"{prog} --help lists the flags.", prog=prog, description=__doc__, zh=CHINESE)
    add = parser.add_argument
    add("--path", help="folder of an SFT model, an actor, a LoRA adapter or a reward model, output folder of step 3, or a hub id",
        zh="SFT 模型、actor、LoRA 适配器或奖励模型的文件夹，第三步的输出文件夹，或 hub 上的名称")
    add("--adapter", nargs="+", default=[], metavar="NAME=DIR", help='LoRA adapters over it, which "model": NAME asks',
        zh="其上的 LoRA 适配器，以 \"model\": NAME 请求")
    add("--name", help='the name of the model itself in "model" (the last part of --path)',
        zh="模型本身在 \"model\" 中的名称（--path 的最后一段）")
    add_http_flags(parser, 8000)
    add("--max_batch", type=int, default=16, help="answers in work at a time; each has a row of the KV cache (%(default)s)",
        zh="同时生成的回答数；每个占 KV cache 的一行（%(default)s）")
    add("--max_queue", type=int, default=256, help="answers that may wait; above it 429 (%(default)s)",
        zh="可排队的回答数，超过则返回 429（%(default)s）")
    add("--max_new_tokens", type=int, default=512, help="the longest answer in tokens (%(default)s)",
        zh="回答的最大 token 数（%(default)s）")
    add("--prompt_cache", type=float, default=256, help="MiB for earlier dialogues, whose next turns begin so (%(default)s)",
        zh="保存此前对话的 MiB 数，其下一轮从其后读起（%(default)s）")
    add("--timeout", type=float, default=300.0, help="seconds for a request, waiting included (%(default)s)",
        zh="一个请求的时限，含排队，秒（%(default)s）")
    add("--dtype", default="auto", choices=DTYPES, help="of the weights (%(default)s)",
        zh="权重的数值类型（%(default)s）")
    add("--log_text", action="store_true", help="write prompts and answers into the log, too",
        zh="把提示和回答也写入日志")
    add("--config", metavar="FILE", help="a YAML file with these flags by name; the command line goes before it",
        zh="按名称写这些参数的 YAML 文件；命令行优先")
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line and the file that --config names. UserError for whatever is wrong."""
    args = read(build_parser(), argv)
    refuse(not args.path, "the server needs --path: the folder of an SFT model, an actor, a LoRA adapter or a reward model.")
    for name in ABOVE_ZERO:
        refuse(not getattr(args, name) > 0, f"--{name} {getattr(args, name)} is out of range; it must be above 0.")
    refuse(not 0 <= args.port < 65536, f"--port {args.port} is out of range; ports end at 65535.")
    for name in ("max_queue", "prompt_cache"):
        refuse(getattr(args, name) < 0, f"--{name} {getattr(args, name)} is out of range; it must be 0 or more.")
    pairs = [one.partition("=") for one in args.adapter]
    wrong = next((one for one, (name, _, path) in zip(args.adapter, pairs, strict=True) if not name or not path), None)
    refuse(wrong is not None, f"--adapter {wrong}: expected NAME=DIR, such as law=output/law/adapter.")
    args.adapter = {name: path for name, _, path in pairs}
    refuse(len(args.adapter) < len(pairs), "--adapter: a name stands there twice; give each adapter one of its own.")
    return args


@told
def main(argv: list[str] | None = None) -> int:
    """Serve until a signal ends it; returns the exit code: 0, or 2 for wrong input."""
    args = parse(sys.argv[1:] if argv is None else argv)
    check_served(args.path, args.name, args.adapter)
    try:
        from inference.server import limits, start
    except ModuleNotFoundError as error:
        raise UserError(f"the server needs {error.name}; install its packages: pip install -r requirements-serve.txt.") from error
    keys = limits.read_keys(args.api_key_file)
    refuse(
        not keys and not limits.is_loopback(args.host),
        f"--host {args.host} without a key would let everybody ask; give --api_key_file or SANBU_API_KEY, or --host 127.0.0.1.",
    )
    return serve(args, keys, start.bind(args.host, args.port))


def serve(args: argparse.Namespace, keys: list[bytes], bound: Any) -> int:
    """Load the model and serve at a bound socket."""
    from inference.served import open_model
    from inference.server.app import build_app
    from inference.server.service import Limits, Service
    from inference.server.start import server_of, url_of

    logging.basicConfig(format="%(asctime)s %(message)s", stream=sys.stderr)
    logging.getLogger("sanbu").setLevel(logging.INFO)
    logger = logging.getLogger("sanbu")
    quiet()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # handing a short text to another thread takes longer than its tokens
    served = open_model(args.path, args.name, args.adapter, args.dtype)
    body, kept = int(args.max_body * 2**20), int(args.prompt_cache * 2**20)
    limits = Limits(args.max_batch, args.max_queue, args.max_new_tokens, args.timeout, body, args.log_text, kept)
    service = Service(served, limits)
    gc.collect()
    gc.freeze()  # the collector need not go through the model and its libraries again and again
    bound.listen()  # who connects from now on is answered
    logger.info("serving %s at %s/v1", ", ".join(served.names), url_of(bound))
    server_of(build_app(service, keys)).run(sockets=[bound])
    service.close()
    logger.info("stopped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
