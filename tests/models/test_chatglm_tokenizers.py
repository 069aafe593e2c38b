"""ChatGLM's tokenizers give what the original code gave (golden data of transformers 4.27 and 4.30), and more."""

import copy
import inspect
import json
import pickle

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from errors import UserError
from models.chatglm.registration import ChatGLMTokenizer
from models.tokenizer import load_tokenizer
from tests.models.chatglm_folders import GENERATIONS, change_json, golden, tokenizer_folder
from tests.tiny_chatglm import small_vocabulary

LENGTHS = {"chatglm": 130344, "chatglm2": 64794, "chatglm3": 64798}
# Spelled-out control tokens, alone and inside a text.
NAMES = (
    *("[gMASK]", "[MASK]", "[sMASK]", "<sop>", "<eop>", "sop", "eop", "</s>", "<s>", "<pad>", "<unk>", "<|user|>"),
    *("<|assistant|>", "<|observation|>", "<|system|>", "<ENC>", "<dBLOCK>", "<unused_0>", "<0x0A>"),
)


SPECIAL = [f"{role}_token{end}" for role in ("pad", "eos", "bos") for end in ("", "_id")] + ["unk_token", "mask_token_id"]


@pytest.fixture(scope="module", params=GENERATIONS)
def version(request):
    return request.param


@pytest.fixture(scope="module")
def folder(version, shared_dir, tmp_path_factory):
    return tokenizer_folder(tmp_path_factory.mktemp(version), shared_dir, version)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return ChatGLMTokenizer.from_pretrained(folder)


@pytest.fixture
def known(shared_dir, version):
    return golden(shared_dir, version, "tokenizer")


# --- equal to the originals -------------------------------------------------------------------------------------------


def test_texts_become_the_tokens_and_ids_of_the_original(tokenizer, known):
    texts = [row["text"] for row in known["strings"]]
    assert len(texts) > 60
    at_once = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    for row, ids in zip(known["strings"], at_once, strict=True):
        assert tokenizer.tokenize(row["text"]) == row["tokens"]
        assert ids == tokenizer(row["text"], add_special_tokens=False)["input_ids"] == row["ids"]
        assert tokenizer.encode(row["text"]) == row["ids_with_special"]
    for row in known["pairs"]:
        assert tokenizer(row["a"], row["b"])["input_ids"] == row["ids"]


def test_ids_become_the_text_of_the_original(tokenizer, known):
    for row in known["strings"]:
        whole = row["ids_with_special"]
        assert tokenizer.decode(row["ids"]) == row["decode_ids"]
        assert tokenizer.decode(whole) == row["decode_with_special"]
        assert tokenizer.decode(whole, skip_special_tokens=True) == row["decode_with_special_skip"]
        assert tokenizer.decode(row["ids"], clean_up_tokenization_spaces=False) == row["decode_ids_noclean"]
        text = tokenizer.decode(whole, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert text == row["decode_with_special_skip_noclean"]
    for row in known["single_token_decode"]:
        assert tokenizer.convert_ids_to_tokens(row["id"]) == row["token"]
        assert tokenizer.decode([row["id"]]) == tokenizer.decode(row["id"]) == row["decode"]


def test_batches_have_the_ids_masks_and_positions_of_the_original(tokenizer, known):
    for case in [*known["batches"], known["pair_batch"]]:
        texts = (case["texts"],) if "texts" in case else (case["a"], case["b"])
        found = tokenizer(*texts, **case["kwargs"])
        expected = {name: case[name] for name in case if name in tokenizer.model_input_names}
        assert set(found) == set(expected)
        for name, value in expected.items():
            assert np.array_equal(np.array(found[name], dtype=object), np.array(value, dtype=object)), case["kwargs"]


def test_special_tokens_and_sizes_are_the_original_s(tokenizer, known, version):
    """For ChatGLM2 and ChatGLM3 the original lists no special tokens; here pad and end token are skipped as such."""
    special = known["special"]
    assert len(tokenizer) == tokenizer.vocab_size == special["len"] == LENGTHS[version] == len(tokenizer.get_vocab())
    for name in (*SPECIAL, "padding_side", "model_input_names"):
        assert getattr(tokenizer, name) == special[name], name
    if version == "chatglm":
        for name in ("gmask_token", "gmask_token_id", "end_token", "end_token_id", "all_special_tokens"):
            assert getattr(tokenizer, name) == special[name], name
    else:
        assert sorted(tokenizer.all_special_ids) == [0, 2]
        assert {name: tokenizer.get_command(name) for name in special["get_command"]} == special["get_command"]
    for token, number in special["token_to_id"].items():
        assert tokenizer.convert_tokens_to_ids(token) == number
    for number, token in special["id_to_token_tail"].items():
        expected = "" if isinstance(token, dict) else token  # the original raises IndexError
        assert tokenizer.convert_ids_to_tokens(int(number)) == expected


def test_chatglm3_can_read_role_tokens_out_of_text(shared_dir, tmp_path):
    folder = tokenizer_folder(tmp_path, shared_dir, "chatglm3")
    tokenizer = ChatGLMTokenizer.from_pretrained(folder, encode_special_tokens=True)
    for row in golden(shared_dir, "chatglm3", "prompts")["encode_special_tokens_true"]:
        assert tokenizer.tokenize(row["text"]) == row["tokens"]
        assert tokenizer(row["text"], add_special_tokens=False)["input_ids"] == row["ids"]
        assert tokenizer.decode(row["ids"]) == row["decode"]
        assert tokenizer.control_ids.isdisjoint(tokenizer.encode_plain([row["text"]])[0])
    tokenizer.save_pretrained(tmp_path / "saved")
    assert ChatGLMTokenizer.from_pretrained(tmp_path / "saved").tokenize("<|user|>") == ["<|user|>"]


# --- where the originals are wrong ------------------------------------------------------------------------------------


def test_plain_encoding_never_gives_a_control_token(tokenizer, known):
    texts = [*NAMES, *(f"a {name}b" for name in NAMES), "".join(NAMES), *(row["text"] for row in known["strings"])]
    for text, ids in zip(texts, tokenizer.encode_plain(texts), strict=True):
        assert tokenizer.control_ids.isdisjoint(ids), text
        assert tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] == ids
    names = ("[gMASK]", "<|user|>") if tokenizer.chatglm_version == "chatglm3" else ("[gMASK]",)
    for name in names:
        assert tokenizer.decode(tokenizer.encode_plain([f"a {name} b"])[0]) == f"a {name} b"
    assert tokenizer.encode_plain([]) == []


def test_ids_without_a_token_decode_to_nothing(tokenizer, version):
    """A random network generates them: it has more rows than the tokenizer has pieces."""
    rows = 130528 if version == "chatglm" else 65024
    ids = tokenizer.encode_plain(["你好"])[0]
    beyond = list(range(len(tokenizer), rows))
    assert len(beyond) > 100
    assert tokenizer.decode(ids + beyond + [-1]) == tokenizer.decode(ids) == "你好"
    assert tokenizer.decode(beyond) == "" == tokenizer.decode(beyond[0])
    assert tokenizer.convert_ids_to_tokens(beyond[:2]) == ["", ""]


def test_half_a_surrogate_pair_is_replaced(tokenizer):
    whole, half = tokenizer.encode_plain(["a😀", "a\ud83d"])
    assert tokenizer.decode(whole) == "a😀"
    assert half == tokenizer.encode_plain(["a\ufffd"])[0]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_is_the_row_alone_and_pads_beside_it(tokenizer, version, side):
    for texts in (["你好", "晚上睡不着怎么办", "a"], ["填空：[MASK]，是", "b"]):
        batch = tokenizer(texts, padding=True, padding_side=side)
        for place, text in enumerate(texts):
            alone = tokenizer([text], padding=True)
            length, width = len(alone["input_ids"][0]), len(batch["input_ids"][place])
            real = np.zeros(width, dtype=bool)
            real[-length if side == "left" else 0 : None if side == "left" else length] = True
            assert np.array(batch["input_ids"][place])[real].tolist() == alone["input_ids"][0]
            positions, mask = np.array(batch["position_ids"][place]), np.array(batch["attention_mask"][place])
            assert np.array_equal(positions[..., real], alone["position_ids"][0]) and not positions[..., ~real].any()
            seen = mask[..., real, :][..., real] if version == "chatglm" else mask[real]
            assert np.array_equal(seen, alone["attention_mask"][0])
            assert mask[..., ~real].all() if version == "chatglm" else not mask[~real].any()


@pytest.mark.detail(9)
@pytest.mark.ppo
def test_the_mask_of_a_prefix_lm_in_a_plain_loop(shared_dir, tmp_path):
    tokenizer = ChatGLMTokenizer.from_pretrained(tokenizer_folder(tmp_path, shared_dir, "chatglm"))
    found = tokenizer(["问一个问题", "a"], ["答", "the answer is longer"], padding=True, return_tensors="pt")
    assert (found.attention_mask.dtype, found.attention_mask.shape[1]) == (torch.bool, 1)
    for ids, mask in zip(found.input_ids.tolist(), found.attention_mask[:, 0].tolist(), strict=True):
        start = ids.index(tokenizer.bos_token_id)
        for row, token in enumerate(ids):
            for column, seen in enumerate(ids):
                pad = tokenizer.pad_token_id in (token, seen)
                assert mask[row][column] == (pad or (column > row and column >= start))


def test_batches_of_other_kinds(tokenizer):
    texts = ["你好", "晚上睡不着怎么办"]
    ids = tokenizer(texts)["input_ids"]
    tensors = tokenizer(texts, padding=True, return_tensors="pt")
    again = tokenizer.pad({"input_ids": ids}, return_tensors="pt")  # as a data collator does
    assert set(tensors) == set(again) == {"input_ids", "attention_mask", "position_ids"}
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)
    assert tokenizer(texts, padding=True, return_attention_mask=False).keys() == {"input_ids", "position_ids"}
    assert tokenizer("", add_special_tokens=False)["input_ids"] == []
    assert tokenizer([("a", "b")])["input_ids"] == [tokenizer("a", "b")["input_ids"]]
    mask = tokenizer("a", "b", return_special_tokens_mask=True)["special_tokens_mask"]
    assert mask == [int(token in tokenizer.control_ids) for token in tokenizer("a", "b")["input_ids"]]
    assert 0 < sum(mask) < len(mask)
    with pytest.raises(ValueError, match="above"):
        tokenizer(texts, padding=True, padding_side="above")


# --- saved and read back ----------------------------------------------------------------------------------------------


def test_it_reads_back_as_it_was_saved_and_the_original_can_open_it(tokenizer, folder, version, tmp_path, known):
    tokenizer.save_pretrained(tmp_path)
    again = ChatGLMTokenizer.from_pretrained(tmp_path)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.special_tokens_map == tokenizer.special_tokens_map
    for row in known["strings"]:
        assert again(row["text"])["input_ids"] == row["ids_with_special"]
        assert again.decode(row["ids_with_special"]) == row["decode_with_special"]
    assert (tmp_path / tokenizer.vocab_file).read_bytes() == (folder / tokenizer.vocab_file).read_bytes()
    first, saved = (json.loads((at / "tokenizer_config.json").read_text()) for at in (folder, tmp_path))
    changed = {key for key in first if saved.get(key) != first[key]} - {"name_or_path", "auto_map"}
    assert not changed
    assert saved["chatglm_version"] == version
    if version != "chatglm":  # properties without a setter in the original: named in the file, they end its loading
        assert not {"eos_token", "pad_token", "unk_token", "added_tokens_decoder"} & set(saved)


def test_pad_and_end_token_can_be_set_and_come_back(folder, tmp_path):
    tokenizer = ChatGLMTokenizer.from_pretrained(folder)
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path)
    again = ChatGLMTokenizer.from_pretrained(tmp_path)
    assert again.pad_token_id == again.eos_token_id == end != pad
    assert again(["a", "a b c"], padding=True)["input_ids"][0][0] == end
    assert (
        again("[MASK] a <eop> </s>")["input_ids"]
        == ChatGLMTokenizer.from_pretrained(folder)("[MASK] a <eop> </s>")["input_ids"]
    )
    again.pad_token_id = pad
    again.save_pretrained(tmp_path)
    assert ChatGLMTokenizer.from_pretrained(tmp_path).pad_token_id == pad


def test_added_tokens_follow_the_vocabulary(folder, version, tmp_path):
    tokenizer = ChatGLMTokenizer.from_pretrained(folder)
    assert tokenizer.add_tokens(["<|end|>"], special_tokens=True) == 1
    tokenizer.save_pretrained(tmp_path)
    for one in (tokenizer, ChatGLMTokenizer.from_pretrained(tmp_path)):
        assert one.convert_tokens_to_ids("<|end|>") == LENGTHS[version] == len(one) - 1
        ids = one("a<|end|>b", add_special_tokens=False)["input_ids"]
        assert ids == [*one.encode_plain(["a"])[0], len(one) - 1, *one.encode_plain(["b"])[0]]
        assert one.decode(ids) == "a<|end|>b"
        assert one.decode(ids, skip_special_tokens=True) == "a b"
        assert LENGTHS[version] not in one.encode_plain(["a<|end|>b"])[0]


def test_copies_and_processes_get_the_same_tokenizer(tokenizer):
    for one in (pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer)):
        assert one("你好 a")["input_ids"] == tokenizer("你好 a")["input_ids"]
        assert type(one) is type(tokenizer)


# --- which one is it? -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trust", [{}, {"trust_remote_code": True}])
def test_transformers_opens_it_by_itself(folder, version, tmp_path, shared_dir, trust):
    if trust and "explicit_local_code" not in inspect.getsource(AutoTokenizer):
        pytest.skip("this transformers prefers the code of the folder")
    tokenizer_folder(tmp_path, shared_dir, version)
    (tmp_path / "tokenization_chatglm.py").write_text("raise RuntimeError('code of the folder was run')\n")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, **trust)
    assert type(tokenizer) is type(ChatGLMTokenizer.from_pretrained(folder))
    assert type(tokenizer).__name__ == "ChatGLMTokenizer"
    assert tokenizer.chatglm_version == version
    tokenizer.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "config.json").write_bytes((tmp_path / "config.json").read_bytes())
    assert AutoTokenizer.from_pretrained(tmp_path / "saved", **trust).chatglm_version == version


@pytest.mark.parametrize(
    ("tokenizer_config", "config", "expected"),
    [
        ({"chatglm_version": "chatglm3"}, {"seq_length": 32768}, "chatglm3"),
        ({"chatglm_version": "chatglm2", "name_or_path": "THUDM/chatglm3-6b"}, {}, "chatglm2"),
        ({"name_or_path": "THUDM/ChatGLM3-6B"}, {"seq_length": 32768}, "chatglm3"),
        ({}, {"_name_or_path": "THUDM/chatglm3-6b-base", "seq_length": 32768}, "chatglm3"),
        ({}, {"seq_length": 8192}, "chatglm3"),
        ({}, {"seq_length": 32768}, "chatglm2"),
        ({}, {"seq_length": 777}, "chatglm2"),
        ({}, None, "chatglm2"),
    ],
)
def test_chatglm2_and_chatglm3_are_told_apart(shared_dir, tmp_path, tokenizer_config, config, expected):
    folder = tokenizer_folder(tmp_path, shared_dir, "chatglm2")
    change_json(folder / "tokenizer_config.json", **{"name_or_path": None} | tokenizer_config)
    if config is None:
        (folder / "config.json").unlink()
    else:
        change_json(folder / "config.json", **{"_name_or_path": None, "seq_length": None} | config)
    tokenizer = ChatGLMTokenizer.from_pretrained(folder)
    assert (tokenizer.chatglm_version, len(tokenizer)) == (expected, LENGTHS[expected])


@pytest.mark.parametrize(
    ("version", "break_it", "message"),
    [
        ("chatglm", lambda at: (at / "ice_text.model").unlink(), "no tokenizer .*ice_text.model"),
        ("chatglm3", lambda at: (at / "tokenizer.model").unlink(), "no tokenizer .*tokenizer.model"),
        ("chatglm2", lambda at: (at / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n"), "no SentencePiece model"),
        ("chatglm", lambda at: cut_short(at / "ice_text.model"), "no SentencePiece model"),
        ("chatglm2", lambda at: cut_short(at / "tokenizer.model"), "no SentencePiece model"),
        ("chatglm", lambda at: (at / "ice_text.model").write_bytes(b""), "no SentencePiece model"),
        ("chatglm", lambda at: change_json(at / "tokenizer_config.json", num_image_tokens=20000), "20000"),
        ("chatglm", lambda at: change_json(at / "tokenizer_config.json", num_image_tokens=None), "20000"),
        ("chatglm", lambda at: (at / "tokenizer_config.json").write_text("{"), "copy its tokenizer files"),
        ("chatglm2", lambda at: (at / "tokenizer_config.json").write_text("{"), "copy its tokenizer files"),
        ("chatglm2", lambda at: change_json(at / "tokenizer_config.json", chatglm_version="chatglm9"), "chatglm9"),
        ("chatglm", lambda at: (at / "ice_text.model").write_bytes(small_vocabulary("chatglm2-6b")), r"pieces .*\[gMASK\]"),
    ],
)
def test_a_broken_folder_is_told_in_one_sentence(shared_dir, tmp_path, version, break_it, message):
    folder = tokenizer_folder(tmp_path / "model", shared_dir, version)
    break_it(folder)
    with pytest.raises(UserError, match=message) as error:
        load_tokenizer(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def cut_short(file) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
