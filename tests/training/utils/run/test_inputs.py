"""A wrong path is told before torch is imported; sets of the hub are looked up where no cache may hold them."""

import json
import subprocess
import sys

import numpy as np
import pytest
from huggingface_hub import HfApi
from huggingface_hub import constants as hub
from safetensors.numpy import save_file

from errors import UserError
from steps import STEPS
from training.utils.data.paths import check_source
from training.utils.flags.steps import SFTArguments
from training.utils.run.inputs import check_models

TELL = """
import contextlib, io, runpy, sys
for module, flags, words in {cases}:
    sys.argv, told = [module, *flags], io.StringIO()
    with contextlib.redirect_stderr(told):
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            assert end.code == 2
    assert words in told.getvalue(), (module, flags, told.getvalue())
    heavy = {{"torch", "transformers", "deepspeed", "datasets", "pyarrow"}} & sys.modules.keys()
    assert not heavy, (module, flags, heavy)
"""


def test_wrong_paths_are_told_before_heavy_imports(repository, tmp_path):
    empty, good = tmp_path / "empty.jsonl", tmp_path / "good.jsonl"
    empty.write_text("")
    good.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    cases = []
    for step in STEPS:
        roles = ("actor_", "critic_") if step.section == "ppo" else ("",)
        models = [word for role in roles for word in (f"--{role}model_name_or_path", str(tmp_path / "none"))]
        common = [*models, "--output_dir", str(tmp_path / "out"), "--data_path"]
        cases.append((step.module, [*common, str(good)], "none does not exist"))
        cases.append((step.module, [*common, str(tmp_path / "gone.jsonl")], "gone.jsonl: no such file"))
        cases.append((step.module, [*common, str(empty)], "no records in it"))
        cases.append((step.module, [*common, str(good), "--resume", str(tmp_path / "no")], "no such folder"))
    command = [sys.executable, "-c", TELL.format(cases=cases)]
    ended = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    assert not ended.returncode, ended.stderr


@pytest.fixture(scope="module")
def opt(tmp_path_factory):
    """A folder with all that is looked at before torch is imported: of OPT, with 64 positions."""
    folder = tmp_path_factory.mktemp("opt")
    config = {"model_type": "opt", "architectures": ["OPTForCausalLM"], "max_position_embeddings": 64, "num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    names = ("embed_tokens", "layers.0.self_attn.q_proj", "layers.0.self_attn_layer_norm", "layers.0.fc1")
    save_file({f"decoder.{name}.weight": np.zeros((2, 2), np.float32) for name in names}, folder / "model.safetensors")
    return folder


WRONG = {
    "--max_seq_len 65": "--max_seq_len 65 is more than the 64 positions of the opt model",
    "--max_seq_len 60 --pre_seq_len 5": "--max_seq_len 60 behind a prefix of 5 is more than the 64 positions",
    "--max_seq_len 60 --pre_seq_len 4 --gradient_checkpointing": "--gradient_checkpointing drops the cache that holds the prefix",
    "--max_seq_len 64 --lora_dim 4 --lora_module_name q_proj,v_prj": "--lora_module_name v_prj matches no linear layer",
    "--max_seq_len 64 --lora_dim 4 --lora_module_name embed_tokens": "--lora_module_name embed_tokens matches no linear",
    "--max_seq_len 64 --dtype fp16": "--dtype fp16: a CPU cannot train in it",
    "--max_seq_len 64 --columns prompt=prompt,chosen=b": '--columns names "b", which is not there (found: prompt, chosen,',
    "--max_seq_len 64 --columns prompt=b": "--columns prompt=b: no data set has these fields",
    "--max_seq_len 64 --columns promt=prompt": "--columns promt=…: no such name of ours; use ",
    "--max_seq_len 64 --data_path ODD": "the fields a, b are no known format",
    "--max_seq_len 64 --deepspeed_config KEYS": '"stepz_per_print" is no key of the installed DeepSpeed',
}


@pytest.mark.parametrize("command", ["step", "train.py"])
def test_what_files_and_flags_tell_is_told_before_heavy_imports(repository, tmp_path, monkeypatch, opt, command):
    good, odd, keys = tmp_path / "good.jsonl", tmp_path / "odd.jsonl", tmp_path / "keys.json"
    good.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    odd.write_text('{"a": 1, "b": 2}\n')
    keys.write_text('{"stepz_per_print": 5}')
    cases = []
    for flags, sentence in WRONG.items():
        flags = flags.replace("ODD", str(odd)).replace("KEYS", str(keys))
        if command == "step":
            words = ["--model_name_or_path", str(opt), "--output_dir", str(tmp_path / "out"), "--data_path", str(good)]
            cases += [(step.module, [*words, *flags.split()], sentence) for step in STEPS if step.section != "ppo"]
        else:
            words = ["--dry-run", "--deployment-type", "cpu", "--actor-model", str(opt), "--step", "1"]
            words += ["--output-dir", str(tmp_path / "out"), "--data-path", str(good), "--sft-flags", flags]
            cases.append(("train", words, sentence))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    ended = subprocess.run([sys.executable, "-c", TELL.format(cases=cases)], cwd=repository, capture_output=True, text=True)
    assert not ended.returncode, ended.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["q_proj,fc1", "decoder.layers.", "model.decoder.layers.0.", "self_attn"])
def test_names_of_layers_pass_in_the_form_of_the_files_and_of_the_network(tmp_path, opt, name):
    common = {"model_name_or_path": str(opt), "output_dir": str(tmp_path), "max_seq_len": 64, "data_path": ["Dahoas/rm-static"]}
    check_models(SFTArguments(**common, lora_dim=4, lora_module_name=name))


def test_a_set_of_the_hub_is_looked_up_unless_a_cache_may_hold_it(tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(HfApi, "dataset_info", unreachable)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "prepared"))
    with pytest.raises(UserError, match=r"the hub cannot be reached.*download_dataset some/set"):
        check_source("some/set")
    check_source("some/set", ask_hub=False)
    for cached in ("hub/datasets--some--set", "prepared/some___other"):
        folder = tmp_path / cached
        folder.mkdir(parents=True)
        check_source("some/set")
        folder.rmdir()
