"""P-Tuning: the prefix in front of every text, what is trained, saved alone, opened again, by us and by peft."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, GenerationConfig

from errors import UserError
from inference.engine import generate
from models.adapters.lora import add_lora, save_prefix
from models.checkpoint_folder import check_context_length, gets_prefix
from models.heads import TokenLogProbs, TokenScores, position_ids_for, prefix_length, score_layer
from models.load import load_scalar_model
from models.save import save_model
from models.tokenizer import load_tokenizer
from models.weight_files import PEFT_FILES
from tests.closeness import assert_close
from tests.models.chatglm_folders import change_json
from tests.models.common import Stops, load, shake, tokens, trained

LENGTH = 5


def rows(lengths=(9, 6, 4), folder=None):
    """Right-padded rows; folder: of the model that reads them."""
    ids, _ = tokens(len(lengths), max(lengths), folder=folder)
    return ids, (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()


def save(model, base, folder):
    save_prefix(model, load_tokenizer(base), Stops(), folder, trained(model))
    return folder


# --- the same numbers as peft's own forward and generate ----------------------------------------------------------------


@pytest.mark.parametrize("projection", [False, True], ids=["plain", "projection"])
def test_log_probs_scores_and_gradients_equal_pefts_own(checkpoint, projection):
    model = load(checkpoint, pre_seq_len=LENGTH, prefix_projection=projection)
    assert isinstance(model, PeftModel) and prefix_length(model) == LENGTH
    ids, mask = rows()
    logits = model(input_ids=ids, attention_mask=mask).logits
    expected = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    real = mask[:, 1:].bool()
    expected[real].sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    assert all("prompt_encoder" in name and grad.abs().sum() > 0 for name, grad in gradients.items())
    model.zero_grad()
    found = TokenLogProbs(model)(ids, mask)
    assert_close(found[real], expected[real])
    found[real].sum().backward()
    for name, parameter in model.named_parameters():
        if name in gradients:
            assert_close(parameter.grad, gradients[name], 1e-3)
        else:
            assert parameter.grad is None, name
    without = TokenLogProbs(model.get_base_model())(ids, mask)
    assert (without - found)[real].abs().max() > 1e-2

    scalar = load(checkpoint, load_scalar_model, pre_seq_len=LENGTH, prefix_projection=projection)
    scalar.get_base_model().config.pad_token_id = None  # transformers then reads the last token
    with torch.no_grad():
        expected = scalar(input_ids=ids[:1], attention_mask=mask[:1]).logits
        assert_close(TokenScores(scalar)(ids[:1], mask[:1])[:, -1:], expected)


def test_greedy_answers_equal_pefts_own_and_padding_changes_nothing(checkpoint):
    model = load(checkpoint, pre_seq_len=LENGTH).eval()
    ids, mask = rows((6, 6, 6))
    settings = GenerationConfig(do_sample=False, max_new_tokens=10, pad_token_id=3, eos_token_id=None)
    model.get_base_model().generation_config = settings  # or generate() takes the end token from there
    expected = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)[:, 6:]
    ask = {"max_new_tokens": 10, "pad_token_id": 3, "greedy": True}
    found = generate(model, ids, mask, stop_token_ids=[], **ask)
    assert found.sequences.tolist() == expected.tolist()
    without = generate(model.get_base_model(), ids, mask, stop_token_ids=[], **ask)
    assert (found.log_probs - without.log_probs).abs().max() > 1e-2
    # Rows of other lengths, padded on the left, ending at different times: each as if it were alone.
    stops = found.sequences[0, 4:6].tolist()
    lengths = (6, 2, 4)
    padded = ids.clone()
    left = (torch.arange(6) >= 6 - torch.tensor(lengths)[:, None]).long()
    together = generate(model, padded.masked_fill(left == 0, 3), left, stop_token_ids=stops, **ask)
    for row, length in enumerate(lengths):
        alone = generate(model, ids[row : row + 1, 6 - length :], mask[:1, :length], stop_token_ids=stops, **ask)
        size = int(alone.lengths[0])
        assert int(together.lengths[row]) == size
        assert together.sequences[row, :size].tolist() == alone.sequences[0, :size].tolist()
        assert_close(together.log_probs[row, :size], alone.log_probs[0, :size], 1e-4)
        whole = torch.cat([ids[row, 6 - length :], alone.sequences[0, :size]])[None]
        again = TokenLogProbs(model)(whole, torch.ones_like(whole), keep=size)
        assert_close(alone.log_probs[:, :size], again.detach(), 1e-4)


def test_positions_begin_behind_the_prefix(folder_of):
    ids = torch.full((2, 4), 9)
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    plain = load(folder_of("opt"))
    assert position_ids_for(plain, ids, mask, room=2).tolist() == [[0, 0, 0, 1, 2, 3], [0, 1, 2, 2, 3, 4]]
    model = load(folder_of("opt"), pre_seq_len=LENGTH)
    assert position_ids_for(model, ids, mask)[0, 2:].tolist() == [LENGTH, LENGTH + 1]
    assert position_ids_for(load(folder_of("bloom")), ids, mask) is None


# --- what is trained, and from where ------------------------------------------------------------------------------------


def test_a_new_prefix_depends_on_the_seed_alone_and_is_float32(folder_of):
    found = []
    for noise, dtype, seed in ((1, torch.float32, 3), (2, torch.bfloat16, 3), (1, torch.float32, 4)):
        torch.manual_seed(noise)
        (prefix,) = trained(load(folder_of("qwen2"), pre_seq_len=LENGTH, dtype=dtype, seed=seed)).values()
        found.append(prefix)
    assert {prefix.dtype for prefix in found} == {torch.float32}
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_positions_of_a_table_are_counted(folder_of):
    check_context_length(folder_of("opt"), 256 - LENGTH, "--max_seq_len", pre_seq_len=LENGTH)
    with pytest.raises(UserError, match=r"--max_seq_len 252 behind a prefix of 5 .* lower it to 251"):
        check_context_length(folder_of("opt"), 252, "--max_seq_len", pre_seq_len=LENGTH)
    check_context_length(folder_of("llama"), 10**6, "--max_seq_len", pre_seq_len=LENGTH)


# --- saved alone --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("projection", [False, True], ids=["plain", "projection"])
@pytest.mark.parametrize("family", ["bloom", "qwen3", "chatglm-6b", "chatglm2-6b"])
def test_saved_alone_and_opened_again(folder_of, family, projection, tmp_path):
    base, own = folder_of(family), family.startswith("chatglm")
    model = load(base, pre_seq_len=LENGTH, prefix_projection=projection)
    ids, mask = rows(folder=base)
    log_probs = TokenLogProbs(model)(ids, mask)
    log_probs.sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()} == set(trained(model))
    shake(model, size=0.3)
    expected = TokenLogProbs(model)(ids, mask).detach()
    assert (expected - log_probs).abs().max() > 1e-3
    folder = save(model, base, tmp_path / "tuned")
    names = {file.name for file in folder.iterdir()}
    assert {"config.json", "prefix_only.bin"} if own else set(PEFT_FILES) <= names
    assert not [name for name in names if name.startswith(("model.", "model-", "pytorch_model"))]
    asked = {"pre_seq_len": LENGTH, "prefix_projection": projection and own}
    for again in (load(folder), load(base, ptuning_checkpoint=folder, **asked), load(folder, **asked)):
        assert_close(TokenLogProbs(again)(ids, mask).detach(), expected)
        if own:
            assert trained(again).keys() == trained(model).keys()
        else:
            assert list(trained(again)) == ["prompt_encoder.default.embedding.weight"]
    if not own:
        (prompts,) = load_file(folder / "adapter_model.safetensors").values()
        assert prompts.dtype == torch.float32 and prompts.shape[0] == LENGTH
        theirs = PeftModel.from_pretrained(load(base), folder)
        assert_close(TokenLogProbs(theirs)(ids, mask).detach(), expected)
    assert load_tokenizer(folder)("It is good.").input_ids == load_tokenizer(base)("It is good.").input_ids

    again = load(folder)
    shake(again, seed=2, size=0.3)
    second = save(again, base, tmp_path / "tuned-on")  # belongs to the base, not to the first prefix
    named = second / ("config.json" if own else "adapter_config.json")
    assert json.loads(named.read_text())["base_model_name_or_path"] == str(base.resolve())
    found, now = (TokenLogProbs(one)(ids, mask).detach() for one in (load(second), again))
    assert_close(found, now)
    assert (now - expected).abs().max() > 1e-3


@pytest.mark.parametrize(("family", "count"), [("llama", 2), ("chatglm-6b", 2), ("chatglm2-6b", 3)])
def test_a_reward_model_keeps_head_and_figures(folder_of, family, count, tmp_path):
    """ChatGLM2's head has a bias."""
    base = folder_of(family)
    given = rows(folder=base)
    plain = load(base, load_scalar_model, seed=5)
    model = load(base, load_scalar_model, seed=5, pre_seq_len=LENGTH)
    assert torch.equal(score_layer(model).weight, score_layer(plain).weight)  # the same head as without a prefix
    TokenScores(model)(*given).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(trained(model))
    assert len(trained(model)) == count
    shake(model, size=0.3)
    model.config.update({"reward_mean": 0.5, "reward_std": 2.0})
    folder = save(model, base, tmp_path / "reward")
    again = load(folder, load_scalar_model, seed=99)
    assert (again.config.reward_mean, again.config.reward_std) == (0.5, 2.0)
    expected, found = (TokenScores(one)(*given).detach() for one in (model, again))
    assert_close(found, expected)
    if family == "llama":
        theirs = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
        assert_close(TokenScores(PeftModel.from_pretrained(theirs, folder))(*given).detach(), expected)
    with pytest.raises(UserError, match="is a reward model"):
        load(folder)


def test_another_model_takes_the_place_of_a_prefix_and_the_other_way_round(folder_of, tmp_path):
    base = folder_of("gpt2")
    model = load(base, pre_seq_len=LENGTH)
    folder = save(model, base, tmp_path / "out")
    save_model(load(base), load_tokenizer(base), Stops(), folder)
    assert not isinstance(load(folder), PeftModel)
    save(model, base, folder)
    assert isinstance(load(folder), PeftModel) and not (folder / "model.safetensors").exists()
    # A prefix in the place of its own model would take that model's weights away: said before training, and after.
    for path, options in ((base, {"pre_seq_len": LENGTH}), (folder, {})):
        assert gets_prefix(path, tmp_path / "elsewhere", **options)
        with pytest.raises(UserError, match="holds the model that the prefix belongs to"):
            gets_prefix(path, base, **options)
    with pytest.raises(UserError, match="holds the model that the prefix belongs to"):
        save(model, base, base)
    assert (base / "model.safetensors").exists()


# --- what is wrong, in a sentence ---------------------------------------------------------------------------------------


@pytest.fixture
def tuned(folder_of, tmp_path):
    """A saved prefix of a GPT-2."""
    return save(load(folder_of("gpt2"), pre_seq_len=LENGTH), folder_of("gpt2"), tmp_path / "tuned")


def test_numbers_that_do_not_fit_the_saved_prefix(folder_of, tuned):
    base = folder_of("gpt2")
    for options in ({"path": tuned}, {"path": base, "ptuning_checkpoint": tuned}):
        with pytest.raises(UserError, match=r"--pre_seq_len 7, but the prefix in .* has 5 places"):
            load(**options, pre_seq_len=7)
        with pytest.raises(UserError, match=r"--prefix_projection true, but .* saved without a projection; drop"):
            load(**options, prefix_projection=True)
    with pytest.raises(UserError, match=r"has a prefix already and --ptuning_checkpoint"):
        load(tuned, ptuning_checkpoint=tuned)
    with pytest.raises(UserError, match=r"embedding.weight has the shape \[5, 128\], this model takes \[5, 64\]"):
        load(folder_of("llama"), ptuning_checkpoint=tuned)


def test_a_base_that_is_gone_or_unnamed(tuned, tmp_path):
    gone = str(tmp_path / "gone")
    for value, words in (
        (gone, f"names {gone}, which does not open: .*correct that field"),
        (str(tuned), "it holds a prefix itself"),
        (None, 'add "base_model_name_or_path"'),
    ):
        change_json(tuned / "adapter_config.json", base_model_name_or_path=value)
        with pytest.raises(UserError, match=f"adapter_config.json.*{words}"):
            load(tuned)


def test_folders_without_a_prefix_or_with_half_of_one(folder_of, tuned, tmp_path):
    base = folder_of("gpt2")
    for place, words in ((tmp_path / "no", "no such folder"), (base, "holds no prefix"), (tmp_path, "holds no prefix")):
        with pytest.raises(UserError, match=words):
            load(base, ptuning_checkpoint=place)
    torch.save({"lm_head.weight": torch.zeros(2, 2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"named like 'lm_head.weight', looked for transformer.prefix_encoder.embedding"):
        load(base, ptuning_checkpoint=tmp_path)
    torch.save({"transformer.prefix_encoder.embedding.weight": torch.zeros(4, 128)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"a ChatGLM one, but the model .* is of type gpt2"):
        load(base, ptuning_checkpoint=tmp_path)
    file = tuned / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="truncated or damaged"):
        load(tuned)


def test_what_does_not_go_with_a_prefix(folder_of, tuned):
    with pytest.raises(UserError, match=r"--gradient_checkpointing drops the cache .* gpt2 model"):
        load(folder_of("gpt2"), pre_seq_len=LENGTH, gradient_checkpointing=True)
    with pytest.raises(UserError, match=r"has a prefix .*drop --lora_dim"):
        add_lora(load(tuned), 4, 8)
