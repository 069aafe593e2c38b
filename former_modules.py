"""Commands of earlier versions, ``python -m NAME``: each has a door of a few lines under its former name that asks here."""

import runpy

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


def run_successor(name: str) -> None:
    """Run the module that took the place of ``name``."""
    runpy.run_module(SUCCESSORS[name], run_name="__main__")
