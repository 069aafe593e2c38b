"""A dialogue with a trained model in the terminal, with the template and the stop tokens it was trained with.

    python chat.py --path output/step3-models/1.3b
    python chat.py --path output/actor-models/1.3b --prompt "What is the capital of France?" --greedy
    python chat.py --path output/step3-models/1.3b --compare output/actor-models/1.3b --web      a page; side by side, with votes

/help lists the commands of the dialogue. Ctrl-C stops an answer. Questions may come from a pipe, one a line.
"""

import argparse
import contextlib
import json
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from errors import CommandLine, UserError, nearest, refuse, told
from inference.command_line import read
from inference.page_flags import add_page_flags, check_page

BARE = {"quit": "/quit", "exit": "/quit", "stop": "/quit", "clear": "/clear"}  # commands that need no slash
RIGHT: dict[str, Callable[[Any], bool]] = {
    "max_new_tokens": lambda value: value >= 1,
    "temperature": lambda value: value > 0,
    "top_p": lambda value: 0 < value <= 1,
    "top_k": lambda value: value >= 0,
    "seed": lambda value: value >= 0,
    "repetition_penalty": lambda value: value > 0,
    "stop_strings": all,  # an empty text stands at the beginning of every answer
}


@dataclass(frozen=True)
class Sampling:
    """Settings of sampling. seed and the number of the question decide the random numbers of an answer."""

    max_new_tokens: int = 128
    temperature: float = 0.7
    top_p: float = 0.95
    top_k: int = 0
    greedy: bool = False
    seed: int = 1234
    repetition_penalty: float = 1.0
    stop_strings: Sequence[str] = ()


@dataclass
class Chatbot:
    """A model with the memory of one dialogue."""

    model: Any
    tokenizer: Any
    template: Any
    sampling: Sampling = field(default_factory=Sampling)
    system: str | None = None
    history: list[dict[str, str]] = field(default_factory=list)  # user and assistant in turn
    asked: int = 0  # questions so far, forgotten ones too
    last: tuple[str, list[dict[str, str]]] | None = None  # the last question, and the dialogue before it
    warned: bool = False  # that turns are left out, once

    def clear(self) -> None:
        """Forget the dialogue; the system message stays."""
        self.history, self.last = [], None

    def answer(self, question: str, show: Callable[[str], None] = lambda piece: None) -> str:
        """Return the answer to a question after the dialogue so far; show is called with each piece of it as it comes.

        Raises UserError if the question alone is longer than the model's context; the dialogue is then as before.
        Ctrl-C keeps the tokens so far as the answer, and is raised again.
        """
        import torch

        from inference.engine import check_finite, generate
        from inference.streaming import TextStream

        prompt, history = self.fitting_prompt(question)
        if len(history) < len(self.history) and not self.warned:
            self.warned = True
            limits = f"--max_new_tokens {self.sampling.max_new_tokens} do not fit into the {self.longest()} tokens"
            print(f"(The dialogue and {limits} that the model reads: it forgets the oldest turns.)", file=sys.stderr, flush=True)
        stream = TextStream(self.template, self.tokenizer, show)
        settings = {one.name: getattr(self.sampling, one.name) for one in fields(self.sampling) if one.name != "seed"}
        settings["max_new_tokens"] = min(settings["max_new_tokens"], self.longest() - len(prompt))
        ids = torch.tensor([prompt], device=self.model.device)
        try:
            generation = generate(
                self.model,
                ids,
                torch.ones_like(ids),
                stop_token_ids=self.template.stop_token_ids,
                pad_token_id=self.tokenizer.pad_token_id,
                row_seeds=[self.sampling.seed + self.asked],
                tokenizer=self.tokenizer,
                on_token=lambda row, token: stream.add(token),
                **settings,
            )
            check_finite(generation.log_probs, "try --dtype fp32, or another checkpoint.")
        except KeyboardInterrupt:
            if text := stream.finish():
                self.keep(history, question, text)
            raise
        text = stream.finish()
        self.keep(history, question, text)
        return text

    def keep(self, history: list[dict[str, str]], question: str, text: str) -> None:
        """Remember a question and its answer behind the turns that were kept."""
        self.history = [*history, {"role": "user", "content": question}, {"role": "assistant", "content": text}]
        self.asked += 1

    def longest(self) -> int:
        """Return how many tokens a prompt and its answer may have together: the context, less a prefix that takes places of it."""
        from models.heads import prefix_length

        return context_length(self.model.config) - prefix_length(self.model)

    def fitting_prompt(self, question: str) -> tuple[list[int], list[dict[str, str]]]:
        """Return token ids of the dialogue with the question at its end, and the turns of it that are kept.

        When dialogue and answer do not fit into the context, the oldest turns go; the last question always stays.
        """
        limit = self.longest()
        system = [{"role": "system", "content": self.system}] if self.system else []
        history = list(self.history)
        while True:
            messages = [*system, *history, {"role": "user", "content": question}]
            prompt = self.template.encode_prompt(self.tokenizer, messages)
            if len(prompt) + self.sampling.max_new_tokens <= limit:
                return prompt, history
            if not history:
                break
            history = history[2:]
        if len(prompt) >= limit:
            raise UserError(f"The question has {len(prompt)} tokens, the model reads {limit}; ask a shorter one.")
        return prompt, history


def context_length(config: Any) -> int:
    """Return how many tokens the model reads and writes together. BLOOM's config names none: it was trained on 2048."""
    names = ("max_position_embeddings", "max_sequence_length", "seq_length")
    return next((length for name in names if isinstance(length := getattr(config, name, None), int)), 2048)


def chat_folder(path: str) -> Path:
    """Return the folder of the model that talks: the path itself, or the actor in the output folder of step 3.

    Raises UserError where there is none, or a reward model.
    """
    from models.checkpoint_folder import models_inside, open_checkpoint
    from models.weight_files import PEFT_FILES

    folder = Path(path).expanduser()
    if folder.is_dir() and not any((folder / name).is_file() for name in ("config.json", PEFT_FILES[0])):
        if not (folder / "actor" / "config.json").is_file():
            inside = [model.path for model in models_inside(folder) if not model.gives_scores]
            found = f"no model itself; name one of those in it: {', '.join(inside)}"
            none = "no model (no config.json, no actor/); name the output folder of step 1 or 3"
            raise UserError(f"--path {path} holds {found if inside else none}.")
        folder = folder / "actor"
    if open_checkpoint(folder).gives_scores:
        raise UserError(f"--path {path} is a reward model, which does not talk; name an SFT model or an actor.")
    return folder


def load_chatbot(path: str, sampling: Sampling, system: str | None = None, dtype: str = "auto") -> Chatbot:
    """Load tokenizer, template and model of a folder onto this machine's device. UserError for what is wrong with it."""
    from models.checkpoint_folder import open_checkpoint
    from models.device import attention_implementation, detect_platform, resolve_dtype, set_device
    from models.load import load_causal_lm
    from models.templates import load_template
    from models.tokenizer import load_tokenizer

    checkpoint = open_checkpoint(chat_folder(path))
    platform = detect_platform()
    device = set_device(platform, 0)
    tokenizer = load_tokenizer(checkpoint)
    template = load_template(checkpoint, tokenizer)
    attention = attention_implementation("auto", platform)
    model = load_causal_lm(checkpoint, dtype=resolve_dtype(dtype, platform), attn=attention, tokenizer=tokenizer)
    return Chatbot(model.to(device).eval(), tokenizer, template, sampling, system)


# --- commands ---------------------------------------------------------------------------------------------------------


def command_help(bot: Chatbot, words: str) -> str:
    """Return the list of commands."""
    rows = [(f"{name} {command.words}".rstrip(), command.help) for name, command in COMMANDS.items()]
    return "\n".join(f"{name:<18} {text}" for name, text in [*rows, ("Ctrl-C", "stop this answer"), ("Ctrl-D", "end")])


def command_clear(bot: Chatbot, words: str) -> str:
    """Forget the dialogue."""
    bot.clear()
    return "(forgotten)"


def command_system(bot: Chatbot, words: str) -> str:
    """Set the system message, or remove it."""
    bot.system = words or None
    return f"(system message: {bot.system or 'none'})"


def command_set(bot: Chatbot, words: str) -> str:
    """Change a setting of sampling. Without words return all settings."""
    if words:
        name, value = setting(words)
        bot.sampling = replace(bot.sampling, **{name: value})
    return f"({', '.join(f'{name} {value}' for name, value in asdict(bot.sampling).items())})"


def command_retry(bot: Chatbot, words: str) -> None:
    """Answer the last question again, with new random numbers."""
    refuse(bot.last is None, "There is no question to answer again.")
    question, bot.history = bot.last
    speak(bot, question)


def command_save(bot: Chatbot, words: str) -> str:
    """Write the dialogue into a JSON file that step 1 reads."""
    refuse(not words, "/save needs the name of a file, such as /save dialogue.json.")
    refuse(not bot.history, "There is no dialogue to save.")
    system = [{"role": "system", "content": bot.system}] if bot.system else []
    text = json.dumps([{"messages": [*system, *bot.history]}], ensure_ascii=False, indent=1)
    try:
        Path(words).expanduser().write_text(f"{text}\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{words} cannot be written ({error.strerror}); name another file.") from error
    return f"(saved to {words})"


def command_quit(bot: Chatbot, words: str) -> None:
    """End the dialogue."""
    raise EOFError


@dataclass(frozen=True)
class Command:
    """A command of the dialogue. words: what follows its name. run: returns what is said about it."""

    words: str
    help: str
    run: Callable[[Chatbot, str], str | None]


COMMANDS = {
    "/help": Command("", "this list", command_help),
    "/clear": Command("", "forget the dialogue; the system message stays", command_clear),
    "/system": Command("TEXT", "the system message from now on; without TEXT none", command_system),
    "/set": Command("NAME VALUE", "a setting, such as /set temperature 0.3; alone it shows all", command_set),
    "/retry": Command("", "answer the last question again", command_retry),
    "/save": Command("FILE", "write the dialogue as JSON that step 1 reads", command_save),
    "/quit": Command("", "end", command_quit),
}


def setting(words: str) -> tuple[str, Any]:
    """Return name and value of a setting from the words of /set. Raise UserError for an unknown name or a wrong value."""
    name, _, text = words.partition(" ")
    name, usual = name.lstrip("-").replace("-", "_"), asdict(Sampling())
    refuse(name not in usual, f"/set knows no {name}; settings: {', '.join(usual)}.")
    truths = {"true": True, "on": True, "false": False, "off": False}
    kinds: dict[type, Callable[[str], Any]] = {bool: lambda word: truths[word.lower()], tuple: shlex.split}
    try:
        value = kinds.get(type(usual[name]), type(usual[name]))(text.strip())
    except (KeyError, ValueError):
        raise UserError(f"/set {name} {text}: the value cannot be read; the usual one is {usual[name]}.") from None
    check_setting(f"/set {name}", name, value)
    return name, value


def check_setting(label: str, name: str, value: Any, hint: str = "") -> None:
    """Raise UserError for a setting out of range."""
    if name in RIGHT and not RIGHT[name](value):
        wrong = "holds an empty text" if name == "stop_strings" else f"{value} is out of range"
        raise UserError(f"{label} {wrong}{hint}.")


# --- the terminal -----------------------------------------------------------------------------------------------------


def show(piece: str) -> None:
    """Print a piece of an answer at once."""
    print(piece, end="", flush=True)


def at_terminal() -> bool:
    """Return True if a person types and reads, False in a pipe."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def speak(bot: Chatbot, question: str) -> None:
    """Print the answer to a question as it comes."""
    bot.last = question, list(bot.history)  # first of all: Ctrl-C may fall between any two lines
    if at_terminal():
        print("Assistant: ", end="", flush=True)
    bot.answer(question, show)
    print(flush=True)


def respond(bot: Chatbot, line: str) -> None:
    """Run a command, or answer a question. Raise EOFError for /quit. Through a pipe only answers go to stdout."""
    name, _, words = BARE.get(line.lower(), line).partition(" ")
    if not re.fullmatch(r"/[a-z]+", name):
        speak(bot, line)
        return
    if name not in COMMANDS:
        near = nearest(name, COMMANDS)
        raise UserError(f"There is no command {name}; {f'did you mean {near}?' if near else '/help lists them.'}")
    message = COMMANDS[name].run(bot, words.strip())
    if message:
        print(message, file=sys.stdout if at_terminal() else sys.stderr, flush=True)


def converse(bot: Chatbot) -> None:
    """Answer question after question until /quit, Ctrl-D or the end of the pipe; two Ctrl-C at the prompt end too."""
    interactive = at_terminal()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (arrow keys and history in input())
        print("/help lists the commands, Ctrl-C stops an answer, Ctrl-D ends.")
    ending = answering = False
    while True:
        try:
            answering = False
            line = input("You: ") if interactive else sys.stdin.readline()
            ending = False
            if not interactive and line == "":
                return
            answering = True
            if line.strip():
                respond(bot, line.strip())
        except UserError as error:  # a question that is too long does not end a dialogue
            print(error, flush=True)
        except EOFError:
            if interactive and not answering:
                print()
            return
        except KeyboardInterrupt:
            if not interactive or ending:
                raise
            ending = not answering
            print("\n(stopped)" if answering else "\n(Ctrl-D, /quit or a second Ctrl-C ends)", flush=True)


DTYPES = ("auto", "fp32", "fp16", "bf16")
CHINESE = """在终端与训练所得的模型对话，使用训练时的模板和停止符。

    python chat.py --path output/step3-models/1.3b
    python chat.py --path output/actor-models/1.3b --prompt "What is the capital of France?" --greedy
    python chat.py --path output/step3-models/1.3b --compare output/actor-models/1.3b --web      网页；并排对比，可投票

/help 列出对话中的命令。Ctrl-C 停止当前回答。问题也可由管道逐行输入。
"""


def build_parser() -> CommandLine:
    """Define the flags of chat.py; DeepSpeed-Chat's had --path and --max_new_tokens."""
    parser = CommandLine("chat.py --help lists the flags.", prog="chat.py", description=__doc__, zh=CHINESE)
    add = parser.add_argument
    add("--path", help="folder of an SFT model, an actor or a LoRA adapter, output folder of step 3, or a hub id",
        zh="SFT 模型、actor 或 LoRA 适配器的文件夹，第三步的输出文件夹，或 hub 上的名称")
    add("--prompt", help="ask this one question, print the answer, end", zh="只问这一个问题，打印回答后结束")
    add("--system", help="a system message at the start of the dialogue", zh="对话开头的系统消息")
    add_sampling_flags(parser)
    add("--dtype", default="auto", choices=DTYPES, help="of the weights (%(default)s)",
        zh="权重的数值类型（%(default)s）")
    add_page_flags(parser)
    return parser


def add_sampling_flags(parser: CommandLine) -> None:
    """Define the flags of Sampling."""
    usual, add = Sampling(), parser.add_argument
    add("--max_new_tokens", type=int, default=usual.max_new_tokens, help="longest answer in tokens (%(default)s)",
        zh="回答的最大 token 数（%(default)s）")
    add("--temperature", type=float, default=usual.temperature, help="1 as trained, less is safer (%(default)s)",
        zh="1 即训练所得的分布，越小越稳（%(default)s）")
    add("--top_p", type=float, default=usual.top_p, help="draw from this share of probability (%(default)s)",
        zh="从累计概率达到该比例的 token 中采样（%(default)s）")
    add("--top_k", type=int, default=usual.top_k, help="draw from so many tokens; 0 = all (%(default)s)",
        zh="从最可能的这么多个 token 中采样；0 = 全部（%(default)s）")
    add("--greedy", action="store_true", help="always the likeliest token", zh="总取最可能的 token")
    penalty = "above 1, such as 1.1: what dialogue and answer have said becomes less likely (%(default)s)"
    less = "大于 1，例如 1.1：对话和回答中出现过的内容概率降低（%(default)s）"
    add("--repetition_penalty", type=float, default=usual.repetition_penalty, help=penalty, zh=less)
    add("--stop_strings", nargs="+", default=[], metavar="TEXT", help="an answer ends with the first of these texts in it, too",
        zh="回答中出现这些文本之一时也结束")
    add("--seed", type=int, default=usual.seed, help="same seed, same answers (%(default)s)",
        zh="种子相同则回答相同（%(default)s）")


def sampling_of(args: argparse.Namespace) -> Sampling:
    """Return the settings that the flags of Sampling give. UserError for one out of range."""
    for name in RIGHT:
        hint = " (--greedy takes the likeliest token)" if name == "temperature" else ""
        check_setting(f"--{name}", name, getattr(args, name), f"{hint}; --help says what it means")
    return Sampling(**{one.name: getattr(args, one.name) for one in fields(Sampling)})


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line. UserError for whatever is wrong with it."""
    parser = build_parser()
    args = read(parser, argv)
    refuse(
        not (args.path or args.server),
        "chat.py needs --path: the folder of an SFT model or actor, or the output folder of step 3.",
    )
    args.sampling = sampling_of(args)
    if args.prompt is not None and not args.prompt.strip():
        raise UserError("--prompt is empty; write a question, or leave the flag out for a dialogue.")
    check_page(args, parser)
    return args


@told
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, or 2 for wrong input."""
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        if args.web or args.server:
            return open_page(args)
        folder = chat_folder(args.path)  # before torch is imported, which takes seconds
        if sys.stderr.isatty():
            print(f"loading {folder} …", file=sys.stderr, flush=True)
        quiet()
        bot = load_chatbot(args.path, args.sampling, args.system, args.dtype)
        if args.prompt is not None:
            bot.answer(args.prompt.strip(), show)
            print(flush=True)
        else:
            converse(bot)
    except KeyboardInterrupt:
        print()
    return 0


def open_page(args: argparse.Namespace) -> int:
    """Serve the web page until a signal ends it. UserError if its packages are missing."""
    try:
        from inference import web
    except ModuleNotFoundError as error:
        raise UserError(f"the web page needs {error.name}; install its packages: pip install -r requirements-serve.txt.") from error
    web.serve(args)
    return 0


def quiet() -> None:
    """Leave only the dialogue on the terminal; bytes that are no UTF-8 in a pipe become question marks, not a traceback."""
    from models.quiet import quiet_libraries

    quiet_libraries()
    for stream in (sys.stdin, sys.stdout):
        with contextlib.suppress(AttributeError):  # a test's stand-in has no encoding
            stream.reconfigure(errors="replace")
