"""Labels, scores, ranks and marks of a record are read for what they mean, or refused."""

import pytest

from tests.training.utils.data.rows import check_read, check_refused, rec, turns

GOOD = {"prompt": "Q", "chosen": "A", "rejected": "B"}

pytestmark = pytest.mark.fast

ROWS = {
    # labels and scores
    "labels 1 and 0": (
        [{"prompt": "Q", "completion": f"A{n}", "label": n % 2} for n in range(4)]
        + [{"prompt": "Q", "completion": "A5", "label": True}],
        [rec(turns("Q"), "A1", "A0"), rec(turns("Q"), "A3", "A2"), rec(turns("Q"), "A5")],
        "",
    ),
    "labels in words": (
        [{"prompt": "Q", "response": "A", "label": "good"}, {"prompt": "Q", "response": "B", "kto_tag": "Bad"}],
        [rec(turns("Q"), "A", "B")],
        "",
    ),
    "more bad ones than good ones": (
        [{"prompt": "Q", "response": f"A{n}", "label": n == 3} for n in range(4)],
        [rec(turns("Q"), "A3", "A0")],
        "2 with an answer judged bad without a good one to the same prompt (2 answers; first: line 2)",
    ),
    "a pair of labelled dialogues": (
        [{"messages": turns("Q", "A", "R", answer), "label": answer == "good"} for answer in ("bad", "good")],
        [rec(turns("Q"), "A"), rec(turns("Q", "A", "R"), "good", "bad")],
        "1 with an earlier answer of a dialogue judged bad (first: line 1)",
    ),
    "another answer than that of the messages": (
        [{"messages": turns("Q", "A"), "response": "B"}, {"messages": turns("R"), "response": "B"}],
        [rec(turns("R"), "B")],
        '1 with messages that end with another answer than "response"',
    ),
    "labels that judge nothing": (
        [{"messages": turns("Q", "A"), "label": "math"}],
        [rec(turns("Q"), "A")],
        "not read: label",
    ),
    "a dialogue judged bad": (
        [{"messages": turns("Q", "A"), "label": None}, {"messages": turns("Q", "A", "R", "B"), "label": "false"}],
        [rec(turns("Q"), "A")],
        "1 with an answer judged bad without a good one to the same prompt (2 answers; first: line 2)",
    ),
    "scores": (
        [{"instruction": "Q", "input": "", "output": ["a", "b", "c"], "scores": [2, 3.5, 1]}],
        [rec(turns("Q"), "b", "c")],
        "1 with a rank between the best and the worst",
    ),
    "equal scores": (
        [{"prompt": "Q", "response": ["a"], "reward": [1]}, {"prompt": "Q", "response": ["a", "b"], "reward": [1, 1]}],
        [rec(turns("Q"), "a")],
        "1 with answers with the same score (2 answers",
    ),
    "articles of SQuAD": (
        [
            {"paragraphs": [{"context": "T.", "qas": [{"question": "Q", "answers": [{"text": "A"}]}, {"question": "R"}]}]},
            {"paragraphs": []},
        ],
        [rec(turns("Q\nT."), "A")],
        "1 with a question without an answer (first: line 1)",
    ),
    "a rank beside one answer": (
        [{"prompt": "Q", "response": "a", "rank": 2}],
        [rec(turns("Q"), "a")],
        "not read: rank (it orders a list of answers; there is none)",
    ),
    "answers that all begin with their prompt": (
        [
            {"prompt": "1+1=", "chosen": "1+1= 2", "rejected": "1+1=\n3"},
            {"prompt": "def f():", "chosen": "def f():\n    1", "rejected": "def f():2"},
            {"prompt": "def g():\n", "chosen": "def g():\n    1", "rejected": "def g(): 2"},
        ],
        [rec(turns("1+1="), "2", "3"), rec(turns("def f():"), "    1", "2"), rec(turns("def g():"), "    1", "2")],
        "all answers begin with their prompt, which is taken off them",
    ),
    "answers that begin with instruction and input": (
        [
            {"instruction": "Add.", "input": "1, 2", "output": "Add.\n\n1, 2\n3"},
            {"instruction": "翻译。", "input": "猫", "output": "翻译。猫：cat"},
        ],
        [rec(turns("Add.\n1, 2"), "3"), rec(turns("翻译。\n猫"), "：cat")],
        "all answers begin with their prompt, which is taken off them",
    ),
    "answers in lists that begin with their prompt": (
        [
            {"messages": turns("1+1=", "1+1= 2", "2+2=", "2+2= 4")},
            {"messages": turns("3+3=", "3+3= 6")},
        ],
        [rec(turns("1+1="), "2"), rec(turns("1+1=", "2", "2+2="), "4"), rec(turns("3+3="), "6")],
        "all answers begin with their prompt, which is taken off them",
    ),
    "ranked answers that begin with their prompt": (
        [{"instruction": f"{n}+1=", "output": [f"{n}+1= {n + 1}", f"{n}+1= {n}"]} for n in (1, 2)],
        [rec(turns(f"{n}+1="), f"{n + 1}", f"{n}") for n in (1, 2)],
        "all answers begin with their prompt, which is taken off them",
    ),
    "pairs of messages of which one answer does not begin with its prompt": (
        [{"messages": turns(f"{n}+1="), "chosen": f"{n}+1= 2", "rejected": "3" if n else "0+1= 3"} for n in (0, 1)],
        [rec(turns("0+1="), "0+1= 2", "0+1= 3"), rec(turns("1+1="), "1+1= 2", "3")],
        "",
    ),
    "pairs that say they are ties": (
        [GOOD, GOOD | {"tie": True}, GOOD | {"is_tie": "1"}, GOOD | {"winner": "tie (bothbad)"}],
        [rec(turns("Q"), "A", "B")],
        "left out 3 with a tie of two answers (6 answers; first: line 2)",
    ),
    **{
        f"a pair with equal {better}": (
            [GOOD | {better: 5, worse: 2}, GOOD | {better: 5, worse: 5}],
            [rec(turns("Q"), "A", "B")],
            "left out 1 with a tie of two answers",
        )
        for better, worse in (("chosen-rating", "rejected-rating"), ("score_chosen", "score_rejected"))
    },
    "a pair without scores": ([GOOD | {"chosen_score": "", "rejected_score": "", "tie": 0}], [rec(turns("Q"), "A", "B")], ""),
    "answers with their scores": (
        [{"instruction": "Q", "completions": [{"response": r, "overall_score": s, "why": "c"} for r, s in (("b", 2), ("a", 9))]}],
        [rec(turns("Q"), "a", "b")],
        "texts in fields that are not read: completions.why; ",
    ),
    "answers with their ranks": (
        [{"prompt": "Q", "responses": [{"answer": r, "rank": n} for r, n in (("b", 2.0), ("a", 1.0), ("c", 3.0))]}],
        [rec(turns("Q"), "a", "c")],
        "1 with a rank between the best and the worst",
    ),
    "answers with their scores, as Arrow has them": (
        [{"prompt": "Q", "responses": {"text": ["b", "a"], "score": [1, 2], "note": [None, None]}}],
        [rec(turns("Q"), "a", "b")],
        "",
    ),
    "texts of a dialogue in turn": (
        [{"conversations": ["Q", "A", "R", "B"]}, {"conversations": ["Q", "A", "R"]}],
        [rec(turns("Q"), "A"), rec(turns("Q", "A", "R"), "B"), rec(turns("Q"), "A")],
        "1 with a last question without an answer (first: line 2)",
    ),
    "equal ranks": (
        [{"prompt": "Q", "response": ["a"], "rank": [1]}, {"prompt": "Q", "response": ["a", "b"], "rank": [1, 1]}],
        [rec(turns("Q"), "a")],
        "1 with answers with the same rank (2 answers",
    ),
    "a paragraph of SQuAD": (
        [{"context": "T.", "qas": [{"question": "Q", "answers": [{"text": "A"}]}]}],
        [rec(turns("Q\nT."), "A")],
        "",
    ),
    "answers whose first word begins with their prompt": (
        [{"prompt": "Blue", "response": "Blueberries grow."}, {"prompt": "Red", "response": "Redwood is old."}],
        [rec(turns("Blue"), "Blueberries grow."), rec(turns("Red"), "Redwood is old.")],
        "",
    ),
    "an answer that begins with its prompt": (
        [{"prompt": "1+1=", "response": "1+1= 2"}, {"prompt": "Once", "response": "Twice"}],
        [rec(turns("1+1="), "1+1= 2"), rec(turns("Once"), "Twice")],
        "",
    ),
    "ranks": (
        [{"instruction": "Q", "input": "", "output": ["a", "b", "c"], "rank": [3, 1, 2]}],
        [rec(turns("Q"), "b", "a")],
        "1 with a rank between the best and the worst",
    ),
    "a score of another name": (
        [{"prompt": "Q", "response": ["a", "b"], "overall_score": [1, 5]}],
        [rec(turns("Q"), "b", "a")],
        "",
    ),
    "scores and ranks": (
        [{"prompt": "Q", "response": ["a", "b"], "scores": [1, 5], "ranks": [2, 1], "length": [7, 9]}],
        [rec(turns("Q"), "b", "a")],
        "fields without content, not read: length",
    ),
    "texts beside several answers": (
        [{"instruction": "Q", "output": ["a", "b"], "models": ["one", "two"], "critique": ["fine", "wrong"]}],
        [rec(turns("Q"), "a", "b")],
        "texts in fields that are not read: critique; ",
    ),
    # labels and marks of a record
    **{
        name: (
            [{"prompt": "Q", "response": f"A{bad}", name: not bad} for bad in (0, 1)],
            [rec(turns("Q"), "A0", "A1")],
            "",
        )
        for name in ("is_good", "is_correct", "Correct", "desirable")
    },
    "a label that judges nothing among others": (
        [{"prompt": "Q", "response": f"A{n}", "label": label} for n, label in enumerate((1, "neutral"))],
        [rec(turns("Q"), "A0")],
        "1 with a label that is neither good nor bad (first: line 2)",
    ),
    "an empty one of several answers": (
        [{"instruction": "Q", "output": ["a", "", "b"]}],
        [rec(turns("Q"), "a", "b")],
        "1 with an empty answer",
    ),
    "an answer that is called correct": (
        [{"prompt": "Q", "response": "A", "correct": "Paris"}],
        [rec(turns("Q"), "A")],
        "texts in fields that are not read: correct",
    ),
    **{
        f"{name} of a record": (
            [{"messages": turns("Q", "A"), name: good}, {"messages": turns("R", "B", "S", "C"), name: bad}],
            [rec(turns("Q"), "A")],
            "1 with a record marked not to learn (2 answers; first: line 2)",
        )
        for name, good, bad in (("loss", True, False), ("weight", 1.0, 0), ("loss_mask", 1, 0), ("masked", "", True))
    },
}


@pytest.mark.parametrize("name", ROWS)
def test_rows(name, tmp_path):
    check_read(tmp_path, *ROWS[name])


REFUSED = {
    "scores missing": ({"prompt": "Q", "response": ["a", "b"]}, "a list of 2 texts and nothing says which is better"),
    "a score missing": ({"prompt": "Q", "response": ["a", "b"], "score": [1, None]}, "1 numbers for the 2 answers"),
    "scores of another number": ({"prompt": "Q", "response": ["a", "b"], "score": [1]}, "1 numbers for the 2 answers"),
    **{
        f"{name} of several answers": (
            {"instruction": "Q", "output": ["a", "b"], name: value},
            f'"{name}" may say their order: --columns score={name} .high is good., --columns rank={name} ',
        )
        for name, value in (
            *(("ranking", [1, 0]), ("quality", ["4", "5/5"]), ("is_correct", [False, True])),
            *(("verdict", ["bad", "good"]), ("annotations", [{"helpfulness": 1}, {"helpfulness": 5}])),
        )
    },
    "an order without a word": ({"instruction": "Q", "response": ["a", "b"]}, "nothing says which is better"),
    "ranks against scores": (
        {"prompt": "Q", "response": ["a", "b"], "score": [1, 2], "rank": [1, 2]},
        "put the answers in different orders",
    ),
    "half a weight of a record": ({"prompt": "Q", "response": "A", "weight": 0.5}, 'the record has "weight" 0.5, expected true'),
    "a mask of tokens": ({"prompt": "Q", "response": "A", "loss_mask": [0, 1]}, r'the record has "loss_mask" .0, 1., expected'),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, tmp_path):
    check_refused(tmp_path, *REFUSED[name])
