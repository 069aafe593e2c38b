"""Loading holds the weights once."""

import multiprocessing
import sys
import threading
from pathlib import Path

import pytest
import torch

from models.chatglm.configuration_chatglm import ChatGLMConfig
from models.chatglm.modeling_chatglm import ChatGLMForConditionalGeneration
from models.load import load_causal_lm
from tests.tiny_chatglm import write_shards

LIMIT = 1.3

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the figures come from /proc")


def write_checkpoint(folder, width, layers, vocabulary):
    """Write a random ChatGLM-6B of these sizes, float16, in four shards; lm_head is stored too, as in the release."""
    sizes = {"vocab_size": vocabulary, "hidden_size": width, "num_layers": layers, "inner_hidden_size": 4 * width}
    names = ("bos_token_id", "eos_token_id", "gmask_token_id", "mask_token_id")
    ids = {name: vocabulary - 4 + number for number, name in enumerate(names)} | {"pad_token_id": 3}
    config = ChatGLMConfig(num_attention_heads=width // 64, **sizes, **ids)
    model = ChatGLMForConditionalGeneration(config).half()
    folder.mkdir()
    config.save_pretrained(folder)
    write_shards(folder, model.state_dict(), 4)


def own_bytes():
    """Return the bytes of this process's own pages, without those of mapped files."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) * 1024


def measure(folder, results):
    """Load a model of one layer, to have everything imported and every pool grown; then load the other and watch."""
    load_causal_lm(folder.with_name("warm"), dtype=torch.float32)
    before, peaks, ended = own_bytes(), [], threading.Event()

    def watch():
        while not ended.wait(0.001):
            peaks.append(own_bytes() - before)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    model = load_causal_lm(folder, dtype=torch.float32)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.view(-1)[::1024].sum()  # pages of a mapped file count when they are read
    ended.set()
    thread.join()
    wanted = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    results.put((wanted, max(*peaks, own_bytes() - before)))


def test_shards_of_float16_become_float32_without_a_second_copy(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "model", width=512, layers=6, vocabulary=3000)
    write_checkpoint(tmp_path / "warm", width=64, layers=1, vocabulary=500)
    # At the width of a 6B model every matrix is above 32 MB, and malloc gives such blocks back at once. Smaller ones it keeps
    # for later; said so, it gives these back too.
    for name, value in {"OMP_NUM_THREADS": 1, "MALLOC_MMAP_THRESHOLD_": 2**20, "DS_ACCELERATOR": "cpu"}.items():
        monkeypatch.setenv(name, str(value))
    processes = multiprocessing.get_context("spawn")
    results = processes.SimpleQueue()
    process = processes.Process(target=measure, args=(tmp_path / "model", results))
    process.start()
    process.join()
    assert process.exitcode == 0
    weights, own = results.get()
    # lm_head and embedding of these sizes, stored apart as in the release; 12 h^2 + biases and norms a layer
    parameters = 3000 * 512 + 6 * (12 * 512**2 + 13 * 512) + 2 * 512
    assert weights == pytest.approx(4 * parameters, rel=0.01)
    assert 0.9 <= own / weights <= LIMIT
