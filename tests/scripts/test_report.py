"""The page about a run: what is on it, that it needs nothing else, and that no damaged file ends in a traceback."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from scripts.report.__main__ import main
from scripts.report.answers import turns_of
from scripts.report.curves import axis, draw_curve
from scripts.report.results import shown
from scripts.report.runs import find_runs
from scripts.report.words import CURVES, RESULTS, STEP_TITLES, WORDS
from steps import SECTIONS

pytestmark = pytest.mark.fast

SUMMARY = {
    "sft": {"perplexity_before": 900.0, "perplexity_after": 3.125},
    "reward": {"accuracy": 0.9512},
    "ppo": {
        **{"gold_score_before": 0.5, "gold_score_after": 0.9001, "length_before": 15.0, "length_after": 12.5},
        **{"eos_rate": 0.9917, "kl": 7.25},
    },
    "seconds": {"sft": 100.0, "reward": 50.0, "ppo": 125.0, "total": 290.0},
    "peak_memory_gb": 1.234,
    "seed": 77,
}
PROMPT = "\n\nHuman: 1 < 2 & 大海?\n\nAssistant:"


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write(file: Path, content: str | bytes | list | dict) -> None:
    """A list becomes JSON lines, a dict one JSON file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = lines(content) if isinstance(content, list) else json.dumps(content) if isinstance(content, dict) else content
    file.write_bytes(text if isinstance(text, bytes) else text.encode())


def write_steps(sft: Path, reward: Path, ppo: Path) -> None:
    """Three steps that are done, with few metrics."""
    rows = [{"step": 0, "eval/perplexity": 900.0}, {"step": 10, "train/loss": 2.0, "train/lr": 0.1}]
    write(sft / "metrics.jsonl", [*rows, {"step": 20, "train/loss": 1.0}, {"step": 20, "eval/perplexity": 3.125}])
    write(reward / "metrics.jsonl", [{"step": 5, "train/loss": 0.6}, {"step": 5, "eval/accuracy": 0.9512}])
    values = {"score": 0.5, "kl": 1.5, "length": 12.0, "eos_rate": 0.5, "actor_loss": 0.0}
    metrics = [{"step": step, **{f"train/{name}": value + step for name, value in values.items()}} for step in (1, 2)]
    metrics += [{"step": step, "eval/score": 0.25 + step, "eval/win_rate": 0.625} for step in (0, 2)]
    write(ppo / "metrics.jsonl", metrics)
    sample = {"prompt": PROMPT, "score": 2.5, "ended": True}
    held_out = [sample | {"part": "eval", "reference": "<b>no</b>", "reference_score": 1.5, "step": step} for step in (0, 2)]
    training = [sample | {"part": "train", "prompt": "[Round 1]\n\n问：你好\n\n答：", "step": step, "score": -1} for step in (1, 2)]
    answers = ["zero", "蓝色\u2028。", "one", "two"]
    write(ppo / "samples.jsonl", [row | {"answer": answer} for row, answer in zip(held_out + training, answers, strict=True)])
    for folder, model in ((sft, "model_name_or_path"), (reward, "model_name_or_path"), (ppo, "actor_model_name_or_path")):
        flags = {model: "some/where/base", "data_path": ["a/b/pairs.jsonl"]}
        flags |= {"sft_only_data_path": ["c/d/sft.jsonl"]} if folder == sft else {}
        write(folder / "sanbu_done.json", {"flags": flags, "seconds": 100.0, "peak_memory_gb": 2.5})
        write(folder / "data.txt", "pairs.jsonl, read by its fields <prompt>\n")


@pytest.fixture
def demo(tmp_path) -> Path:
    """The folder of a finished demo."""
    folder = tmp_path / "run"
    write_steps(folder / "sft", folder / "reward", folder / "ppo")
    answer = {"prompt": "user: Hi\nassistant: Ho\nuser: 1 < 2?", "before": "<i>no</i>", "after": "蓝色。"}
    write(folder / "answers.jsonl", [answer | {"gold_before": 0.25, "gold_after": 1.0}])
    write(folder / "summary.json", SUMMARY)
    return folder


@pytest.fixture
def root(tmp_path) -> Path:
    """The --output-dir of train.py, all steps done."""
    folder = tmp_path / "out"
    write_steps(folder / "actor-models/opt", folder / "reward-models/small", folder / "step3-models/opt")
    return folder


def page_of(folder: Path, *more: str) -> str:
    """The page as the command line writes it."""
    assert main(["--run", str(folder), *more]) == 0
    return (folder / "report.html").read_text(encoding="utf-8")


def rows_of(page: str, kind: str) -> list[list[str]]:
    """The cells of all tables of a kind."""
    tables = re.findall(rf'<table class="{kind}">(.*?)</table>', page, flags=re.DOTALL)
    rows = [row for table in tables for row in re.findall(r"<tr>(.*?)</tr>", table, flags=re.DOTALL)]
    return [re.findall(r"<t[dh]>(.*?)</t[dh]>", row, flags=re.DOTALL) for row in rows]


def test_the_page_of_a_demo_shows_its_measure_and_needs_nothing_else(demo):
    page = page_of(demo)
    figures = dict(re.findall(r'<figure id="([^"]+)">.*?(<svg.*?</svg>)</figure>', page, flags=re.DOTALL))
    assert figures.keys() == {
        *("sft-loss", "sft-perplexity", "reward-loss", "reward-accuracy"),
        *("ppo-score", "ppo-win_rate", "ppo-kl", "ppo-length", "ppo-eos_rate"),
    }
    assert all(ElementTree.fromstring(text).tag == "svg" for text in figures.values())
    cells = [cell for row in rows_of(page, "results") for cell in row]
    for text in ("900.00", "3.12", "0.951", "0.500", "0.900", "15.0", "12.5", "0.992", "7.25", "0.90 or more"):
        assert text in cells
    assert all(text in page for text in ("seed 77", "Time: sft 1:40", "Time: total 4:50", "largest process, GB 1.23"))
    held_out, training = rows_of(page, "answers")[1], rows_of(page, "answers")[3]
    assert "<b>User</b> Hi\n<b>Assistant</b> Ho\n<b>User</b> 1 &lt; 2?" in held_out[0]
    assert "&lt;i&gt;no&lt;/i&gt;" in held_out[1] and '<span class="good">score 1<' in held_out[2] and "two" in training[1]
    assert not re.search(r"<script|<link|<img|<iframe|\ssrc=|\shref=|@import|url\(", page)


def test_the_page_of_train_py_has_the_sft_answer_beside_ppos_and_tells_held_out_from_training(root):
    page = page_of(root)
    results = {row[0]: tuple(row[1:3]) for row in rows_of(page, "results")}
    assert results["SFT: perplexity of held-out answers"] == ("900.00", "3.12")
    assert results["PPO: score of held-out answers"] == ("0.250", "2.250")
    assert results["PPO: answers that score higher than the SFT model&#x27;s"] == ("", "0.625")
    head, held_out, training_head, training = rows_of(page, "answers")
    assert head == ["prompt", "SFT model", "after PPO"] and training_head == ["prompt", "after PPO"]
    assert "1 &lt; 2 &amp; 大海?" in held_out[0] and "Human" not in held_out[0]
    assert "&lt;b&gt;no&lt;/b&gt;" in held_out[1] and "蓝色\u2028。" in held_out[2] and "zero" not in page
    assert "<div>你好</div>" in training[0] and "two" in training[1] and "Round" not in page
    order = ["Held-out prompts", "蓝色", "Training prompts: answers of rollout 2", "two"]
    assert sorted(order, key=page.index) == order
    steps = rows_of(page, "steps")
    assert [row[:2] for row in steps[1:]] == [
        ["Step 1: supervised fine-tuning", "done"], ["Step 2: reward model", "done"], ["Step 3: PPO", "done"],
    ]  # fmt: skip
    assert steps[1][3] == "b/pairs.jsonl, d/sft.jsonl"
    assert steps[3][2:7] == ["where/base", "b/pairs.jsonl", "2 rollouts", "1:40", "2.50 GB"]
    assert page.count("read by its fields &lt;prompt&gt;") == 3


def test_training_prompts_have_the_sft_answer_beside_ppos_where_it_was_kept(root):
    file = root / "step3-models/opt/samples.jsonl"
    *rows, last = map(json.loads, file.read_bytes().decode().split("\n")[:-1])
    write(file, [*rows, last | {"reference": "zwei", "reference_score": 0.5}])
    *_, head, row = rows_of(page_of(root), "answers")
    assert head == ["prompt", "SFT model", "after PPO"] and "zwei" in row[1] and '<span class="bad">score -1<' in row[2]


def test_figures_of_training_data_are_called_so(root):
    """A step that held nothing out says it in its row, its curve and the note; the others stay held-out."""
    write(root / "reward-models/small/metrics.jsonl", [{"step": 5, "eval/accuracy": 0.75, "eval/measured_on": "training"}])
    write(root / "step3-models/opt/metrics.jsonl", [{"step": step, "train/score": step, "train/kl": 1.0} for step in (1, 2)])
    page = page_of(root)
    results = {row[0]: row[1:3] for row in rows_of(page, "results")}
    assert results["Reward model: accuracy on training pairs"] == ["", "0.750"]
    assert results["PPO: score of training answers"] == ["", "2.000"]
    assert results["PPO: KL to the SFT model, nats an answer (training)"] == ["", "1.00"]
    assert "SFT: perplexity of held-out answers" in results and "held-out pairs" not in page
    note = re.search(r"<h2>Results</h2><p>(.*?)</p>", page)[1]
    assert [step for step in ("Step 1", "Step 2", "Step 3") if f"{step}: " in note] == ["Step 2", "Step 3"]
    assert "evaluated on training data 0.75" in page and "held out 3.125" in page
    assert "训练偏好对的准确率" in page_of(root, "--language", "zh")


def test_the_page_is_chinese_where_the_user_is(root, monkeypatch):
    english = page_of(root)
    assert page_of(root, "--language", "zh") != english
    for name, value in {"LC_ALL": "", "LC_MESSAGES": "", "LANG": "zh_CN.UTF-8"}.items():
        monkeypatch.setenv(name, value)
    page = page_of(root)
    words = re.sub(r"<style>.*?</style>|<pre>.*?</pre>", "", page, flags=re.DOTALL)
    assert 'lang="zh"' in words and "第 1 步：监督微调" in words
    headings = re.findall(r"<(?:h1|h2|th|figcaption)>(.*?)</", words)
    assert headings and all(re.search("[\u4e00-\u9fff]|^$", heading) for heading in headings)
    assert page_of(root, "--language", "en") == english


def test_every_word_has_its_chinese_with_the_same_values_in_it():
    for english, chinese in (*WORDS.values(), *CURVES.values(), *RESULTS.values()):
        assert re.search("[\u4e00-\u9fff]|^PPO：{gold}$", chinese)
        assert sorted(re.findall(r"{\w*}", english)) == sorted(re.findall(r"{\w*}", chinese))
    assert tuple(STEP_TITLES) == SECTIONS


def test_a_half_finished_root_says_which_steps_are_not_there(root, capsys):
    for file in (*root.glob("step3-models/opt/*"), root / "reward-models/small/sanbu_done.json"):
        file.unlink()
    page = page_of(root)
    told = capsys.readouterr().out.splitlines()
    assert told == ["Step 3: PPO is not there", f"Wrote {root}/report.html"]
    assert [row[1] for row in rows_of(page, "steps")[1:]] == ["done", "not done: cut short, or still running", "not there"]
    assert "Step 3: PPO is not there" in page and "PPO:" not in page


def test_dpo_takes_the_place_of_two_steps(tmp_path):
    write(tmp_path / "actor-models/a/metrics.jsonl", [{"step": 1, "train/loss": 1.0}])
    write(tmp_path / "dpo-models/a/metrics.jsonl", [{"step": 1, "eval/accuracy": 0.75, "eval/margin": 0.5}])
    page = page_of(tmp_path)
    assert [row[0] for row in rows_of(page, "steps")[1:]] == ["Step 1: supervised fine-tuning", "DPO"]
    assert ["DPO: accuracy on held-out pairs", "", "0.750", ""] in rows_of(page, "results")


@pytest.mark.parametrize(
    ("metrics", "section"),
    [
        ({"eval/perplexity": 2.0}, "sft"), ({"eval/accuracy": 0.5}, "reward"), ({"train/kl": 0.0, "train/margin": 1.0}, "ppo"),
        ({"train/accuracy": 0.5, "train/margin": 1.0}, "dpo"), ({"train/x": 1.0}, None),
    ],
)  # fmt: skip
def test_a_step_alone_is_told_by_its_metrics_and_flags(tmp_path, metrics, section):
    folder = tmp_path / "my-run"
    write(folder / "metrics.jsonl", [{"step": 1, **metrics}])
    (run,) = find_runs(folder)
    assert run.section == section and run.title("en") in page_of(folder)
    assert [one.section for one in find_runs(tmp_path)] == [section], "a folder of such folders"


def test_models_of_the_same_step_are_told_apart(root):
    write(root / "actor-models/other/metrics.jsonl", [{"step": 1, "train/loss": 1.0}])
    titles = [row[0] for row in rows_of(page_of(root), "steps")[1:3]]
    assert titles == ["Step 1: supervised fine-tuning (opt)", "Step 1: supervised fine-tuning (other)"]


@pytest.mark.parametrize(
    ("prompt", "turns"),
    [
        ("\n\nHuman: a\n\nAssistant:", [("user", "a")]),
        ("Be kind.\n\nHuman: a\nb\n\nAssistant: c\n\nHuman: d\n\nAssistant:",
         [("system", "Be kind."), ("user", "a\nb"), ("assistant", "c"), ("user", "d")]),
        ("[Round 0]\n问：一\n答：二\n[Round 1]\n问：三\n答：", [("user", "一"), ("assistant", "二"), ("user", "三")]),
        ("[Round 1]\n\n问：一\n\n答：二\n\n[Round 2]\n\n问：三\n\n答：", [("user", "一"), ("assistant", "二"), ("user", "三")]),
        ("system\nBe kind.\nuser\na\nassistant\n<think>\n\n</think>\n\n", [("system", "Be kind."), ("user", "a")]),
        ("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n",
         [("system", "Be kind."), ("user", "a")]),
        ("<|user|>\na\n<|assistant|>\nb\n<|user|>\nc\n<|assistant|>\n", [("user", "a"), ("assistant", "b"), ("user", "c")]),
        ("[INST] a [/INST] b [INST] c [/INST]", [("user", "a"), ("assistant", "b"), ("user", "c")]),
        ("什么是问答系统？user experience", [("user", "什么是问答系统？user experience")]),
        ("", [("user", "")]),
    ],
)  # fmt: skip
def test_prompts_are_shown_without_the_marks_of_their_template(prompt, turns):
    assert turns_of(prompt) == turns


@pytest.mark.parametrize("value", [6.4312e-05, -1.29e-4, 1.5e-12, 0.0, 0.0015, -123.456, 2345.6, 1.234e7])
def test_a_value_beside_a_curve_is_short(value):
    assert len(axis(value)) <= 8 and float(axis(value)) == pytest.approx(value, rel=0.05)


DEEP = "[" * 100_000
METRICS, SAMPLES = "step3-models/opt/metrics.jsonl", "step3-models/opt/samples.jsonl"
DONE = "step3-models/opt/sanbu_done.json"


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        (METRICS, '{"step": 1, "train/kl": 0.5}\n{"step": 2, "train/k', "no JSON object (a kill cuts the last one): 1"),
        (METRICS, b'{"step": 1, "train/kl": 0.5}\n{"text": "\xe4\xbd', "no JSON object (a kill cuts the last one): 1"),
        (METRICS, b"\x00\xff\xfe\x89PNG\r\n\x1a\n\x00\x00", "no JSON object (a kill cuts the last one): 3"),
        (METRICS, "[1, 2]\n7\nnull\n" + DEEP, "no JSON object (a kill cuts the last one): 4"),
        (METRICS, "", ""),
        (METRICS, '{"step": 1, "train/kl": NaN, "train/score": [1]}\n{"train/kl": 1}\n', "no finite numbers: 3"),
        (METRICS, '{"step": "x", "train/kl": 1e400}\n{"step": 1' + "0" * 300 + ', "train/kl": 1}\n', "no finite numbers: 3"),
        (METRICS, '{"step": 1' + "0" * 5000 + "}\n", "no JSON object (a kill cuts the last one): 1"),
        (METRICS, '{"step": true, "train/kl": -1' + "0" * 400 + "}\n", "no finite numbers: 2"),
        (METRICS, '{"step": 2, "eval/score": 1e29}\n{"step": 1, "eval/score": -1e29}\n', ""),
        (SAMPLES, '{"step": 2, "part": "eval", "prompt": "a", "answer": "b", "score": null, "reference": 5}\n{"step"', "answer: 1"),
        (SAMPLES, '{"step": [], "prompt": "a", "answer": "b"}\n{"prompt": 1}\n[]\n{"answer": "b"}\n', "an answer: 4"),
        (SAMPLES, '{"step": 2, "part": {}, "prompt": "\\ud800", "answer": "\\udfff", "reference_score": "x"}\n', ""),
        (SAMPLES, b"\xff\x00", "lack a prompt or an answer: 1"),
        (DONE, '{"flags": ', "left out, it is no JSON object"),
        (DONE, "[1]", "left out, it is no JSON object"),
        (DONE, b"\xff\xd8\x00", "left out, it is no JSON object"),
        (DONE, '{"flags": [], "seconds": "long", "peak_memory_gb": {}}', ""),
        (DONE, '{"flags": {"data_path": 5, "actor_model_name_or_path": 7}, "seconds": 1e300}', ""),
        ("step3-models/opt/data.txt", b"\xff\x00<b>", ""),
        ("answers.jsonl", '{"prompt": "a"}\n{"prompt": "a", "after": "b", "gold_after": "x"}\n{"pro', "an answer: 2"),
    ],
)  # fmt: skip
def test_what_a_kill_or_a_disk_damaged_is_left_out_and_counted(root, capsys, file, content, sentence):
    write(root / file, content)
    page = page_of(root)
    told = capsys.readouterr().out.splitlines()
    assert told[-1].startswith("Wrote") and len(told) == 1 + bool(sentence)
    assert not sentence or (sentence in told[0] and file in told[0] and sentence in page)
    for svg in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        assert "nan" not in svg and "inf" not in svg


@pytest.mark.parametrize(
    "text",
    ['{"seed": 1', '{"seed": 1}', "[]", "{}", '{"sft": 1, "reward": 1, "ppo": 1, "seconds": 1}', b"\xff\x00", DEEP,
     json.dumps(SUMMARY | {"preset": "x"}), json.dumps(SUMMARY | {"ppo": SUMMARY["ppo"] | {"kl": "x"}}),
     json.dumps(SUMMARY | {"seconds": {"sft": float("inf")}})],
)  # fmt: skip
def test_a_damaged_summary_is_one_sentence(demo, capsys, text):
    write(demo / "summary.json", text)
    assert main(["--run", str(demo)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "summary.json is no whole summary" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--run", "absent"], "--run absent: no step of a training run in it (no metrics.jsonl)"),
        (["--run", "file"], "--run file: no step of a training run in it"),
        (["--run", "empty"], "--run empty: no step of a training run in it"),
        (["--run", "out", "--output", "empty"], "--output empty cannot be written (Is a directory)"),
        (["--run", "out", "--output", "file/page.html"], "--output file/page.html cannot be written"),
        (["--run", "out", "--picture", "empty"], "no train/score_reward"),
        (["--run", "out/actor-models/opt", "--picture", "x.svg"], "--picture: no run of PPO in out/actor-models/opt"),
        (["--run", "out", "--language", "fr"], "invalid choice: 'fr'"),
        ([], "required: --run"),
    ],
)
def test_wrong_input_is_one_sentence(root, capsys, monkeypatch, words, sentence):
    monkeypatch.chdir(root.parent)
    Path("empty").mkdir()
    Path("file").touch()
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and sentence in error and error.count("\n") == 1


def test_a_curve_has_every_point_and_a_logarithmic_scale_where_it_falls_far():
    (line,) = ElementTree.fromstring(draw_curve({"train": [(1, 4.0), (2, 3.0), (3, 2.0)]})).iter("polyline")
    points = [tuple(map(float, pair.split(","))) for pair in line.get("points").split()]
    assert points[1][0] - points[0][0] == pytest.approx(points[2][0] - points[1][0], abs=0.2)
    assert points[1][1] - points[0][1] == pytest.approx(points[2][1] - points[1][1], abs=0.2)
    assert points[0][1] < points[2][1]  # a falling loss; in SVG y grows downwards
    (line,) = ElementTree.fromstring(draw_curve({"eval": [(0, 1000.0), (1, 10.0), (2, 0.1)]})).iter("polyline")
    heights = [float(pair.split(",")[1]) for pair in line.get("points").split()]
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1], abs=0.2)


def test_a_long_run_does_not_make_a_large_page():
    points = [(step, float(step % 7)) for step in range(100_000)]
    drawn = draw_curve({"train": points})
    (line,) = ElementTree.fromstring(drawn).iter("polyline")
    assert len(drawn) < 20_000 and line.get("points").split()[-1].startswith(f"{300 - 8}.0,"), "the last point is drawn"


def test_the_picture_has_a_curve_of_the_gold_score_and_one_of_kl(demo, capsys):
    """Of a run that logged both; else one sentence names what is missing."""
    picture = demo / "picture.svg"
    assert main(["--run", str(demo), "--picture", str(picture)]) == 2
    assert "no train/score_reward" in capsys.readouterr().err and not picture.exists()
    rows = [{"step": step, "train/score_reward": 0.5 + step / 10, "train/kl": step} for step in (1, 2, 3)]
    write(demo / "ppo" / "metrics.jsonl", rows)
    assert main(["--run", str(demo), "--picture", str(picture)]) == 0
    root = ElementTree.fromstring(picture.read_text())
    polylines = [one for one in root.iter() if one.tag.endswith("polyline")]
    assert [len(line.get("points").split()) for line in polylines] == [3, 3]


@pytest.mark.parametrize("metric, value, text", [("kl", -0.001, "0.00"), ("kl", -0.006, "-0.01"), ("score", 0.0625, "0.062"),
                                                 ("length", -0.0, "0.0"), ("score", 1234.56, "1234.6"), ("kl", None, "")])
def test_a_figure_has_its_decimals_and_a_zero_no_sign(metric, value, text):
    assert shown(metric, value) == text
