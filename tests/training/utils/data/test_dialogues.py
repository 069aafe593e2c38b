"""A dialogue trains in one sequence where the template allows: the same loss and gradient as a record for each answer."""

import pytest
import torch
from torch.nn.utils import parameters_to_vector

from models.heads import TokenLogProbs
from models.load import load_causal_lm
from models.templates import load_template
from models.tokenizer import load_tokenizer
from tests.closeness import assert_close
from tests.tiny import tiny_checkpoint, tiny_tokenizer
from tests.tiny_chatglm import tiny_chatglm
from tests.training.utils.data.rows import run, turns, write_lines
from training.utils.data.batching import collate_sft, target_counts
from training.utils.data.records import load_records
from training.utils.data.splits import select_phase
from training.utils.loss import sft_loss

DIALOGUE = turns("system: Be short.", "2+2?", "4 is it.", "你好，3+3?", "六.", "And 4+4?", "8, of course.")
# What Qwen3 does: the newest answer opens with an empty thought, the earlier ones do not.
THOUGHT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
)


def apart(messages, tokenizer) -> list[dict]:
    """The rows of step 1 with a record for each answer, from the template alone."""
    template, rows = load_template(None, tokenizer), []
    for end, turn in enumerate(messages):
        if turn["role"] == "assistant":
            prompt = template.encode_prompt(tokenizer, messages[:end])
            ids = prompt + template.encode_answer(tokenizer, turn["content"])
            rows.append({"input_ids": ids, "prompt_length": len(prompt), "between": [], "length": len(ids)})
    return rows


def targets(rows) -> list[list[list[int]]]:
    """The tokens of each answer that is learned, by row."""
    found = []
    for row in rows:
        starts, ends = [row["prompt_length"], *row["between"][1::2]], [*row["between"][0::2], row["length"]]
        found.append([row["input_ids"][start:end] for start, end in zip(starts, ends, strict=True)])
    return found


def loss_and_gradient(folder, rows, tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """The summed loss of rows in one padded batch, and the gradient of all weights."""
    model = TokenLogProbs(load_causal_lm(folder, dtype=torch.float32))
    ids = {"pad_id": tokenizer.pad_token_id, "end_id": load_template(None, tokenizer).end_token_id}
    batch = collate_sft(rows, **ids)
    mask = batch.loss_mask[:, 1:]
    scores = model(batch.input_ids, batch.attention_mask, target_mask=mask, labels=batch.labels)
    loss = sft_loss(scores, mask, float(mask.sum()))
    loss.backward()
    weights = [weight.grad for weight in model.parameters() if weight.grad is not None]
    return loss.detach(), parameters_to_vector(weights)


@pytest.mark.parametrize("family", ["llama", "qwen2", "glm4", "chatglm3"])
def test_loss_and_gradient_are_those_of_a_record_for_each_answer(family, tmp_path, request):
    if family == "chatglm3":  # its history has the next role's token where the end token of an answer is learned
        folder = tiny_chatglm(tmp_path / "model", "chatglm3-6b", request.getfixturevalue("shared_dir"))
    else:
        folder = tiny_checkpoint(tmp_path / "model", family)
    tokenizer = load_tokenizer(folder)
    data = run(write_lines(tmp_path / "a.jsonl", [{"messages": DIALOGUE}]), 1, tokenizer, max_seq_len=200)
    alone = apart(DIALOGUE, tokenizer)
    assert [len(answers) for answers in targets(data.train)] == [3]
    counts = data.report["train"]
    assert (counts["records"], counts["kept"], counts["joined"]) == (3, 1, 2)
    assert counts["tokens"] < counts["tokens_apart"] == sum(row["length"] for row in alone)
    assert sum(target_counts(data.train, "answer")) == sum(row["length"] - row["prompt_length"] for row in alone)
    together, one_by_one = (loss_and_gradient(folder, rows, tokenizer) for rows in (data.train.to_list(), alone))
    assert one_by_one[1].abs().max() > 1e-3
    for ours, theirs in zip(together, one_by_one, strict=True):
        assert_close(ours, theirs, 1e-5)


@pytest.mark.parametrize("name", ["chatglm", "chatglm2", "thought"])
def test_records_stay_where_the_history_is_written_otherwise(name, tmp_path, request):
    """ChatGLM-6B's positions depend on the end of the prompt; ChatGLM2 cuts an answer into other tokens in the history."""
    if name == "thought":
        tokenizer = tiny_tokenizer("qwen2")
        tokenizer.chat_template = THOUGHT
    else:
        tokenizer = request.getfixturevalue("chatglm_tokenizers")[name]
    data = run(write_lines(tmp_path / "a.jsonl", [{"messages": DIALOGUE}]), 1, tokenizer, max_seq_len=400)
    assert data.train.to_list() == apart(DIALOGUE, tokenizer)
    assert data.report["train"]["joined"] == 0


@pytest.mark.fast
def test_answers_of_another_share_or_marked_not_to_learn_are_context(tmp_path, llama):
    """In a set with a constant opening question the whole record decides: a dialogue's answers fall into several shares."""
    path = tmp_path / "constant.jsonl"
    write_lines(path, [{"messages": turns("Hi", f"a{n}", f"b{n}", f"c{n}", f"d{n}", f"e{n}")} for n in range(40)])
    data = run(path, 1, llama, data_split="6,0,4", eval_fraction=0.3)
    share = select_phase(load_records(str(path)), 1, data_split="6,0,4", seed=1234, eval_fraction=0.3)
    for split, records in zip(("train", "eval"), share, strict=True):
        counts, rows = data.report[split], targets(data.datasets[split])
        assert counts["records"] == counts["kept"] + counts["joined"] == len(records)
        assert len({len(answers) for answers in rows}) > 1
        learned = [llama.decode(ids[:-1]).strip() for answers in rows for ids in answers]
        assert sorted(learned) == sorted(records["chosen"])

    rows = [{"messages": [turn | ({"loss": False} if turn["content"] == "六." else {}) for turn in DIALOGUE]}]
    (learned,) = targets(run(write_lines(tmp_path / "a.jsonl", rows), 1, llama, max_seq_len=300).train)
    template = load_template(None, llama)
    assert learned == [template.encode_answer(llama, text) for text in ("4 is it.", "8, of course.")]


@pytest.mark.fast
def test_too_long_a_dialogue_loses_its_oldest_whole_turns_and_no_target(tmp_path, tokenizer):
    messages = turns("system: Be short.", *(text for n in range(12) for text in (f"What is {n}+{n}?", f"It is {2 * n}.")))
    data = run(write_lines(tmp_path / "a.jsonl", [{"messages": messages}]), 1, tokenizer, max_seq_len=120)
    template = load_template(None, tokenizer)
    rows = data.train.to_list()
    assert 1 < len(rows) < 12 and all(row["length"] <= 120 for row in rows)
    assert data.report["train"]["truncated_prompts"] > 0 == data.report["train"]["truncated_answers"]
    expected = [template.encode_answer(tokenizer, f"It is {2 * n}.") for n in range(12)]
    assert [answer for row in targets(data.train) for answer in row] == expected
    first = 0
    for row, answers in zip(rows, targets(data.train), strict=True):
        window = [messages[0], *messages[1 + 2 * first : 1 + 2 * (first + len(answers))]]
        assert row["input_ids"] == apart(window, tokenizer)[-1]["input_ids"]
        first += len(answers)
    longer = [messages[0], *messages[1 + 2 * (first - len(targets(data.train)[-1]) - 1) :]]
    assert apart(longer, tokenizer)[-1]["length"] > 120  # one turn more would not fit


@pytest.mark.fast
def test_a_dialogue_stays_whole_where_records_are_tokenised_in_batches(tmp_path, llama):
    many = [{"messages": turns(f"{n}?", "a", "b", "c", "d", "e")} for n in range(400)]
    data = run(write_lines(tmp_path / "a.jsonl", many), 1, llama)
    assert len(data.train) == 400 and {len(answers) for answers in targets(data.train)} == {3}
