"""Send the warnings of the libraries to the log of a run, or nowhere. Errors stay on the terminal."""

import logging
import warnings
from pathlib import Path
from typing import Any


def quiet_libraries(log: Path | None = None) -> None:
    """Keep the libraries off the terminal, but for errors: a program's own lines must not drown. What they warn of, and which
    names will change, goes to the log, if there is one; the file is made with the first line.
    """
    import transformers

    # DeepSpeed calls older names of torch; peft and Sanbu call those of older transformers.
    warnings.filterwarnings("default" if log else "ignore", category=FutureWarning)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    terminal = logging.StreamHandler()
    terminal.setLevel(logging.ERROR)
    file = logging.FileHandler(log, encoding="utf-8", delay=True) if log else logging.NullHandler()
    for name in ("transformers", "DeepSpeed", "deepspeed", "peft", "datasets"):
        library = logging.getLogger(name)
        library.handlers, library.propagate = [terminal, file], False
        library.setLevel(logging.WARNING if log else logging.ERROR)
    if log:
        show_others = warnings.showwarning

        def show(message: Any, category: type[Warning], filename: str, lineno: int, *more: Any) -> None:
            if issubclass(category, FutureWarning):
                logging.getLogger("transformers").warning("%s:%d: %s: %s", filename, lineno, category.__name__, message)
            else:
                show_others(message, category, filename, lineno, *more)

        warnings.showwarning = show
