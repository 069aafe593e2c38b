"""Train step 1 on a base whose tokenizer has a new end token, with LoRA and with all weights, and count the answers that end.

    OMP_NUM_THREADS=1 python -m benchmarks.end_token --output output/end_token        # three minutes on one core

The base is a LLaMA (matrices apart) or a Qwen2 (tied) with a byte a token, trained on the same dialogues in the Human/Assistant
form. Then its tokenizer gets two ids more than the embedding has rows, with which a chat template opens and ends each turn. Asked
are twelve of the questions trained on.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from benchmarks.runs import as_flags, byte_tokenizer, print_table
from models.checkpoint_folder import open_checkpoint
from steps import step_of
from training.evaluate.common import LoadedModel, load_for_evaluation

ROWS, ASKED = 408, 12
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
CONFIGS = {
    "LLaMA": LlamaConfig(vocab_size=ROWS, **SIZES),
    "Qwen2, tied": Qwen2Config(vocab_size=ROWS, tie_word_embeddings=True, **SIZES),
}
WAYS = {"LoRA": {"lora_dim": 16, "lora_learning_rate": 5e-3}, "all weights": {"learning_rate": 5e-3}}
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_base(output: Path, config) -> Path:
    """Write a checkpoint that knows the dialogues and whose tokenizer has two tokens without a row; returns its folder."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(output / "random")
    tokenizer = byte_tokenizer(ROWS)
    tokenizer.save_pretrained(output / "random")
    folder = train(output, output / "random", f"{config.model_type}-base", WAYS["all weights"])
    (folder / "sanbu_template.json").unlink()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token, tokenizer.chat_template = "<|im_end|>", TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def train(output: Path, model: Path, name: str, flags: dict[str, object]) -> Path:
    """Train a model by step 1; returns its folder."""
    common = {"model_name_or_path": model, "data_path": output / "data.json", "output_dir": output / name, "dtype": "fp32"}
    common |= {"data_split": "1,0,0", "num_train_epochs": 30, "per_device_train_batch_size": 16, "max_seq_len": 128}
    with (output / "log").open("a") as log:
        command = [sys.executable, "-m", step_of("sft").module, *as_flags(common | flags)]
        subprocess.run(command, check=True, stdout=log, stderr=log)
    return output / name


def end_of_answers(loaded: LoadedModel, questions: list[str], answers: list[str]) -> list[object]:
    """Return how many greedy answers end, how many of them say "It is 12.", and of the end token behind the answers trained on
    the worst rank and the mean probability.
    """
    asked = [[{"role": "user", "content": question}] for question in questions]
    prompts = loaded.encode(asked, 32, "32")
    found = loaded.answer(prompts, max_new_tokens=32, max_batch=ASKED, greedy=True)
    ranks, chances = [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = [*prompt, *loaded.template.encode_answer(loaded.tokenizer, answer)]
        with torch.no_grad():
            chance = loaded.model(torch.tensor([ids])).logits[0, -2].softmax(-1)
        ranks.append(int((chance > chance[ids[-1]]).sum()))
        chances.append(float(chance[ids[-1]]))
    whole = sum(one.ended and bool(re.fullmatch(r"It is \d+\.", one.text)) for one in found)
    return [f"{sum(one.ended for one in found)} of {len(found)}", whole, max(ranks), f"{sum(chances) / len(chances):.3f}"]


def main() -> None:
    """Train the four models and print their table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    records = [{"prompt": f"What is {i} plus 1?", "response": f"It is {i + 1}."} for i in range(64)]
    (output / "data.json").write_text(json.dumps(records), encoding="utf-8")
    asked = [list(texts)[:ASKED] for texts in zip(*(record.values() for record in records), strict=True)]

    def rows():
        for name, config in CONFIGS.items():
            base = write_base(output, config)
            for number, (way, flags) in enumerate(WAYS.items()):
                folder = train(output, base, f"{config.model_type}-{number}", flags)
                loaded = load_for_evaluation(open_checkpoint(folder), "fp32", "auto")
                yield [name, way, *end_of_answers(loaded, *asked)]

    print_table(("model", "trained", "answers that end", "in whole", "worst rank of the end token", "its mean probability"), rows())


if __name__ == "__main__":
    main()
