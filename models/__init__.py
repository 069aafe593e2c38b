"""Networks, templates, adapters and devices: what travels with a checkpoint, nothing about training.

Importing this package tells transformers about ChatGLM. Where an Auto class is not imported yet it happens when it is:
importing it here would cost every command 5 s of CPU, also those that read no checkpoint.
"""

import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# Each module by itself, with nothing else of transformers imported on the way: they import each other.
AUTO_CLASSES = {
    "transformers.models.auto.configuration_auto": "register_config",
    "transformers.models.auto.tokenization_auto": "register_tokenizer",
}


def _register(module: ModuleType) -> None:
    from models.chatglm import registration

    getattr(registration, AUTO_CLASSES[module.__name__])(module)


class _Registration(MetaPathFinder):
    """Registers behind the import of a module with an Auto class."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """Return the module's own spec, whose loader registers when it is done; None for every other module."""
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register(module)

        spec.loader.exec_module = execute_and_register
        return spec


for _name in AUTO_CLASSES:
    if _name in sys.modules:
        _register(sys.modules[_name])
    else:
        sys.meta_path.insert(0, _Registration(_name))
