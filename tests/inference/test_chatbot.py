"""chat.py: which tokens the model gets to see, what it forgets when, and the dialogue through pipe and terminal."""

import copy
import io
import json
import os
import pty
import select
import shutil
import signal
import sys
import time

import pytest
import torch

from errors import UserError
from inference.chatbot import (
    COMMANDS,
    Chatbot,
    Sampling,
    chat_folder,
    context_length,
    load_chatbot,
    main,
    respond,
    speak,
)
from models.adapters.lora import add_lora, merged_state_dict, save_adapter
from models.checkpoint_folder import open_checkpoint
from models.load import load_causal_lm, load_scalar_model
from models.save import save_model
from models.templates import load_template
from models.tokenizer import load_tokenizer
from tests.launching import FORKS, environment
from tests.tiny import tiny_checkpoint
from training.utils.data.records import load_records


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
    ends = {"eos_token_id": list(bot.template.stop_token_ids), "pad_token_id": bot.tokenizer.pad_token_id}
    made = bot.model.generate(ids, max_new_tokens=tokens, do_sample=False, **ends, **more)
    return bot.template.decode_answer(bot.tokenizer, made[0, ids.shape[1] :].tolist())


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


# --- the dialogue -----------------------------------------------------------------------------------------------------


def test_each_answer_continues_the_whole_dialogue_in_the_trained_template(bot):
    """Until it is cleared, but for the system message. An answer comes in pieces."""
    bot.system = "Be brief."
    system = {"role": "system", "content": "Be brief."}
    pieces: list[str] = []
    first = bot.answer("What is bread?", pieces.append)
    assert "".join(pieces) == first == said(bot, [system, user("What is bread?")])
    assert len(pieces) > 1 and "" not in pieces
    second = bot.answer("And flour?")
    dialogue = [user("What is bread?"), assistant(first), user("And flour?")]
    assert second == said(bot, [system, *dialogue])
    assert bot.history == [*dialogue, assistant(second)]
    bot.clear()
    assert bot.history == [] and bot.answer("What is bread?") == first


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
    bot.answer("hello")
    question, prompt = "bread ", []
    while len(prompt) < 252:
        question += "bread "
        prompt, kept = bot.fitting_prompt(question)
    assert kept == [] and len(prompt) < 256
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


def test_which_folder_talks(model, tmp_path):
    """The output folder of step 3 means its actor; a reward model and an empty folder are refused."""
    shutil.copytree(model, tmp_path / "step3" / "actor")
    assert chat_folder(str(tmp_path / "step3")) == tmp_path / "step3" / "actor"
    assert chat_folder(str(model)) == model
    tokenizer, scalar = load_tokenizer(model), load_scalar_model(model, dtype=torch.float32)
    save_model(scalar, tokenizer, load_template(model, tokenizer), tmp_path / "rm")
    with pytest.raises(UserError, match="is a reward model"):
        chat_folder(str(tmp_path / "rm"))
    with pytest.raises(UserError, match=f"name one of those in it: {tmp_path}/step3/actor[.]$"):
        chat_folder(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no model"):
        chat_folder(str(tmp_path / "empty"))
    with pytest.raises(UserError, match=f"no config.json itself.*{tmp_path}/rm .a reward model., {tmp_path}/step3/actor[.]$"):
        open_checkpoint(tmp_path)
    with pytest.raises(UserError, match="folder output/missing does not exist; train first"):
        open_checkpoint("output/missing")


def test_an_adapter_opens_over_the_model_that_it_names(model, tmp_path):
    """It answers as the merged model in whose folder training writes it."""
    adapted, tokenizer = add_lora(load_causal_lm(model, dtype=torch.float32), 2, 6), load_tokenizer(model)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    save_model(adapted, tokenizer, load_template(model, tokenizer), tmp_path, merged_state_dict(adapted))
    save_adapter(adapted, tmp_path / "adapter")
    bots = [load_chatbot(str(path), Sampling(12, greedy=True)) for path in (model, tmp_path, tmp_path / "adapter")]
    plain, merged, alone = (bot.answer("What is bread?") for bot in bots)
    assert alone == merged != plain
    config = tmp_path / "adapter" / "adapter_config.json"
    content = json.loads(config.read_text(encoding="utf-8"))
    for change, sentence in (
        ({"base_model_name_or_path": None}, "names no model"),
        ({"base_model_name_or_path": str(tmp_path / "missing")}, "missing does not exist"),
        ({"task_type": "SEQ_CLS"}, "is a reward model, which does not talk"),
        ({"peft_type": "IA3"}, "adapters of the kind IA3 do not open"),
    ):
        config.write_text(json.dumps(content | change), encoding="utf-8")
        with pytest.raises(UserError, match=sentence):
            chat_folder(str(config.parent))


def test_context_length_of_families(tmp_path):
    from transformers import BloomConfig, GPT2Config, OPTConfig

    assert context_length(GPT2Config(n_positions=77)) == 77
    assert context_length(OPTConfig(max_position_embeddings=55)) == 55
    assert context_length(BloomConfig()) == 2048


# --- as a user runs it ------------------------------------------------------------------------------------------------


def test_a_dialogue_through_a_pipe(model, bot, chat):
    """clear in the middle: the last answer is as to a first question. Only answers are printed, none after stop."""
    flags = ["--path", str(model), "--greedy", "--max-new-tokens", "8"]
    first = said(bot, [user("What is bread?")])
    second = said(bot, [user("What is bread?"), assistant(first), user("And flour?")])
    text = b"What is bread?\n\nAnd flour?\n  clear \nWhat is bread?\nstop\nAnd flour?\n"
    assert chat(*flags, text=text)[:2] == (0, f"{first}\n{second}\n{first}\n")
    assert chat(*flags, "--prompt", "What is bread?")[:2] == (0, f"{first}\n")
    code, _, errors = chat(*flags, text=b"caf\xe9?\nlast line without end")
    assert (code, errors) == (0, ""), "the end of the pipe ends the dialogue, odd bytes do not"


def chat_at(terminal: str, flags: list[str]) -> None:
    """Run the command at a terminal, in a process of its own."""
    os.setsid()
    side = os.open(terminal, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(side, number)
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background have it ignored
    os.environ.update(environment(TERM="dumb"))
    sys.exit(main(flags))


def test_a_terminal_shows_both_voices_and_control_c_stops_an_answer(model):
    """And at the prompt the first one only says how to end."""
    side, other = pty.openpty()
    flags = ["--path", str(model), "--max_new_tokens", "200", "--temperature", "20", "--top_p", "1"]
    process = FORKS.Process(target=chat_at, args=(os.ttyname(other), flags))
    process.start()
    shown = ""

    def until(text: str, count: int) -> None:
        nonlocal shown
        while shown.count(text) < count:
            assert select.select([side], [], [], 300)[0], shown
            shown += os.read(side, 4096).decode(errors="replace")

    until("You: ", 1)
    assert shown.startswith(f"loading {model} …")
    os.write(side, b"What is bread?\n")
    until("Assistant: ", 1)
    os.kill(process.pid, signal.SIGINT)
    until("You: ", 2)
    os.write(side, b"/set max_new_tokens 4\n/retry\nclear\n/clear it\n")
    until("You: ", 6)
    assert shown.count("(stopped)") == 1 and shown.count("Assistant: ") == 2 and shown.count("(forgotten)") == 2, shown
    for ended in (False, True):
        time.sleep(0.5)  # the prompt is shown a moment before readline listens
        os.kill(process.pid, signal.SIGINT)
        if not ended:
            until("You: ", 7)
    process.join(300)
    assert process.exitcode == 0 and "a second Ctrl-C ends" in shown and "Traceback" not in shown
    os.close(other)
    os.close(side)


def test_control_c_keeps_what_was_said(bot, monkeypatch):
    """Before the first token nothing is kept."""

    def stop_after(tokens: int):
        pieces: list[str] = []

        def show(piece: str) -> None:
            pieces.append(piece)
            if len(pieces) == tokens:
                raise KeyboardInterrupt

        return pieces, show

    pieces, show = stop_after(2)
    with pytest.raises(KeyboardInterrupt):
        bot.answer("What is bread?", show)
    assert bot.history[0] == user("What is bread?") and bot.history[1]["content"].startswith("".join(pieces[:2]))
    before = list(bot.history)
    monkeypatch.setattr("inference.engine.generate", lambda *args, **more: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        speak(bot, "And flour?")
    assert bot.history == before and bot.last == ("And flour?", before)


def test_commands_of_the_dialogue(model, bot, chat, tmp_path):
    """They go to the program, all else to the model; wrong ones are told and change nothing."""
    first = said(bot, [user("What is bread?")])
    system = {"role": "system", "content": "Be brief."}
    brief = said(bot, [system, user("What is bread?")], 3)
    file = tmp_path / "dialogue.json"
    text = f"""What is bread?
/retry
/clear
/system Be brief.
/set max_new_tokens 3
/set greedy off
/set greedy on
What is bread?
/save {file}
/help
/quit
What is bread?
"""
    code, shown, notes = chat("--path", str(model), "--greedy", "--max_new_tokens", "8", text=text.encode())
    assert (code, shown) == (0, f"{first}\n{first}\n{brief}\n")
    assert "max_new_tokens 3" in notes and all(name in notes for name in COMMANDS)
    saved = json.loads(file.read_text(encoding="utf-8"))
    assert saved == [{"messages": [system, user("What is bread?"), assistant(brief)]}]
    records = load_records(str(file), cache_dir=str(tmp_path / "cache"))["train"]
    assert records[0]["messages"] == [system, user("What is bread?")] and records[0]["chosen"] == brief


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("/hlep", "did you mean /help"),
        ("/xyz", "/help lists them"),
        ("/retry", "no question"),
        ("/save", "needs the name of a file"),
        ("/set temprature 1", "settings: max_new_tokens"),
        ("/set temperature 0", "/set temperature 0.0 is out of range"),
        ("/set greedy perhaps", "cannot be read"),
        ("/set top_k", "cannot be read"),
    ],
)
@pytest.mark.fast
def test_a_wrong_command_is_one_sentence_and_changes_nothing(line, sentence):
    bot = Chatbot(None, None, None)
    with pytest.raises(UserError, match=sentence):
        respond(bot, line)
    assert bot == Chatbot(None, None, None)


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
    assert code == 2 and "is truncated" in error
    (folder / "config.json").write_text("{")
    code, _, error = chat("--path", str(folder), "--prompt", "hi")
    assert code == 2 and "config.json" in error
