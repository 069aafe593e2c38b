"""The words of the page, in English and Chinese."""

from __future__ import annotations

from typing import Any

# section -> title of a step; the English ones are those of steps.py.
STEP_TITLES = {"sft": "监督微调", "reward": "奖励模型", "ppo": "PPO", "dpo": "DPO"}

# name in metrics.jsonl (after train/ or eval/) -> title, in the order of the page; TensorBoard shows the others.
CURVES = {
    "loss": ("Loss, nats", "损失（nat）"),
    "perplexity": ("Held-out perplexity", "留出集困惑度"),
    "accuracy": ("Accuracy, share of pairs", "准确率（偏好对的比例）"),
    "margin": ("Implicit reward: chosen - rejected, beta x nats", "隐式奖励：chosen - rejected（beta x nat）"),
    "score": ("Score of answers", "回答的得分"),
    "score_reward": ("Gold score, 0 to 1", "金标准得分，0 到 1"),  # by scripts/demo/score.py:reward
    "score_vader": ("Gold score by VADER", "VADER 给出的得分"),
    "win_rate": ("Win rate against the SFT model", "对 SFT 模型的胜率"),
    "kl": ("KL to the reference, nats an answer", "与参考模型的 KL（每个回答，nat）"),
    "length": ("Length of answers, tokens", "回答的长度（词元）"),
    "eos_rate": ("Share of answers that ended by themselves", "自行结束的回答比例"),
}

# The rows of the results: (section, metric) -> title. on: one of ON. "gold" is the demo's own measure.
RESULTS = {
    ("sft", "perplexity"): ("SFT: perplexity of {on} answers", "SFT：{on}回答的困惑度"),
    ("reward", "accuracy"): ("Reward model: accuracy on {on} pairs", "奖励模型：{on}偏好对的准确率"),
    ("dpo", "accuracy"): ("DPO: accuracy on {on} pairs", "DPO：{on}偏好对的准确率"),
    ("dpo", "margin"): ("DPO: implicit reward, chosen - rejected", "DPO：隐式奖励，chosen - rejected"),
    ("ppo", "gold_pretrained"): ("Pretrained model: {gold}", "预训练模型：{gold}"),
    ("ppo", "gold"): ("PPO: {gold}", "PPO：{gold}"),
    ("ppo", "score"): ("PPO: score of {on} answers", "PPO：{on}提示上回答的得分"),
    ("ppo", "win_rate"): ("PPO: answers that score higher than the SFT model's", "PPO：得分高于 SFT 模型的回答"),
    ("ppo", "length"): ("PPO: length of answers, tokens", "PPO：回答的长度（词元）"),
    ("ppo", "eos_rate"): ("PPO: answers that ended by themselves", "PPO：自行结束的回答"),
    ("ppo", "kl"): ("PPO: KL to the SFT model, nats an answer", "PPO：与 SFT 模型的 KL（每个回答，nat）"),
}

# What a figure was measured on, as eval/measured_on of metrics.jsonl says it -> the word for it.
ON = {"held-out": ("held-out", "留出"), "training": ("training", "训练")}

WORDS = {
    "title": ("Training report", "训练报告"),
    "step_number": ("Step {number}: {title}", "第 {number} 步：{title}"),
    "results": ("Results", "结果"),
    "results_note": ("Measured on held-out data.", "在留出的数据上测得。"),
    "nothing_held_out": (
        "{step}: nothing was held out (--eval_fraction), its figures are those of training data and say nothing about new data.",
        "{step}：没有留出数据（--eval_fraction），其数字来自训练数据，不能说明在新数据上的表现。",
    ),
    "on_training": ("{title} (training)", "{title}（训练）"),
    "before": ("before", "之前"),
    "after": ("after", "之后"),
    "target": ("target", "目标"),
    "steps": ("Steps", "步骤"),
    "step": ("step", "步骤"),
    "state": ("state", "状态"),
    "done": ("done", "完成"),
    "cut_short": ("not done: cut short, or still running", "未完成：中断了，或仍在运行"),
    "absent": ("not there", "没有"),
    "model": ("started from", "起点模型"),
    "data": ("data", "数据"),
    "length": ("length", "步数"),
    "optimizer_steps": ("{} optimizer steps", "{} 个优化器步"),
    "rollouts": ("{} rollouts", "{} 轮采样"),
    "time": ("time", "用时"),
    "memory": ("peak memory", "内存峰值"),
    "folder": ("folder", "文件夹"),
    "held_out_answers": ("Held-out prompts: answers before and after PPO", "留出的提示：PPO 前后的回答"),
    "held_out_note": (
        "{shown} of {count} prompts that PPO did not train on, after rollout {rollout}. Both models sample with the same "
        "random numbers. Below each answer its score: green where PPO raised it, red where PPO lowered it.",
        "PPO 没有训练过的 {count} 个提示中的 {shown} 个，第 {rollout} 轮之后。两个模型采样用同样的随机数。"
        "回答下面是得分：绿色表示 PPO 提高了，红色表示降低了。",
    ),
    "training_answers": ("Training prompts: answers of rollout {rollout}", "训练用的提示：第 {rollout} 轮的回答"),
    "training_note": (
        "PPO learned from its answers here. Both models sample with the same random numbers.",
        "PPO 从这里它自己的回答中学习。两个模型采样用同样的随机数。",
    ),
    "prompt": ("prompt", "提示"),
    "sft_answer": ("SFT model", "SFT 模型"),
    "ppo_answer": ("after PPO", "PPO 之后"),
    "score": ("score {}", "得分 {}"),
    "not_ended": ("did not end", "没有自行结束"),
    "system": ("System", "系统"),
    "user": ("User", "用户"),
    "assistant": ("Assistant", "助手"),
    "train": ("training", "训练"),
    "eval": ("held out", "留出"),
    "eval_on_training": ("evaluated on training data", "在训练数据上评估"),
    "data_seen": ("Data as the model sees it", "模型看到的数据"),
    "cut_lines": (
        "{file}: lines left out that are no JSON object (a kill cuts the last one): {count}",
        "{file}：略去的不是 JSON 对象的行（进程被杀时最后一行会被截断）：{count}",
    ),
    "odd_values": (
        "{file}: values left out that are no finite numbers: {count}",
        "{file}：略去的不是有限数的值：{count}",
    ),
    "odd_answers": (
        "{file}: lines left out that lack a prompt or an answer: {count}",
        "{file}：略去的缺少提示或回答的行：{count}",
    ),
    "odd_done": ("{file}: left out, it is no JSON object", "{file}：不是 JSON 对象，已略去"),
    "absent_step": ("{step} is not there", "没有{step}"),
    "seed": ("Measured on held-out prompts, seed {seed}.", "在留出的提示上测得，种子 {seed}。"),
    "stage_time": ("Time: {name}", "用时：{name}"),
    "cpu_time": ("Processor time: total", "处理器时间：合计"),
    "largest_memory": ("Memory: largest process, GB", "内存：最大的进程（GB）"),
}


def word(key: str, language: str, *values: Any, **named: Any) -> str:
    """Return a word or sentence of the page with what it says filled in. language: "en" or "zh"."""
    return choose(WORDS[key], language).format(*values, **named)


def choose(pair: tuple[str, str], language: str) -> str:
    """Return the English or the Chinese of two texts."""
    return pair[language == "zh"]
