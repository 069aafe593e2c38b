"""Repetition penalty, stop strings, tokens and text as they come."""

import random
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from inference.engine import generate, generate_many
from inference.sampling import StopStrings, draw, occurring, penalised
from inference.streaming import TextStream
from models.templates import load_template
from models.tokenizer import load_tokenizer
from tests.tiny_chatglm import GENERATIONS, copy_tokenizer

PAD = 3
TEXT = "问：怎么做面包？答：把面粉、水、盐和酵母混合 🍞🍞 wait an hour, then bake it. Größe\n\nHuman: thanks"


@pytest.fixture(scope="module")
def folder(folder_of):
    return folder_of("llama", 1)


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    """Prompts of one length."""
    return torch.randint(8, 400, (5, 6), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9}, {"top_k": 2}])
def test_of_numbers_that_are_not_finite_a_token_of_the_vocabulary_is_drawn(filters):
    log_probs = torch.tensor([[0.5, 0.3, 0.2], [float("nan")] * 3]).log()
    tokens, _ = draw(log_probs, torch.tensor([0.1, 0.999]), **filters)
    assert tokens[0] == 0 and 0 <= tokens[1] < 3


# --- repetition penalty -----------------------------------------------------------------------------------------------


def test_penalised_by_hand():
    logits = torch.tensor([[2.0, -2.0, 3.0, -1.0]])
    seen = torch.tensor([[True, True, False, False]])
    assert penalised(logits, seen, 2.0).tolist() == [[1.0, -4.0, 3.0, -1.0]]
    ids, mask = torch.tensor([[0, 2, 3], [0, 0, 1]]), torch.tensor([[0, 1, 1], [0, 1, 1]])
    assert occurring(ids, mask, 4).tolist() == [[False, False, True, True], [True, True, False, False]]


def test_greedy_with_a_penalty_equals_transformers(model, ids):
    """Prompts of one length: transformers counts padding as text, we do not."""
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=20, pad_token_id=PAD, eos_token_id=None, repetition_penalty=1.6
    )
    expected = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)[:, 6:]
    ask = {"max_new_tokens": 20, "stop_token_ids": [], "pad_token_id": PAD, "greedy": True}
    found = generate(model, ids, torch.ones_like(ids), repetition_penalty=1.6, **ask)
    assert found.sequences.tolist() == expected.tolist()
    plain = generate(model, ids, torch.ones_like(ids), **ask)
    assert found.sequences.tolist() != plain.sequences.tolist()
    padded = torch.nn.functional.pad(ids, (3, 0), value=int(expected[0, 0]))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (3, 0))
    assert torch.equal(generate(model, padded, mask, repetition_penalty=1.6, **ask).sequences, found.sequences)


@pytest.mark.ppo
def test_with_a_penalty_the_log_probs_stay_those_of_the_softmax_and_that_is_reported(model, ids):
    """Item 36: sampled from one distribution, scored under another; `filtered` says so."""
    ask = {"max_new_tokens": 12, "stop_token_ids": [], "pad_token_id": PAD, "row_seeds": range(5), "temperature": 0.7}
    found = generate(model, ids, torch.ones_like(ids), repetition_penalty=1.3, **ask)
    assert found.filtered and not generate(model, ids, torch.ones_like(ids), **ask).filtered
    whole = torch.cat([ids, found.sequences], 1)
    with torch.no_grad():
        log_probs = (model(whole).logits[:, 5:-1] / 0.7).log_softmax(-1)
    expected = log_probs.gather(-1, found.sequences[..., None]).squeeze(-1)
    torch.testing.assert_close(found.log_probs, expected, atol=1e-4, rtol=0)
    many = generate_many(model, ids.tolist(), max_batch=3, repetition_penalty=1.3, **ask)
    assert torch.equal(many.sequences, found.sequences) and many.filtered


# --- stop strings -----------------------------------------------------------------------------------------------------


def test_stop_strings_are_found_at_the_token_that_completes_them(tokenizer):
    """Against a search in the whole text, for every substring of a text of characters of one to four bytes."""
    tokens = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    whole = [tokenizer.decode(tokens[:count]) for count in range(1, len(tokens) + 1)]
    choose = random.Random(0)
    for _ in range(200):
        start = choose.randrange(len(TEXT))
        string = TEXT[start : start + choose.randrange(1, 12)]
        expected = next(count for count, text in enumerate(whole, 1) if string in text)
        search = StopStrings(["never", string], tokenizer)
        assert next(count for count in range(1, len(tokens) + 1) if search.met(tokens[:count])) == expected, string


def test_an_answer_ends_with_its_stop_string(model, tokenizer, ids):
    """The tokens that hold it are kept; rows and a queue of prompts alike."""
    ask = {"max_new_tokens": 20, "stop_token_ids": [], "pad_token_id": PAD, "row_seeds": range(5)}
    plain = generate(model, ids, torch.ones_like(ids), **ask)
    string = tokenizer.decode(plain.sequences[2])[5:8]
    ask |= {"stop_strings": [string], "tokenizer": tokenizer}
    found = generate(model, ids, torch.ones_like(ids), **ask)
    many = generate_many(model, ids.tolist(), max_batch=2, **ask)
    assert 0 < found.ended.sum() < 5
    for row in range(5):
        tokens = plain.sequences[row].tolist()
        ends = [count for count in range(1, 21) if string in tokenizer.decode(tokens[:count])]
        length = ends[0] if ends else 20
        for one in (found, many):
            assert one.lengths[row] == length and bool(one.ended[row]) is bool(ends)
            assert one.sequences[row, :length].tolist() == tokens[:length]


# --- as they come -----------------------------------------------------------------------------------------------------


def test_each_token_is_reported_once_and_in_order(model, ids):
    told: dict[int, list[int]] = {row: [] for row in range(10)}
    ask = {"max_new_tokens": 10, "stop_token_ids": range(8, 60), "pad_token_id": PAD, "row_seeds": range(10)}
    ask |= {"num_return_sequences": 2, "on_token": lambda row, token: told[row].append(token)}
    found = generate_many(model, ids.tolist(), max_batch=3, **ask)
    assert len(set(found.lengths.tolist())) > 1
    assert told == {row: found.sequences[row, : found.lengths[row]].tolist() for row in range(10)}


def pieces_of(template, tokenizer, tokens: list[int]) -> tuple[list[str], str]:
    """The pieces that a stream shows, and the whole text."""
    pieces: list[str] = []
    stream = TextStream(template, tokenizer, pieces.append)
    for token in tokens:
        stream.add(token)
    return pieces, stream.finish()


def test_pieces_of_text_make_the_answer_and_break_no_character(folder, tokenizer):
    template = load_template(folder, tokenizer)
    tokens = tokenizer(f"  {TEXT}  ", add_special_tokens=False)["input_ids"]
    assert any("\ufffd" in tokenizer.decode([token]) for token in tokens)  # some characters are several tokens
    pieces, text = pieces_of(template, tokenizer, [*tokens, tokenizer.eos_token_id])
    assert text == TEXT.strip() and "".join(pieces) == text and len(pieces) > 20
    assert not any("\ufffd" in piece or piece == "" for piece in pieces)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_pieces_of_chatglm_are_corrected_before_they_are_shown(generation, shared_dir, tmp_path):
    """Full-width marks beside Chinese characters, the year, characters in bytes."""
    copy_tokenizer(tmp_path, generation, shared_dir)
    shutil.copyfile(shared_dir / "golden" / generation / "official" / "config.json", tmp_path / "config.json")
    tokenizer = load_tokenizer(tmp_path)
    template = load_template(tmp_path, tokenizer)
    said = "你好，我是[[训练时间]]的模型：会说中文！and English, too. 🍞龘龘？[[训练时间]]"
    tokens = template.encode_answers(tokenizer, [said])[0]
    pieces, text = pieces_of(template, tokenizer, tokens)
    assert "2023年" in text and "[[" not in text and text == template.decode_answer(tokenizer, tokens)
    assert "".join(pieces) == text and len(pieces) > 10
    assert not any("\ufffd" in piece for piece in pieces)
