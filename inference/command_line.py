"""How chat, server and worker read their flags: from the command line, and from a YAML file that --config names."""

import argparse
import re
from pathlib import Path

from errors import CommandLine, UserError, refuse


def add_http_flags(parser: CommandLine, port: int) -> None:
    """Define the flags of whoever listens. port: the one it takes unless told."""
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all, which needs a key (%(default)s)",
        zh="监听的地址；0.0.0.0 为全部地址，此时需要密钥（%(default)s）")
    add("--port", type=int, default=port, help="0 takes a free one (%(default)s)",
        zh="端口；0 取一个空闲的（%(default)s）")
    add("--api_key_file", metavar="FILE", help="keys that clients must send, one a line; else SANBU_API_KEY in the environment",
        zh="客户端须发送的密钥，每行一个；否则取环境变量 SANBU_API_KEY")
    add("--max_body", type=float, default=1.0, help="MiB of a request; above it 413 (%(default)s)",
        zh="一个请求的 MiB 数，超过则返回 413（%(default)s）")


def read(parser: CommandLine, argv: list[str]) -> argparse.Namespace:
    """Parse words, after those of the file that --config names. UserError for a flag that there is not."""
    spelled = [re.sub(r"^--[\w-]+", lambda name: f"--{name[0][2:].replace('-', '_')}", word) for word in argv]
    args, unknown = parser.parse_known_args(spelled)
    if unknown:
        near = parser.nearest_flag(unknown[0])
        raise UserError(f"Unknown flag {unknown[0]}; {f'did you mean {near}?' if near else parser.advice}")
    if getattr(args, "config", None):
        return parser.parse_args([*flags_of(args.config, parser), *spelled])
    return args


def flags_of(path: str, parser: CommandLine) -> list[str]:
    """Return the flags of a YAML file as words of a command line. UserError for what is none."""
    from yaml_text import parse_yaml  # yaml is imported only where there is some

    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a UTF-8 text file"
        raise UserError(f"--config {path}: {reason}; name a YAML file with flags, such as  port: 9000.") from error
    content, *more = parse_yaml(text, f"--config {path}") or [{}]
    content = {} if content is None else content
    refuse(not isinstance(content, dict) or more, f"--config {path} holds no flags; write them by name, such as  port: 9000.")
    words: list[str] = []
    for name, value in content.items():
        flag = f"--{name}"
        if flag not in parser.flags or flag == "--config":
            near = parser.nearest_flag(flag)
            raise UserError(f"--config {path}: there is no flag {name}; {f'did you mean {near[2:]}?' if near else parser.advice}")
        values = [f"{one}={folder}" for one, folder in value.items()] if isinstance(value, dict) else value
        if parser.get_default(name) is False:
            refuse(not isinstance(value, bool), f"--config {path}: {name} is {value!r}; write true or false.")
            words += [flag] * value
        elif value is not None:
            words += [flag, *map(str, values if isinstance(values, list) else [values])]
    return words
