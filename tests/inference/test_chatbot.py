"""chat.py: which tokens the model gets to see, what it forgets when, and the dialogue through pipe and terminal."""

import copy
import errno
import io
import os
import pty
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from errors import UserError
from inference.chatbot import Chatbot, Sampling, chat_folder, context_length, load_chatbot, main
from models.load import load_scalar_model, load_tokenizer
from models.save import save_model
from models.templates import load_template
from tests.launching import REPOSITORY, environment
from tests.tiny import tiny_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny chat model with 256 positions."""
    return tiny_checkpoint(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture
def bot(model) -> Chatbot:
    return load_chatbot(str(model), Sampling(max_new_tokens=8, greedy=True))


@pytest.fixture
def chat(monkeypatch, capsys):
    """Run the command in this process; returns exit code, what was printed, and what was said on stderr."""

    def run(*flags: str, text: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text), encoding="utf-8"))
        capsys.readouterr()
        return main(list(flags)), *capsys.readouterr()

    return run


def said(bot: Chatbot, messages: list[dict[str, str]], tokens: int = 8, **more) -> str:
    """What transformers itself answers, greedily, to a dialogue written by the checkpoint's template."""
    ids = torch.tensor([bot.template.encode_prompt(bot.tokenizer, messages)])
    made = bot.model.generate(
        ids, max_new_tokens=tokens, do_sample=False, eos_token_id=list(bot.template.stop_token_ids),
        pad_token_id=bot.tokenizer.pad_token_id, **more,
    )  # fmt: skip
    return bot.template.decode_answer(bot.tokenizer, made[0, ids.shape[1] :].tolist())


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


# --- the dialogue -----------------------------------------------------------------------------------------------------


def test_each_answer_continues_the_whole_dialogue_in_the_trained_template(bot):
    first = bot.answer("What is bread?")
    assert first == said(bot, [user("What is bread?")])
    second = bot.answer("And flour?")
    dialogue = [user("What is bread?"), assistant(first), user("And flour?")]
    assert second == said(bot, dialogue)
    assert bot.history == [*dialogue, assistant(second)]


def test_an_answer_comes_in_pieces(bot):
    pieces: list[str] = []
    text = bot.answer("What is bread?", pieces.append)
    assert "".join(pieces) == text == said(bot, [user("What is bread?")])
    assert len(pieces) > 1 and "" not in pieces


def test_clear_forgets_everything_but_the_system_message(bot):
    bot.system = "Be brief."
    alone = bot.answer("What is bread?")
    assert alone == said(bot, [{"role": "system", "content": "Be brief."}, user("What is bread?")])
    bot.answer("And flour?")
    bot.clear()
    assert bot.history == [] and bot.answer("What is bread?") == alone


def test_the_oldest_turns_go_when_the_context_is_full(bot, capsys):
    limit = context_length(bot.model.config)
    assert limit == 256
    bot.system = "Be brief."
    for number in range(12):
        question = f"question {number} " + "bread " * 10
        prompt, kept = bot.fitting_prompt(question)
        assert len(prompt) + 8 <= limit
        assert kept == bot.history[len(bot.history) - len(kept) :] and len(kept) % 2 == 0
        if len(kept) < len(bot.history):  # one turn more would not have fitted
            more = [{"role": "system", "content": "Be brief."}, *bot.history[-len(kept) - 2 :], user(question)]
            assert len(bot.template.encode_prompt(bot.tokenizer, more)) + 8 > limit
        bot.answer(question)
    assert len(kept) < 22
    assert capsys.readouterr().err.count("it forgets the oldest turns") == 1
    assert bot.history[0]["role"] == "user" and not bot.history[0]["content"].startswith("question 0")


def test_a_model_whose_weights_are_not_numbers_is_told(bot, monkeypatch):
    monkeypatch.setattr(bot, "model", copy.deepcopy(bot.model))
    with torch.no_grad():
        next(bot.model.parameters())[:] = float("nan")
    with pytest.raises(UserError, match=r"not finite numbers.*--dtype fp32"):
        bot.answer("hello")
    assert bot.history == []


def test_a_question_that_nearly_fills_the_context_leaves_less_room_for_the_answer(bot):
    unit = len(bot.template.encode_prompt(bot.tokenizer, [user("bread " * 2)])) - len(
        bot.template.encode_prompt(bot.tokenizer, [user("bread " * 1)])
    )
    bot.answer("hello")
    question = "bread " * (245 // unit)
    prompt, kept = bot.fitting_prompt(question)
    while len(prompt) < 252:
        question += "bread "
        prompt, kept = bot.fitting_prompt(question)
    assert kept == [] and 252 <= len(prompt) < 256
    bot.answer(question)
    before = list(bot.history)
    with pytest.raises(UserError, match="the model reads 256"):
        bot.answer("bread " * 300)
    assert bot.history == before


def test_the_seed_decides_and_each_question_draws_anew(model):
    answers = []
    for seed in (1, 1, 2):
        bot = load_chatbot(str(model), Sampling(max_new_tokens=12, temperature=1.0, top_p=1.0, seed=seed))
        one = bot.answer("What is bread?")
        bot.clear()
        answers.append((one, bot.answer("What is bread?")))
    assert answers[0] == answers[1] != answers[2]
    assert answers[0][0] != answers[0][1]


# --- which folder -----------------------------------------------------------------------------------------------------


def test_penalty_and_stop_strings_of_the_command_line_reach_the_answer(model, capsys):
    """As transformers penalises; and an answer ends with the token that completes one of the strings."""
    flags = ["--path", str(model), "--prompt", "What is bread?", "--greedy", "--max_new_tokens", "12"]
    bot = load_chatbot(str(model), Sampling())

    def printed(*more: str) -> str:
        assert main([*flags, *more]) == 0
        return capsys.readouterr().out.removesuffix("\n")

    plain, penalised = printed(), printed("--repetition_penalty", "1.8")
    assert plain == said(bot, [user("What is bread?")], 12)
    assert penalised == said(bot, [user("What is bread?")], 12, repetition_penalty=1.8) != plain
    middle = plain[len(plain) // 2 - 1 : len(plain) // 2 + 1]
    ended = printed("--stop_strings", "never said", middle)
    assert plain.startswith(ended) and middle in ended and len(ended) < len(plain)


def test_the_output_folder_of_step_3_means_its_actor(model, tmp_path):
    shutil.copytree(model, tmp_path / "actor")
    (tmp_path / "critic").mkdir()
    assert chat_folder(str(tmp_path)) == tmp_path / "actor"
    assert chat_folder(str(model)) == model


def test_a_reward_model_and_an_empty_folder_are_refused(model, tmp_path):
    tokenizer, scalar = load_tokenizer(model), load_scalar_model(model, dtype=torch.float32)
    save_model(scalar, tokenizer, load_template(model, tokenizer), tmp_path / "rm")
    with pytest.raises(UserError, match="is a reward model"):
        chat_folder(str(tmp_path / "rm"))
    with pytest.raises(UserError, match="holds no model"):
        chat_folder(str(tmp_path))


def test_context_length_of_families(tmp_path):
    from transformers import BloomConfig, GPT2Config, OPTConfig

    assert context_length(GPT2Config(n_positions=77)) == 77
    assert context_length(OPTConfig(max_position_embeddings=55)) == 55
    assert context_length(BloomConfig()) == 2048


# --- as a user runs it ------------------------------------------------------------------------------------------------


def test_one_question(model, bot, chat):
    answer = said(bot, [user("What is bread?")])
    assert chat("--path", str(model), "--prompt", "What is bread?", "--greedy", "--max-new-tokens", "8")[:2] == (0, answer + "\n")


def test_a_dialogue_through_a_pipe(model, bot, chat):
    """clear in the middle: the last answer is as to a first question. Only answers are printed, none after stop."""
    text = b"What is bread?\n\nAnd flour?\n  clear \nWhat is bread?\nstop\nAnd flour?\n"
    first = said(bot, [user("What is bread?")])
    second = said(bot, [user("What is bread?"), assistant(first), user("And flour?")])
    assert chat("--path", str(model), "--greedy", "--max_new_tokens", "8", text=text)[:2] == (0, f"{first}\n{second}\n{first}\n")


def test_the_end_of_the_pipe_ends_the_dialogue_and_odd_bytes_do_not(model, chat):
    code, _, errors = chat("--path", str(model), "--greedy", "--max_new_tokens", "4", text=b"caf\xe9?\nlast line without end")
    assert (code, errors) == (0, "")


class Terminal:
    """chat.py at a terminal of its own."""

    def __init__(self, *flags: str) -> None:
        self.side, other = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "chat.py", *flags], cwd=REPOSITORY, env=environment(TERM="dumb"), stdin=other,
            stdout=other, stderr=subprocess.PIPE, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests in the background have it ignored
        )  # fmt: skip
        os.close(other)
        self.shown = ""

    def until(self, text: str, count: int = 1) -> None:
        """Read what is shown until the text has come so many times."""
        deadline = time.monotonic() + 90
        while self.shown.count(text) < count:
            assert time.monotonic() < deadline, self.shown
            try:
                self.shown += os.read(self.side, 4096).decode()
            except OSError as error:
                assert error.errno == errno.EIO, error
                pytest.fail(f"ended: {self.shown}\n{self.process.stderr.read().decode()}")

    def type(self, text: str) -> None:
        os.write(self.side, text.encode())

    def end(self) -> int:
        code = self.process.wait(timeout=60)
        assert self.process.stderr.read() == b""
        os.close(self.side)
        return code


def test_a_terminal_shows_both_voices_and_control_c_ends_cleanly(model):
    terminal = Terminal("--path", str(model), "--greedy", "--max_new_tokens", "4")
    terminal.until("You: ")
    terminal.type("What is bread?\n")
    terminal.until("Assistant: ")
    terminal.until("You: ", 2)
    terminal.type("clear\n")
    terminal.until("(forgotten)")
    terminal.until("You: ", 3)
    time.sleep(0.5)  # the prompt is shown a moment before readline listens
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.end() == 0


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], "chat.py needs --path"),
        (["--pathh", "x"], "did you mean --path"),
        (["--path", "missing/model", "--prompt", "hi"], "missing/model"),
        (["--path", "x", "--temperature", "0"], "--greedy"),
        (["--path", "x", "--top_p", "1.5"], "--top_p 1.5 is out of range"),
        (["--path", "x", "--max_new_tokens", "many"], "invalid int value: 'many'"),
        (["--path", "x", "--prompt", " "], "--prompt is empty"),
        (["--path", "x", "--repetition_penalty", "0"], "--repetition_penalty"),
        (["--path", "x", "--stop_strings", "a", ""], "--stop_strings"),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_code_2(chat, flags, sentence):
    code, shown, error = chat(*flags)
    assert code == 2 and shown == ""
    assert error.startswith("error: ") and error.count("\n") == 1 and sentence in error


def test_a_damaged_folder_is_told(model, tmp_path, chat):
    folder = tmp_path / "copy"
    shutil.copytree(model, folder)
    (folder / "model.safetensors").write_bytes(b"\0" * 100)
    code, _, error = chat("--path", str(folder), "--prompt", "hi")
    assert code == 2 and "truncated or damaged" in error
    (folder / "config.json").write_text("{")
    code, _, error = chat("--path", str(folder), "--prompt", "hi")
    assert code == 2 and "config.json" in error
