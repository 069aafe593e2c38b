"""Many runs of the steps in one set of processes: what starting Python costs is paid once.

``run_several`` starts ``python -m tests.several FILE`` (under the deepspeed launcher for two processes), which runs one
step's main() after the other with the flags in FILE. Only the process group is kept from one run to the next.
"""

import gc
import importlib
import json
import sys
from pathlib import Path

from steps import STEPS
from tests.launching import succeed

Runs = list[tuple[str, list[str]]]


def run_several(runs: Runs, folder: Path, processes: int = 2) -> None:
    """Run (module, flags) one after the other; all must end well."""
    file = folder / f"runs-{processes}.json"
    file.write_text(json.dumps(runs))
    succeed("tests.several", [str(file)], processes)


def main(file: str) -> None:
    """What each process does."""
    import torch.distributed as dist

    from training.utils.flags.parse import parse

    leave, dist.destroy_process_group = dist.destroy_process_group, lambda *_: None
    for module, flags in json.loads(Path(file).read_text()):
        if "fp16" in flags:
            allow_half()
        (step,) = (step for step in STEPS if step.module == module)
        importlib.import_module(module).main(parse(step.arguments_class, flags))
        gc.collect()
    leave()


def allow_half() -> None:
    """Let a CPU train in float16: nobody does and DeepSpeed refuses it; the arithmetic works."""
    from deepspeed.accelerator import get_accelerator

    from models import device

    accelerator = type(get_accelerator())
    accelerator.is_fp16_supported = lambda self: True
    accelerator.supported_dtypes = lambda self: list(device.DTYPES.values())
    device.chip_dtypes = lambda chip: tuple(device.DTYPES)


if __name__ == "__main__":
    main(next(argument for argument in sys.argv[1:] if argument.endswith(".json")))
