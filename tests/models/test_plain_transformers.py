"""A process that has transformers alone talks to a saved model as chat.py does."""

import json
import os
import subprocess
import sys

import torch

from inference.chatbot import Sampling, load_chatbot
from models.load import load_causal_lm, load_tokenizer
from models.save import save_model
from models.templates import load_template
from tests.models.test_templates import FORGETFUL_CHAT

DIALOGUE = ["How do I bake bread?", "怎么做面包？"]
TOKENS = 12
PLAIN = """
import importlib.util, json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
assert importlib.util.find_spec("models") is None and importlib.util.find_spec("inference") is None
answers = []
for folder in json.loads(sys.argv[1]):
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    messages = [{"role": "system", "content": "Be brief."}]
    for question in json.loads(sys.argv[2]):
        messages.append({"role": "user", "content": question})
        batch = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        made = model.generate(**batch, max_new_tokens=int(sys.argv[3]), do_sample=False)
        answer = tokenizer.decode(made[0, batch["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        messages.append({"role": "assistant", "content": answer})
        answers.append(answer)
print(json.dumps(answers))
"""


def test_plain_transformers_answers_as_chat_does(folder_of, tmp_path):
    folders, ours = [], []
    for family, chat in (("opt", None), ("llama", FORGETFUL_CHAT), ("qwen2", None)):
        base = folder_of(family)
        tokenizer = load_tokenizer(base)
        tokenizer.chat_template = chat or tokenizer.chat_template
        folders.append(str(tmp_path / family))
        save_model(load_causal_lm(base, dtype=torch.float32), tokenizer, load_template(None, tokenizer), folders[-1])
        bot = load_chatbot(folders[-1], Sampling(max_new_tokens=TOKENS, greedy=True), "Be brief.", "fp32")
        ours += [bot.answer(question) for question in DIALOGUE]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", "-c", PLAIN, json.dumps(folders), json.dumps(DIALOGUE), str(TOKENS)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == ours
    assert any(ours)
