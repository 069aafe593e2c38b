"""python -m scripts.export: what is written opens in transformers, and in its reader of GGUF, with the same logits and tokens."""

import json

import gguf
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, LlamaTokenizer
from transformers.tokenization_utils_base import generate_merges

from models.templates import load_template
from models.tokenizer import load_tokenizer
from scripts.export.__main__ import main
from scripts.export.vocabulary import modelfile
from tests.closeness import assert_close
from tests.tiny import tiny_checkpoint, tiny_config
from tests.tiny_chatglm import small_vocabulary, tiny_chatglm

IDS = torch.arange(5, 45)[None]
TEXT = "Hello 你好\n123 I'll bake  bread, won't I?"
# transformers' reader of GGUF leaves Qwen3's head_dim and GPT-2's positions at the values of its config classes
FAMILIES = {"llama": {}, "mistral": {}, "qwen2": {}, "qwen3": {"head_dim": 128}, "gpt2": {"n_positions": 1024}, "bloom": {}}


def logits(model) -> torch.Tensor:
    model = model if model.dtype == torch.float32 else model.float()  # what came from a GGUF takes no float()
    with torch.no_grad():
        return model.eval()(IDS).logits


def export(path, folder, *flags) -> dict:
    """Export as GGUF and return its fields, read back by the package gguf."""
    assert main(["--path", str(path), "--output_dir", str(folder), "--format", "gguf", *flags]) == 0
    reader = gguf.GGUFReader(folder / "model.gguf")
    return {name: field.contents() for name, field in reader.fields.items()}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {family: tiny_checkpoint(root / family, family, **changes) for family, changes in FAMILIES.items()}


@pytest.fixture(scope="module")
def adapter(models, tmp_path_factory):
    """A LoRA adapter over the tiny LLaMA that changes its logits."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(models["llama"]), config)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return folder


# --- merged, in shards, in another dtype --------------------------------------------------------------------------------


def test_an_adapter_is_merged_and_the_weights_are_cut_into_shards(models, adapter, tmp_path, capsys):
    from peft import PeftModel

    assert main(["--path", str(adapter), "--output_dir", str(tmp_path / "merged"), "--max_shard_size", "20KB"]) == 0
    assert len(list((tmp_path / "merged").glob("model-*.safetensors"))) > 2
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    base = AutoModelForCausalLM.from_pretrained(models["llama"])
    plain = logits(base)
    expected = logits(PeftModel.from_pretrained(base, adapter))
    assert_close(logits(merged), expected)
    assert float((expected - plain).abs().max()) > 1e-2
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template


@pytest.mark.parametrize(("flag", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16), ("auto", torch.float32)])
def test_weights_are_stored_in_the_dtype_that_is_asked_for(models, tmp_path, flag, dtype):
    assert main(["--path", str(models["gpt2"]), "--output_dir", str(tmp_path / "out"), "--dtype", flag]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == dtype
    assert_close(logits(model), logits(AutoModelForCausalLM.from_pretrained(models["gpt2"], dtype=dtype)))


def test_integer_weights_become_floats(shared_dir, tmp_path):
    from models.adapters.quantization import quantize_linears
    from models.load import load_causal_lm
    from models.save import save_model

    source = tiny_chatglm(tmp_path / "chatglm2", "chatglm2-6b", shared_dir)
    tokenizer = load_tokenizer(source)
    model = load_causal_lm(source, dtype=torch.float32)
    quantize_linears(model, 8)
    save_model(model, tokenizer, load_template(source, tokenizer), tmp_path / "int8")
    assert main(["--path", str(tmp_path / "int8"), "--output_dir", str(tmp_path / "out"), "--dtype", "fp32"]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_bit"] == 0
    assert_close(logits(load_causal_lm(tmp_path / "out", dtype=torch.float32)), logits(model))


# --- GGUF ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_gguf_gives_the_logits_and_tokens_of_its_model(models, family, dtype, tmp_path):
    fields = export(models[family], tmp_path, "--dtype", {torch.float32: "fp32", torch.float16: "fp16"}[dtype])
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    assert_close(logits(read), logits(AutoModelForCausalLM.from_pretrained(models[family], dtype=dtype)), 1e-3)
    tokenizer = load_tokenizer(models[family])
    again = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    assert again(TEXT).input_ids == tokenizer(TEXT).input_ids
    template = load_template(models[family], tokenizer)
    assert fields["tokenizer.chat_template"] == template.jinja(tokenizer)
    assert fields["tokenizer.ggml.eos_token_id"] == template.end_token_id


def test_an_adapter_goes_into_a_gguf_merged(models, adapter, tmp_path):
    export(adapter, tmp_path / "gguf", "--base", str(models["llama"]))
    assert main(["--path", str(adapter), "--output_dir", str(tmp_path / "merged")]) == 0
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "gguf", gguf_file="model.gguf", dtype=torch.float32)
    assert_close(logits(read), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), 1e-3)


def test_llama_3_1s_rotation_is_written_as_factors(tmp_path):
    rope = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 64}
    export(tiny_checkpoint(tmp_path / "model", "llama", rope_parameters=rope), tmp_path / "out")
    factors = next(t for t in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors if t.name == "rope_freqs.weight")
    # wavelengths 2 pi 500^(i/4) = 6.3, 29.7, 140, 664 beside 64 / 4 and 64 / 1: kept, between, slowed 8 times, slowed
    smooth = (64 / (2 * torch.pi * 500**0.25) - 1) / (4 - 1)
    assert factors.data.tolist() == pytest.approx([1, 1 / ((1 - smooth) / 8 + smooth), 8, 8], rel=1e-5)


def test_a_sentencepiece_vocabulary_keeps_its_order_of_merges(tmp_path):
    """A tokenizer.json has merges instead of scores; transformers builds merges from the scores that were written."""
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=None, model_proto=small_vocabulary("chatglm2-6b"))
    vocabulary = {pieces.id_to_piece(at): at for at in range(len(pieces))}
    merges = generate_merges(vocabulary, {piece: pieces.get_score(at) for piece, at in vocabulary.items()})
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=merges)
    folder = tmp_path / "model"
    AutoModelForCausalLM.from_config(tiny_config("llama", len(vocabulary), tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    fields = export(folder, tmp_path / "out")
    assert fields["tokenizer.ggml.model"] == "llama"
    assert fields["tokenizer.ggml.token_type"][:4] == [gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.BYTE]
    again = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    for text in (TEXT, "怎么做面包？", "The capital of France is Paris. 100"):
        assert again(text).input_ids == tokenizer(text).input_ids


@pytest.mark.parametrize("generation", ["chatglm2-6b", "chatglm3-6b"])
def test_a_gguf_of_chatglm_has_its_weights_pieces_and_sizes(shared_dir, tmp_path, generation):
    source = tiny_chatglm(tmp_path / "model", generation, shared_dir)
    fields = export(source, tmp_path / "out")
    assert fields["general.architecture"] == "chatglm"
    assert fields["chatglm.rope.dimension_count"] == 4  # half of a head of 8
    assert fields["chatglm.attention.head_count_kv"] == 2
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    tokenizer = load_tokenizer(source)
    for token in ("[gMASK]", "sop"):
        at = tokenizer.get_command(token)
        assert (tokens[at], kinds[at]) == (token, gguf.TokenType.CONTROL)
    assert fields["tokenizer.ggml.add_bos_token"] is False
    read = {one.name: torch.tensor(one.data) for one in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    model = AutoModelForCausalLM.from_pretrained(source)
    layer = model.transformer.encoder.layers[1]
    assert torch.equal(read["blk.1.attn_qkv.weight"].float(), layer.self_attention.query_key_value.weight.float())
    assert torch.equal(read["blk.1.ffn_up.weight"].float(), layer.mlp.dense_h_to_4h.weight.float())
    assert sum(one.numel() for one in read.values()) == sum(one.numel() for one in model.parameters())


def test_ollamas_template_writes_what_the_chat_template_writes(models):
    tokenizer = load_tokenizer(models["qwen2"])
    text = modelfile(tokenizer, load_template(models["qwen2"], tokenizer))
    assert '{{ if eq $before "" }}<|im_start|>user\n{{ else' in text
    assert '{{ else }}<|im_end|>\n<|im_start|>user\n{{ end }}{{ .Content }}<|im_end|>\n<|im_start|>assistant\n{{ else' in text
    assert 'PARAMETER stop "<|im_end|>"\n' in text


# --- bad input ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wrong(models, adapter, tmp_path_factory):
    """Folders that cannot be exported, by name."""
    root = tmp_path_factory.mktemp("wrong")
    for name in ("opt", "gpt_neox"):
        tiny_checkpoint(root / name, name)
    tiny_checkpoint(root / "window", "mistral", sliding_window=64)
    reward = AutoModelForSequenceClassification.from_pretrained(models["llama"], num_labels=1)
    reward.save_pretrained(root / "reward")
    AutoTokenizer.from_pretrained(models["llama"]).save_pretrained(root / "reward")
    (root / "lost").mkdir()
    config = json.loads((adapter / "adapter_config.json").read_text())
    (root / "lost" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    (root / "lost" / "adapter_model.safetensors").write_bytes((adapter / "adapter_model.safetensors").read_bytes())
    file = tiny_checkpoint(root / "words", "llama") / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["pre_tokenizer"] |= {"use_regex": False}  # words are not cut at all
    file.write_text(json.dumps(content), encoding="utf-8")
    large = AutoModelForCausalLM.from_pretrained(models["gpt2"])
    large.transformer.wte.weight.data[0, 0] = 1e6
    large.save_pretrained(root / "large")
    AutoTokenizer.from_pretrained(models["gpt2"]).save_pretrained(root / "large")
    return root


@pytest.mark.parametrize(
    ("name", "flags", "said"),
    [
        ("opt", ["--format", "gguf"], "no network for opt"),
        ("gpt_neox", ["--format", "gguf"], "no network for gpt_neox"),
        ("window", ["--format", "gguf"], "sliding_window is 64"),
        ("reward", ["--format", "gguf"], "is a reward model"),
        ("lost", [], "names no model; give --base"),
        ("opt", ["--base", "x"], "is no adapter alone"),
        ("lost", ["--base", "./nowhere"], "does not open"),
        ("large", ["--dtype", "fp16"], "transformer.wte.weight has values that torch.float16 cannot hold"),
        ("opt", ["--dtype", "int8"], "invalid choice: 'int8'"),
        ("opt", ["--max_shard_size", "much"], "--max_shard_size much is no size"),
        ("opt", ["--pre_tokenizer", "gpt-2"], "--pre_tokenizer is for --format gguf"),
        ("words", ["--format", "gguf", "--pre_tokenizer", "gpt2"], "--pre_tokenizer gpt2 is not known; choose from gpt-2"),
        ("words", ["--format", "gguf"], "as no --pre_tokenizer known here does"),
        ("absent/model", [], "does not exist"),
    ],
)
def test_bad_input_is_told_in_one_sentence(wrong, tmp_path, capsys, name, flags, said):
    assert main(["--path", str(wrong / name), "--output_dir", str(tmp_path / "out"), *flags]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and said.lower() in error.lower()
    assert not (tmp_path / "out" / "config.json").exists() and not (tmp_path / "out" / "model.gguf").exists()


def test_a_folder_with_content_is_left_alone(models, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["--path", str(models["llama"]), "--output_dir", str(tmp_path)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]
