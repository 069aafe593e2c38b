"""Commands of earlier versions, ``python -m NAME``: each has a door of a few lines under its former name that asks here."""

import runpy
import sys

# former name -> the module that does the same today
SUCCESSORS = {
    "scripts.flags_table": "scripts.docs.flags_table",
    "scripts.k8s": "scripts.kubernetes.__main__",
    "scripts.make_demo_data": "scripts.demo.make_data",
    "scripts.memory_table": "scripts.docs.memory_table",
    "scripts.pod": "scripts.kubernetes.pod",
    "scripts.recipes_table": "scripts.docs.recipes_table",
    "training.evaluate.bleu_rouge": "scripts.evaluate.__main__",
    "training.step1_sft.evaluate": "scripts.evaluate.__main__",
    "training.step1_sft.prompt_eval": "training.evaluate.side_by_side",
    "training.step2_reward.rw_eval": "training.evaluate.reward_scores",
}
# former name -> what to use instead
GONE = {
    "benchmarks.chatglm": "it runs at commit 860469f, and python -m benchmarks.gpu measures ChatGLM2-6B with LoRA on a card.",
    "benchmarks.data_memory": "its results stand in benchmarks/RESULTS.md under 'Memory and time of preparing 100,000 pairs'; it "
    "runs at commit be35d39, and python -m scripts.preprocess_dataset prepares data of your own.",
    "benchmarks.ppo_learning": "its results stand in benchmarks/RESULTS.md under 'How well and how fast PPO learns, beside TRL'; "
    "it runs at commit be35d39, and python -m benchmarks.beside_trl compares the speed of every step with TRL's today.",
    "benchmarks.ppo_vocabulary": "its results stand in benchmarks/RESULTS.md under 'Larger vocabularies'; it runs at commit "
    "44ce0bc, and python -m benchmarks.beside_trl --vocabulary 32000 compares with TRL today.",
    "benchmarks.shared_trunk": "its results stand in benchmarks/RESULTS.md under 'Memory of the four models of PPO'; it runs at "
    "commit 44ce0bc, and python -m scripts.plan MODEL --step 3 --memory_mode shared --actor_lora_dim 16 plans for a model.",
    "benchmarks.three_steps": "it runs at commit 860469f, and python -m benchmarks.gpu measures the steps with OPT-1.3B on a card.",
}


def run_successor(name: str) -> None:
    """Run the module that took the place of ``name``. Where none did, tell what to use instead and exit with code 2."""
    if name in GONE:
        print(f"error: {name} is gone: {GONE[name]}", file=sys.stderr)
        raise SystemExit(2)
    runpy.run_module(SUCCESSORS[name], run_name="__main__")
