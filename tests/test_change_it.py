"""The diffs of docs/en/change-it.md apply to the files as they are, are short, and do what the page says."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = (REPOSITORY / "docs/en/change-it.md").read_text(encoding="utf-8")
DIFFS = re.findall(r"```diff\n(.*?)```", PAGE, flags=re.DOTALL)
PROGRAM = """
import importlib.util
import json
from types import SimpleNamespace

import torch
from transformers import Phi3Config, Phi3ForCausalLM

from models.adapters.lora import lora_targets
from scripts.launch.platforms import load_platforms
from steps import step_of
from training.step3_ppo.ppo_trainer import DeepSpeedPPOTrainer
from training.utils.data.formats import recognise
from training.utils.flags.parse import parse
from training.utils.flags.recipe import Recipe

found = {}
new, old, mask = torch.tensor([[-1.0, -2.0, -9.0]]), torch.tensor([[-2.0, -2.5, -3.0]]), torch.tensor([[True, True, False]])
micro = SimpleNamespace(old_log_probs=old, ref_log_probs=old, advantages=torch.zeros(1, 3), action_mask=mask, joined=lambda: None)
losses = []
for weight in ("0", "3"):
    flags = ["--actor_model_name_or_path", "a", "--critic_model_name_or_path", "c", "--data_path", "d", "--output_dir", "o"]
    args = parse(step_of("ppo").arguments_class, [*flags, "--ratio_penalty", weight])
    engine = SimpleNamespace(actor=None, answer_log_probs=lambda *_, **__: new)
    trainer = SimpleNamespace(args=args, engine=engine, kl_coef=0.0)
    losses.append(float(DeepSpeedPPOTrainer._actor_loss(trainer, micro, 2.0)[0]))
found["loss"] = losses[1] - losses[0]

spec = importlib.util.spec_from_file_location("my_rewards", "my_rewards.py")
spec.loader.exec_module(rewards := importlib.util.module_from_spec(spec))
found["reward"] = rewards.short(["Q", "Q"], ["yes", "yes it is so"])

row = {"question": "Q", "accepted": "A", "declined": "B"}
found["format"] = [[record["chosen"], record["rejected"]] for record in recognise(row).convert(row)]

sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 8}
model = Phi3ForCausalLM(Phi3Config(**sizes, num_key_value_heads=2, pad_token_id=0))
found["family"] = sorted(name.rsplit(".", 1)[-1] for name in lora_targets(model))

platform = load_platforms()["rtx_4090"]
recipe = Recipe.read("configs/rtx_4090/opt-1.3b.yaml")
found["platform"] = [platform.devices, platform.accelerator, recipe.sections["sft"]["zero_stage"]]
print("found", json.dumps(found))
"""


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """A copy of the project in which all five diffs are applied."""
    folder = tmp_path_factory.mktemp("changed")
    files = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, check=True).stdout
    wanted = [name for name in files.decode().split("\0") if name and not name.startswith(("tests/", "docs/", "data/"))]
    for name in wanted:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((REPOSITORY / name).read_bytes())
    for diff in DIFFS:
        subprocess.run(["git", "apply", "-"], cwd=folder, input=diff.encode(), check=True)
    return folder


def test_five_diffs_of_at_most_twenty_lines():
    assert [len(diff.splitlines()) <= 20 for diff in DIFFS] == [True] * 5


def test_they_do_what_the_page_says(changed):
    result = subprocess.run([sys.executable, "-c", PROGRAM], cwd=changed, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    line = next(line for line in result.stdout.splitlines() if line.startswith("found "))
    found = json.loads(line.removeprefix("found "))
    assert found.pop("loss") == pytest.approx(3 * (0.5 * 1.0**2 + 0.5 * 0.5**2) / 2, rel=1e-6)
    assert found == {
        "reward": [1.0, 0.25],
        "format": [["A", "B"]],
        "family": ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"],
        "platform": [4, "cuda", 2],
    }
