"""Records as people have them are read for what they mean: the files of ../shared/cases, and the same kinds in small rows."""

import json
from datetime import datetime

import pytest
from datasets import Dataset

from errors import UserError
from tests.training.utils.data.rows import check_read, check_refused, read, rec, run, turns, write_lines
from training.utils.data.records import read_records, readings
from training.utils.data.sources import open_source

pytestmark = pytest.mark.fast

PERU, CHILE = rec(turns("Capital of Peru?"), "Lima."), rec(turns("Capital of Chile?"), "Santiago.")
FRUIT = turns("system: One word.", "Name a fruit.", "Pear.", "And its colour?")
SKY = turns("system: One word.", "Colour of grass?", "Green.")
# Of a file of ../shared/cases/read: its records, and words of the note about what is left out.
CASES = {
    "labels_good_bad": (
        [rec(turns("How do I greet a guest?"), "Say welcome, and offer a chair.", "Shout at him.")],
        "1 with an answer judged bad without a good one to the same prompt (first: line 3)",
    ),
    "pair_text_prompt_dialogues": ([rec(FRUIT, "Green.", "Seven.")], ""),
    "query_response_history_system": (
        [rec(SKY[:2], "Green."), rec([*SKY, *turns("And the sky?")], "Blue.")],
        "",
    ),
    "answer_list_with_scores": ([rec(turns("Say hello."), "Hello!", "Go away.")], ""),
    "content_parts": ([rec(turns("2+2?"), "4."), rec(turns("2+2?", "4.", "3+3?"), "6.")], ""),
    "turns_not_to_learn": (
        [
            rec(turns("Draft?", "A bad draft.", "Better?"), "A good one."),
            rec(turns("Draft?", "Bad.", "Better?"), "Good."),
        ],
        "2 with an answer marked not to learn",
    ),
    "role_marks": ([rec(turns("Capital of Peru?"), "Lima.", "Rome.")], ""),
    "pairs_other_names": (
        [rec(turns("Capital of Peru?"), "")],
        "texts in fields that are not read: pos_resp, neg_resp",
    ),
    "conversation_pairs": (
        [PERU, rec(turns("Capital of Peru?", "Lima.", "And of Chile?"), "Santiago.")],
        "",
    ),
    "list_of_messages_a_line": ([PERU, CHILE], ""),
    "indented_answer": ([rec(turns("Body of f, which returns x:"), "    return x\n")], ""),
}


@pytest.mark.parametrize("name", CASES)
def test_cases(name, shared_cases):
    expected, note = CASES[name]
    records, notes = read(shared_cases / f"{name}.jsonl")
    assert records == expected
    assert note in notes and bool(note) == bool(notes), notes


def one(*contents, role="role", content="content"):
    """Turns under other names."""
    return [{role: turn["role"], content: turn["content"]} for turn in turns(*contents)]


WHOLE = {"chosen": turns("Q1", "A1", "Q2", "A"), "rejected": turns("Q1", "A1", "Q2", "B")}
TWO = rec(turns("Q1", "A1", "Q2"), "A", "B")
DIALOGUE = "\n\nHuman: Q1\n\nAssistant: A1\n\nHuman: Q2\n\nAssistant:"
UNLEARNED = "1 with an answer marked not to learn"
ROWS = {
    # pairs as whole dialogues beside a prompt
    "the first question": ([{"prompt": "Q1", **WHOLE}], [TWO], ""),
    "the last question": ([{"prompt": "Q2", **WHOLE}], [TWO], ""),
    "the prompt and a system text": (
        [{"prompt": "Q1", "system": "S", **WHOLE}],
        [rec(turns("system: S", "Q1", "A1", "Q2"), "A", "B")],
        "",
    ),
    "an instruction": ([{"instruction": "Q1", **WHOLE}], [TWO], ""),
    "ultrafeedback": ([{"prompt": "Q1", "messages": WHOLE["chosen"], **WHOLE}], [TWO], ""),
    "messages and rejected": ([{"messages": WHOLE["chosen"], "rejected_response": "B"}], [TWO], ""),
    "one whole, one alone": ([{"prompt": "Q1", "chosen": WHOLE["chosen"], "rejected": "B"}], [TWO], ""),
    "turns behind the prompt": (
        [{"prompt": "Q1", "chosen": WHOLE["chosen"][1:], "rejected": WHOLE["rejected"][1:]}],
        [TWO],
        "",
    ),
    "a response of messages": (
        [{"prompt": "Q1", "response": turns("Q1", "A1", "Q2", "A2")}],
        [rec(turns("Q1"), "A1"), rec(turns("Q1", "A1", "Q2"), "A2")],
        "",
    ),
    "pairs that differ before": (
        [
            {"prompt": "Q1", **WHOLE},
            {"prompt": "Q1", "chosen": WHOLE["chosen"], "rejected": turns("Q1", "X", "Q2", "B")},
        ],
        [TWO],
        "1 with two dialogues that differ before the last answer (first: line 2)",
    ),
    "another prompt": (
        [{"prompt": "Q1", **WHOLE}, {"prompt": "Who?", **WHOLE}],
        [TWO],
        "1 with a prompt that is not in the dialogue",
    ),
    # turns that are not learned, or no text
    "masked": (
        [{"messages": [*turns("Q"), {"role": "assistant", "content": "X", "masked": True}, *turns("R", "A")]}],
        [rec(turns("Q", "X", "R"), "A")],
        UNLEARNED,
    ),
    "train": (
        [
            {
                "conversations": [
                    {"from": "human", "value": "Q"},
                    {"from": "gpt", "value": "X", "train": False},
                    {"from": "human", "value": "R"},
                    {"from": "gpt", "value": "A", "train": True},
                ]
            }
        ],
        [rec(turns("Q", "X", "R"), "A")],
        UNLEARNED,
    ),
    "an image": (
        [
            {"messages": turns("Q", "A")},
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": "x"}]},
                    *turns("Q", "A", "R", "B")[1:],
                ]
            },
        ],
        [rec(turns("Q"), "A")],
        "1 with a part of a message that is no text (image_url) (2 answers; first: line 2)",
    ),
    "an image beside": (
        [{"messages": turns("Q", "A"), "images": []}, {"messages": turns("Q", "A"), "images": ["x.png"]}],
        [rec(turns("Q"), "A")],
        'no text (field "images")',
    ),
    "a greeting and a last question": (
        [{"messages": [{"role": "assistant", "content": "Welcome"}, *turns("Q", "A", "R")]}],
        [rec(turns("Q"), "A")],
        "1 with an answer before the first question (first: line 1), 1 with a last question without an answer (first: line 1)",
    ),
    "an empty turn": (
        [{"messages": turns("Q", "A")}, {"messages": turns("Q", "A", "", "B", "R", "C")}],
        [rec(turns("Q"), "A")],
        "1 with an empty turn (3 answers; first: line 2)",
    ),
    "an image in a message": (
        [{"messages": turns("Q", "A")}, {"messages": [turns("Q")[0] | {"images": ["x.png"]}, *turns("Q", "A")[1:]]}],
        [rec(turns("Q"), "A")],
        '1 with something that is no text (field "messages.images") (first: line 2)',
    ),
    "a result of a tool before the first question": (
        [{"messages": [{"role": "tool", "content": "5"}, *turns("Q", "A")]}],
        [rec(turns("Q"), "A")],
        "1 with a turn of a tool before the first question",
    ),
    "a greeting in a prompt": (
        [{"prompt": [*turns("Q", "Welcome")[1:], *turns("Q")], "response": "A"}],
        [rec(turns("Q"), "A")],
        "1 with an answer before the first question",
    ),
    "a last question with null": (
        [{"messages": [{"human": "Q", "assistant": "A"}, {"human": "R", "assistant": None}]}],
        [rec(turns("Q"), "A")],
        "1 with a last question without an answer",
    ),
    # names
    "Chinese marks": (
        [{"prompt": "[Round 0]\n问：甲\n答：乙\n[Round 1]\n问：丙\n答：", "response": "丁"}],
        [rec(turns("甲", "乙", "丙"), "丁")],
        "",
    ),
    "marks in an instruction": (
        [{"instruction": "Human:Hi\nAssistant:Yo\nHuman:Who?\nAssistant:", "input": "I", "output": "A"}],
        [rec(turns("Hi", "Yo", "Who?\nI"), "A")],
        "",
    ),
    "input below a prompt with marks": (
        [{"prompt": "\n\nHuman: Hi\n\nAssistant:", "input": "I", "response": " A"}],
        [rec(turns("Hi\nI"), "A")],
        "",
    ),
    **{
        f"whole dialogues as texts beside {asked}": (
            [{asked: prompt} | {side: f"{DIALOGUE} {side}" for side in ("chosen", "rejected")}],
            [rec(turns("Q1", "A1", "Q2"), "chosen", "rejected")],
            "",
        )
        for asked, prompt in (("prompt", "Q1"), ("instruction", "Q2"), ("prompt", DIALOGUE), ("messages", turns("Q1")))
    },
    "a whole dialogue as a response": (
        [{"prompt": "Q1", "response": "Human: Q1\nAssistant: A1\nHuman: Q2\nAssistant: A2"}],
        [rec(turns("Q1"), "A1"), rec(turns("Q1", "A1", "Q2"), "A2")],
        "",
    ),
    "a dialogue as text about another question": (
        [{"prompt": "Q", "response": "A"}, {"prompt": "Q", "response": f"{DIALOGUE} A2"}],
        [rec(turns("Q"), "A")],
        "1 with a prompt that is not in the dialogue beside it",
    ),
    "an answer that quotes a dialogue": (
        [{"prompt": "Write one.", "response": "User: Hi\nAssistant: Yo"}],
        [rec(turns("Write one."), "User: Hi\nAssistant: Yo")],
        "",
    ),
    "Human and AI": (
        [{"prompt": "Human: Hi\nAI: Yo\nHuman: Who?\nAI:", "chosen": " A", "rejected": " B"}],
        [rec(turns("Hi", "Yo", "Who?"), "A", "B")],
        "",
    ),
    "问题 and 回答": ([{"问题": "甲", "回答": "乙"}], [rec(turns("甲"), "乙")], ""),
    "指令, 输入 and 输出": (
        [{"指令": "甲", "输入": "乙", "输出": "丙", "历史": [["丁", "戊"]]}],
        [rec(turns("丁"), "戊"), rec(turns("丁", "戊", "甲\n乙"), "丙")],
        "",
    ),
    "input and output in a list": (
        [{"conversation": [{"system": "S", "input": "Q", "output": "A"}]}],
        [rec(turns("system: S", "Q"), "A")],
        "",
    ),
    "developer": (
        [{"messages": [{"role": "developer", "content": "S"}, *turns("Q", "A")]}],
        [rec(turns("system: S", "Q"), "A")],
        "",
    ),
    "capitals": ([{"Prompt": "Q", " RESPONSE": "A"}], [rec(turns("Q"), "A")], ""),
    "two names for one": (
        [{"query": "Q", "问题": "R", "response": "A"}],
        [rec(turns("Q"), "A")],
        "texts in fields that are not read: 问题",
    ),
    "a null of our name": ([{"query": "Q", "prompt": None, "response": "A"}], [rec(turns("Q"), "A")], ""),
    **{
        f"{question} and {answer}": ([{question: "Q", answer: "A", "id": "7x"}], [rec(turns("Q"), "A")], "not read: id")
        for question, answer in (
            *(("question", "answer"), ("Question", "Answer"), ("q", "a"), ("Q", "A"), ("input", "output")),
            *(("prompt", "answer"), ("instruction", "answer"), ("question", "response"), ("问", "答")),
        )
    },
    "question, input and output": ([{"question": "Q", "input": "I", "output": "A"}], [rec(turns("Q\nI"), "A")], ""),
    "question, context and answer": (
        [{"question": "Q", "context": "C", "answer": "A", "history": [["P", "B"]], "system": "S"}],
        [rec(turns("system: S", "P"), "B"), rec(turns("system: S", "P", "B", "Q\nC"), "A")],
        "",
    ),
    "question, chosen and rejected": (
        [{"system": "S", "question": "Q", "chosen": "A", "rejected": "B"}],
        [rec(turns("system: S", "Q"), "A", "B")],
        "",
    ),
    "a question alone": ([{"question": "Q", "id": 1}], [rec(turns("Q"), "")], "not read: id"),
    # fields that are not read
    "a score of one answer": (
        [{"prompt": "Q", "response": "A", "score": 3}],
        [rec(turns("Q"), "A")],
        "fields without content, not read: score",
    ),
    "no content": (
        [{"prompt": "Q", "response": "A", "id": "7", "source": "web"}],
        [rec(turns("Q"), "A")],
        "fields without content, not read: id, source",
    ),
    "content": (
        [{"prompt": "Q", "response": "A", "thought": "T"}],
        [rec(turns("Q"), "A")],
        "texts in fields that are not read: thought; --columns",
    ),
    "the name of a user": (
        [{"messages": [{"role": "user", "content": "Q", "name": "Bob"}, *turns("Q", "A")[1:]]}],
        [rec(turns("Q"), "A")],
        "fields without content, not read: messages.name",
    ),
    "content in a message": (
        [{"messages": [*turns("Q"), {"role": "assistant", "content": "A", "reasoning_content": "T"}]}],
        [rec(turns("Q"), "A")],
        "texts in fields that are not read: messages.reasoning_content",
    ),
    "white space of answers": (
        [{"prompt": "Q", "response": "  x\n", "history": [["P", " y "]]}],
        [rec(turns("P"), " y "), rec(turns("P", " y ", "Q"), "  x\n")],
        "",
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows(name, tmp_path):
    check_read(tmp_path, *ROWS[name])


REFUSED = {
    "half a weight": (
        {"messages": [*turns("Q"), {"role": "assistant", "content": "A", "weight": 0.5}]},
        '"weight" 0.5, expected true',
    ),
    "parts of a turn": (
        {"messages": [*turns("Q"), {"role": "assistant", "content": "A", "train_detail": [1]}]},
        "only whole turns",
    ),
    "tools that are none": ({"prompt": "Q", "response": "A", "tools": ["web"]}, 'field "tools" is no list of tools'),
    "a call without a name": (
        {"messages": [*turns("Q"), {"role": "function_call", "content": '{"x": 1}'}]},
        "a call that is not of the form",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, tmp_path):
    check_refused(tmp_path, *REFUSED[name])


def test_columns_leave_the_other_known_fields(tmp_path):
    row = {"q": "And?", "response": "Red.", "history": [["Colour?", "Blue."]], "system": "S"}
    records, notes = read(write_lines(tmp_path / "a.jsonl", [row]), columns={"prompt": "q"})
    before = turns("system: S", "Colour?", "Blue.")
    assert records == [rec(before[:2], "Blue."), rec([*before, *turns("And?")], "Red.")] and not notes


@pytest.mark.parametrize(
    "row, columns, note",
    [
        ({"question": "Q", "response": "A", "prompt": "P"}, {"prompt": "question"}, "prompt (of the file)"),
        ({"question": "Q", "response": "A", "query": "P"}, {"prompt": "question"}, "query"),
        ({"q": {"text": "Q", "title": "P"}, "response": "A"}, {"prompt": "q.text"}, "q (the rest)"),
        ({"q": {"text": "Q"}, "response": "A", "prompt": "Q"}, {"prompt": "q.text"}, ""),
        ({"prompt": "A", "response": "Q"}, {"prompt": "response", "response": "prompt"}, ""),
        ({"places": [2, 1], "prompt": "Q", "response": ["B", "A"]}, {"rank": "places"}, ""),
    ],
)
def test_what_columns_push_aside_is_told(row, columns, note, tmp_path):
    records, notes = read(write_lines(tmp_path / "a.jsonl", [row]), columns=columns)
    assert records == [rec(turns("Q"), "A", "B" if "places" in row else None)]
    assert (f"not read: {note};" in notes) if note else not notes


@pytest.mark.parametrize("phase", [1, 2, 3])
def test_prompts_beside_texts_that_are_not_understood(phase, tmp_path, llama):
    """Steps 1 and 2 name the fields and the --columns that read them; step 3 takes the prompts."""
    path = write_lines(tmp_path / "a.jsonl", [{"prompt": f"Q{n}", "neg_resp": "B", "pos_resp": "A"} for n in range(3)])
    if phase == 3:
        assert len(run(path, 3, llama).train) == 3
        return
    message = r"the fields neg_resp, pos_resp .*--columns chosen=pos_resp,rejected=neg_resp"
    with pytest.raises(UserError, match=message):
        run(path, phase, llama)
    columns = {"chosen": "pos_resp", "rejected": "neg_resp"}
    assert read(path, columns=columns)[0][0] == rec(turns("Q0"), "A", "B")
    assert len(run(path, phase, llama, column_map=columns).train) == 3


def test_a_label_that_judges_behind_one_that_does_not(tmp_path):
    rows = [{"prompt": f"Q{n}", "response": "A", "label": label} for n, label in enumerate(("neutral", 0))]
    with pytest.raises(UserError, match=r'line 2: field "label" is 0, which says whether .* put a record with such a label first'):
        read(write_lines(tmp_path / "a.jsonl", rows))


@pytest.mark.parametrize("name", ["response", "completion"])
def test_answers_that_only_later_records_have(name, tmp_path, llama):
    path = write_lines(tmp_path / "a.jsonl", [{"prompt": "Q"}, {"prompt": "R", name: "A"}])
    with pytest.raises(UserError, match=f"the first record is one, but later records have {name};"):
        run(path, 1, llama)


def test_labelled_answers_in_the_steps(tmp_path, llama):
    rows = [{"messages": turns("Q", "A"), "label": True}, {"messages": turns("Q", "B"), "label": False}]
    path = write_lines(tmp_path / "a.jsonl", rows)
    assert len(run(path, 1, llama).train) == len(run(path, 2, llama).train) == 1


def test_labelled_calls_of_tools_become_pairs(tmp_path):
    call = {"role": "function_call", "content": '{"name": "add", "arguments": {}}'}
    rows = [{"messages": [*turns("Q"), call], "label": True}, {"messages": turns("Q", "No."), "label": False}]
    for one in (rows, [row | {"label": not row["label"]} for row in rows]):
        ((record,), _) = read(write_lines(tmp_path / "a.jsonl", one))
        calls = json.loads(record["calls"])
        better, worse = (calls[name] for name in (("chosen", "rejected") if one is rows else ("rejected", "chosen")))
        assert better["tool_calls"][0]["function"]["name"] == "add" and worse == {"role": "assistant", "content": "No."}
        assert "add" in record["chosen" if one is rows else "rejected"]


FORMS = {
    "alpaca": ([{"instruction": "Q", "input": "", "output": "A"}], "its fields instruction, output"),
    "all that any row has": (
        [{"prompt": "Q", "response": "A"}, {"prompt": "R", "response": "B", "history": [["P", "C"]], "system": "S"}],
        "its fields prompt, response, history, system",
    ),
    "labels": ([{"messages": turns("Q", "A"), "kto_tag": 1}], "its fields messages, label=kto_tag"),
    "no labels": ([{"messages": turns("Q", "A"), "label": "math"}], "its fields messages"),
    "scores": ([{"prompt": "Q", "response": ["A", "B"], "rating": [1, 2]}], "its fields prompt, response, score=rating"),
    "margin": ([{"prompt": "Q", "chosen": "A", "rejected": "B", "margin": 1}], "its fields prompt, chosen, rejected, margin"),
    "other names": ([{"问题": "Q", "Answer": "A", "输入": "I"}], "its fields prompt=问题, response=Answer, input=输入"),
    "tools": ([{"messages": turns("Q", "A"), "tools": [{"name": "f"}]}], "its fields messages, tools"),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_field_that_is_used_is_named(name, tmp_path):
    rows, form = FORMS[name]
    found = read_records(open_source(str(write_lines(tmp_path / "a.jsonl", rows))))
    assert readings(found)["train"].form == form


CALL = {"name": "f", "arguments": {"x": 1}}


@pytest.mark.parametrize("answer, calls", [([CALL, CALL], 2), (CALL, 1), ([], 0), ([CALL | {"why": "y"}], 0), ([1], 0)])
def test_an_answer_that_is_json_of_calls_beside_tools_is_these_calls(answer, calls, tmp_path):
    """As in xLAM's sets; as text it would be learned in another form than the template's."""
    row = {"query": "Q", "answer": json.dumps(answer), "tools": json.dumps([{"name": "f"}])}
    records, notes = read(write_lines(tmp_path / "a.jsonl", [row]), columns={"prompt": "query", "response": "answer"})
    chosen = json.loads(records[0]["calls"])["chosen"]
    assert [one["function"] for one in chosen.get("tool_calls", [])] == [CALL] * calls and not notes
    assert chosen["content"] == ("" if calls else row["answer"])


@pytest.mark.parametrize("tools", [[{"name": "f"}], {"name": "f"}, '[{"name": "f"}]'])
@pytest.mark.parametrize("answer", [{}, {"response": "A"}, {"response": ["A", "B"], "score": [2, 1]}])
def test_tools_beside_a_prompt(answer, tools, tmp_path):
    records, notes = read(write_lines(tmp_path / "a.jsonl", [{"prompt": "Q", **answer, "tools": tools}]))
    assert json.loads(records[0]["calls"])["tools"] == [{"name": "f"}] and not notes


def test_a_text_that_became_a_time(tmp_path):
    Dataset.from_dict({"prompt": ["When?"], "response": [datetime(2020, 1, 1)]}).save_to_disk(str(tmp_path / "set"))
    with pytest.raises(UserError, match=r"\"response\" is a datetime and no longer the text it was: .*original file.*for it\.$"):
        read(tmp_path / "set")
