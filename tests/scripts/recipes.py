"""Share the list of recipes between the tests of recipes and launchers."""

from pathlib import Path

from scripts.docs.recipes_table import recipe_files
from scripts.launch.platforms import load_platforms

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPES = [path.relative_to(REPOSITORY) for name in load_platforms() for path in recipe_files(name)]
MODELS = {  # name of the recipe -> where the model lies on the hub
    "opt-1.3b": "facebook/opt-1.3b",
    "opt-6.7b": "facebook/opt-6.7b",
    "opt-13b": "facebook/opt-13b",
    "opt-66b": "facebook/opt-66b",
    "bloom-1b1": "bigscience/bloom-1b1",
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B",
    "chatglm-6b": "THUDM/chatglm-6b",
    "chatglm2-6b": "THUDM/chatglm2-6b",
    "chatglm3-6b": "THUDM/chatglm3-6b",
}


def name_of(path: Path) -> str:
    """Return a recipe's name in test ids: dcu_z100l/chatglm-6b."""
    return f"{path.parent.name}/{path.stem}"
