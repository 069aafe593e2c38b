"""Open saved folders in a process that has transformers alone, and in ours, with the same questions."""

import json
import subprocess
import sys
from pathlib import Path

import torch

from inference.chatbot import Sampling, load_chatbot
from models.load import load_causal_lm, load_scalar_model
from models.templates import load_template
from models.tokenizer import load_tokenizer
from tests.closeness import assert_close
from tests.launching import environment

QUESTIONS = ["How do I bake bread?", "怎么做面包？"]
SYSTEM = "Be brief."
TOKENS = 12
PROGRAM = """
import importlib.util, json, sys, torch
from pathlib import Path
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
assert importlib.util.find_spec("models") is None and importlib.util.find_spec("inference") is None
folders, questions, system, length = json.loads(sys.argv[1])
found = []
for folder in folders:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    scores = config.architectures[0].endswith("ForSequenceClassification")
    auto_class = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    model = auto_class.from_pretrained(folder, trust_remote_code=True, dtype="float32")
    messages, answers = [{"role": "system", "content": system}], []
    for question in questions:
        messages.append({"role": "user", "content": question})
        batch = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        if not answers:
            with torch.no_grad():
                logits = model(**batch).logits
        if scores:
            break
        made = model.generate(**batch, max_new_tokens=length, do_sample=False)
        answers.append(tokenizer.decode(made[0, batch["input_ids"].shape[1] :], skip_special_tokens=True).strip())
        messages.append({"role": "assistant", "content": answers[-1]})
    found.append((logits, answers))
torch.save(found, "found.pt")
"""


def assert_plain_transformers_does_as_we_do(folders: list[Path], at: Path) -> list[str]:
    """Fail unless transformers alone gives our logits for the first question, and chat.py's greedy answers; returns them.

    Reward models: their score. at: where the process runs, which cannot import this project.
    """
    words = json.dumps([[str(folder) for folder in folders], QUESTIONS, SYSTEM, TOKENS])
    env = environment(HF_MODULES_CACHE=str(at / "modules"))
    command = [sys.executable, "-I", "-c", PROGRAM, words]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=at, check=False)
    assert done.returncode == 0, done.stderr
    said = []
    for folder, (logits, answers) in zip(folders, torch.load(at / "found.pt"), strict=True):
        tokenizer = load_tokenizer(folder)
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTIONS[0]}]
        ids = torch.tensor([load_template(folder, tokenizer).encode_prompt(tokenizer, messages)])
        model = (load_causal_lm if answers else load_scalar_model)(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            assert_close(logits, model(ids).logits, 1e-5)
        if answers:
            bot = load_chatbot(str(folder), Sampling(max_new_tokens=TOKENS, greedy=True), SYSTEM, "fp32")
            assert answers == [bot.answer(question) for question in QUESTIONS], folder
        said += answers
    return said
