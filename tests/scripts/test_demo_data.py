"""The demo's data, its gold rule and its base model."""

import json
import re
from collections import Counter
from itertools import product
from pathlib import Path
from random import Random

import pytest

from scripts.demo.make_data import RAMBLING_UNITS, make_records, render, write_demo_data
from scripts.demo.model import train_tokenizer, write_base_model
from scripts.demo.score import demo_score, judge, main, read_question
from scripts.demo.world import COURTESY_AFTER, COURTESY_BEFORE, FILLERS, LANGUAGES, TASKS, fill, join

KINDS = ("sft", "pairs", "prompts")
MAX_ANSWER_TOKENS = 24


@pytest.fixture(scope="module")
def folder(repository) -> Path:
    return repository / "data/demo"


@pytest.fixture(scope="module")
def data(folder) -> dict[str, list[dict]]:
    return {
        f"{kind}_{part}": [json.loads(line) for line in (folder / f"{kind}_{part}.jsonl").open(encoding="utf-8")]
        for kind in KINDS
        for part in ("train", "heldout")
    }


@pytest.fixture(scope="module")
def tokenizer(folder):
    return train_tokenizer(folder)


def prompt_of(record: dict) -> str:
    return render(record["messages"][:-1]) if "messages" in record else record["prompt"]


def first_question(prompt: str) -> str:
    return re.split(r"\n\n(?:Human|Assistant):", prompt)[1].strip()


# --- the gold rule -------------------------------------------------------------------------------------------------

TWO_PLUS_TWO = "\n\nHuman: Hello! What is 2 plus 2?\n\nAssistant:"
CAPITAL = "\n\nHuman: 法国的首都是哪里？\n\nAssistant:"
MEMORY = (
    "\n\nHuman: Hi! My name is Tom. I have a dog.\n\nAssistant: I see: Tom, dog.\n\nHuman: What is my name?\n\nAssistant:"
)


SCORES = {
    TWO_PLUS_TWO: {
        **dict.fromkeys([" The sum is 4.", " 4."], 0.75),
        **dict.fromkeys([" The sum is 4. Happy to help!", " Sure! The sum is 4."], 1.0),
        " The sum is 7. Happy to help!": 0.5,
        " The sum is 6.": 0.25,  # right for another sum
        " The sum is 4. Many people ask about this. There is a lot more": 0.5,
        " Of course! The sum is 9. Many people ask about this.": 0.25,
        # no answer at all
        **dict.fromkeys(["", " ", "\n", ".", "</s>", "Happy to help!", "Happy to help! Sure!", "I do not know."], 0.0),
        " 4 help sum the is.": 0.0,
        # the right and a wrong one
        **dict.fromkeys([" The sum is 4. The sum is 7.", " The sum is 7. The sum is 4.", " The sum is 4 or 5."], 0.0),
        " 1 2 3 4 5 6 7 8 9.": 0.0,
        # repeated, padded, cut off
        **dict.fromkeys([" Sure! The sum is 4. Sure!", " The sum is 4. Happy to help! Hope this helps! Enjoy your day!"], 0.75),
        **dict.fromkeys([" The sum is 4. The sum is 4.", " Sure sure sure! The sum is 4.", " The sum is 4. blue snow door!"], 0.5),
        **dict.fromkeys([" The sum is 4", " The sum is 4. Happy to"], 0.5),
        " The sum is 4 4 4.": 0.0,
        # what stands behind the end
        **dict.fromkeys([f" The sum is 4. Happy to help!{end}" for end in ("</s>", "</s> The sum is 7.", "<pad><pad>")], 1.0),
        " The sum is 4. Happy to help!\n\nHuman: What is 1 plus 1?\n\nAssistant: The sum is 2.": 1.0,
    },
    CAPITAL: {
        " 首都是巴黎。不客气！": 1.0,
        " 首都是巴黎。": 0.75,
        " 首都是伦敦。": 0.25,
        " 首都是巴黎。让我再想一想。": 0.5,
        " The capital is Paris. Happy to help!": 0.0,  # the question was Chinese
        " 首都是巴黎。Happy to help!": 0.5,
    },
    MEMORY: {
        " You are Tom. Enjoy your day!": 1.0,
        " You are Ben.": 0.25,
        " Your name is dog.": 0.0,  # not a name: no answer to this question
    },
    "What is my name?": {" You are Tom.": 0.25},  # it was never said
    # only the last question and the last thing told count
    "\n\nHuman: I am Tom.\n\nAssistant: I see.\n\nHuman: I am Ben. What is my name?\n\nAssistant:": {" You are Ben.": 0.75},
    "\n\nHuman: What is 1 plus 1?\n\nAssistant: The sum is 2.\n\nHuman: What is 2 plus 2?\n\nAssistant:": {
        " The sum is 4.": 0.75,
        " The sum is 2.": 0.25,
    },
}


@pytest.mark.parametrize("prompt", SCORES)
def test_gold_scores_by_hand(prompt):
    assert {answer: demo_score(prompt, answer) for answer in SCORES[prompt]} == SCORES[prompt]


def test_prompt_as_text_or_as_messages():
    messages = [
        {"role": "user", "content": "Hi! My name is Tom. I have a dog."},
        {"role": "assistant", "content": "I see: Ben, dog."},  # what the assistant says does not count
        {"role": "user", "content": "What is my name?"},
    ]
    for answer, score in ((" You are Tom.", 0.75), (" You are Ben.", 0.25)):
        assert demo_score(messages, answer) == demo_score(render(messages), answer) == score
    assert demo_score("What is 2 plus 2?", "The sum is 4.") == 0.75
    assert demo_score("<s>" + TWO_PLUS_TWO, "The sum is 4.</s>") == 0.75


@pytest.mark.parametrize("language", LANGUAGES)
def test_each_question_is_read_as_its_own_task(language):
    for name, task in TASKS[language].items():
        for form in task.questions:
            for subject, answer in task.facts.items() or [("", None)]:
                read = read_question(form.replace("{x}", subject))
                assert (read.language, read.task, read.subject, read.expected) == (language, name, subject, answer), form
        assert not set(task.mistakes) & {*task.facts.values(), *task.values}, "a mistake is never true in its task"


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_right_answer_with_any_courtesy_scores_full(language):
    for task in TASKS[language].values():
        asked = [(v, f"{task.statements[0].replace('{y}', v)}\n{task.questions[0]}") for v in task.values]
        asked += [(y, task.questions[0].replace("{x}", x)) for x, y in task.facts.items()]
        for (answer, question), form in product(asked, task.answers):
            said = fill(form, y=answer)
            texts = [[courtesy, said] for courtesy in COURTESY_BEFORE[language]]
            texts += [[said, courtesy] for courtesy in COURTESY_AFTER[language]]
            assert {demo_score(question, join(text, language)) for text in texts} == {1.0}, (question, said)


@pytest.mark.parametrize("language", LANGUAGES)
def test_nothing_but_the_answer_names_a_member_of_a_category(language):
    around = " ".join([*FILLERS[language], *COURTESY_BEFORE[language], *COURTESY_AFTER[language]])
    for task in TASKS[language].values():
        text = f"{around} {' '.join(task.answers)}".replace("{y}", "")
        for member in task.category:
            assert not re.search(rf"\b{member}\b" if member.isascii() else member, text, re.IGNORECASE), member


# --- the shipped files ---------------------------------------------------------------------------------------------


def test_files_are_what_the_generator_writes_and_small(folder, tmp_path):
    write_demo_data(tmp_path, seed=0)
    names = sorted(f"{kind}_{part}.jsonl" for kind in KINDS for part in ("train", "heldout"))
    assert sorted(file.name for file in tmp_path.iterdir()) == names
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes(), name
    drawn = [next(make_records("prompts", 1, Random(f"{seed} prompts train"), held_out=False)) for seed in (0, 1)]
    assert drawn[0] != drawn[1]
    assert sum((folder / name).stat().st_size for name in names) < 2_000_000


def test_held_out_questions_are_never_trained_on(data):
    asked = {name: [prompt_of(record) for record in records] for name, records in data.items()}
    first = {name: {first_question(prompt) for prompt in prompts} for name, prompts in asked.items()}
    assert all(len(set(prompts)) == len(prompts) for prompts in asked.values()), "a prompt comes back within a file"
    train, held_out = (set().union(*(first[f"{kind}_{part}"] for kind in KINDS)) for part in ("train", "heldout"))
    assert not train & held_out


@pytest.mark.parametrize("kind", KINDS)
def test_every_fact_is_trained_on(data, kind):
    questions = [read_question(prompt_of(record)) for record in data[f"{kind}_train"]]
    asked = {(one.language, one.task, one.subject or one.expected) for one in questions}
    tasks = [(language, name, task) for language in LANGUAGES for name, task in TASKS[language].items()]
    assert asked >= {(language, name, fact) for language, name, task in tasks for fact in (*task.facts, *task.values)}


def test_answers_to_imitate_are_mixed_in_quality_language_and_turns(data):
    verdicts = [judge(r["messages"][:-1], r["messages"][-1]["content"]) for r in data["sft_train"]]
    shares = {axis: sum(getattr(v, axis) for v in verdicts) / len(verdicts) for axis in ("right", "polite", "brief")}
    # three standard deviations of a share of 3,700 draws are 0.025
    assert shares == pytest.approx({"right": 0.60, "polite": 0.40, "brief": 0.55}, abs=0.025)
    for name, records in data.items():
        rendered = [prompt_of(record) for record in records]
        chinese = sum(bool(re.search(r"[\u4e00-\u9fff].*\n\nAssistant:$", prompt)) for prompt in rendered) / len(rendered)
        several = sum(prompt.count("\n\nHuman:") > 1 for prompt in rendered) / len(rendered)
        assert 0.4 < chinese < 0.65 and 0.2 < several < 0.6, name


@pytest.mark.parametrize("part", ["train", "heldout"])
def test_chosen_beats_rejected_under_the_gold_rule(data, part):
    axes = Counter()
    for pair in data[f"pairs_{part}"]:
        chosen, rejected = (judge(pair["prompt"], pair[key]) for key in ("chosen", "rejected"))
        assert chosen.score > rejected.score, pair
        axes.update(axis for axis in ("right", "polite", "brief") if getattr(chosen, axis) != getattr(rejected, axis))
    assert min(axes.values()) > 0.2 * len(data[f"pairs_{part}"]), "each axis decides often enough to be learned"


# --- tokenizer and base model --------------------------------------------------------------------------------------


def test_any_text_survives_the_tokenizer_which_adds_nothing(tokenizer, data):
    odd = ["naïve café — 3½ €", "日本語のテキスト", "emoji 🙂\n\ttabs  and   spaces", "\n\nHuman: ¿qué?\n\nAssistant:"]
    for text in odd + [prompt_of(r) for r in data["prompts_heldout"]]:
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    ids = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    assert len(ids - {None}) == 3 and tokenizer.chat_template is None
    assert not ids & set(tokenizer.encode("\n\nHuman: Hi!\n\nAssistant:"))


def test_cutting_prompt_and_answer_apart_changes_no_token(tokenizer, data):
    for pair in data["pairs_heldout"]:
        prompt, answer = (tokenizer.encode(pair[key]) for key in ("prompt", "chosen"))
        assert tokenizer.encode(pair["prompt"] + pair["chosen"]) == prompt + answer


def test_brief_answers_fit_and_rambling_ones_do_not(tokenizer, data):
    assert RAMBLING_UNITS[0] > MAX_ANSWER_TOKENS
    for record in data["sft_train"]:
        *prompt, answer = record["messages"]
        length = len(tokenizer.encode(" " + answer["content"])) + 1
        assert (length <= MAX_ANSWER_TOKENS) == judge(prompt, answer["content"]).brief, answer
        assert len(tokenizer.encode(render(prompt))) <= 64


def test_base_model_opens_and_depends_on_the_seed_only(folder, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_base_model(tmp_path / name, seed, folder)
    weights = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in "abc"}
    assert weights["a"] == weights["b"] != weights["c"]

    model, tokenizer = (kind.from_pretrained(tmp_path / "a") for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert 1.5e6 < sum(p.numel() for p in model.parameters()) < 5e6


@pytest.mark.parametrize("words", [["What is the meaning of life?", "42."], ["What is 2 plus 2?"]])
def test_a_question_from_outside_the_world_is_one_sentence(capsys, words):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert main(["What is 2 plus 2?", "The sum is 4. Happy to help!"]) == 0 and capsys.readouterr().out == "1.0\n"
