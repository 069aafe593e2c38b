"""What --deepspeed_config brings: read, freed of "auto", and compared with the flags. Imports no torch, but check_keys."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Collection, Iterator
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import hjson

from errors import UserError, nearest, refuse
from json_text import parse_json

logger = logging.getLogger("sanbu")

AUTO = "auto"  # of transformers' files: the trainer fills it in, as the flags do here
PRECISION = {"fp16": "fp16", "bf16": "bf16", "bfloat16": "bf16"}  # section -> --dtype
# Settings of the flags, by their place in the file; {role} is "", or actor_ and critic_ in step 3. A list holds the one value
# that the steps have. Such keys are compared and not passed on: a step makes its optimizer and its schedule itself.
OWNED = {
    "optimizer.type": "optimizer",
    "optimizer.params.lr": "{role}learning_rate",
    "optimizer.params.betas": "adam_beta1 adam_beta2",
    "optimizer.params.eps": "adam_epsilon",
    "optimizer.params.weight_decay": "{role}weight_decay",
    "optimizer.params.adam_w_mode": [True],
    "optimizer.params.bias_correction": [True],
    "optimizer.params.amsgrad": [False],
    "scheduler.type": "lr_scheduler_type",
    "scheduler.params.warmup_max_lr": "{role}learning_rate",
    "scheduler.params.warmup_min_lr": [0],
    "scheduler.params.warmup_num_steps": "num_warmup_steps",
    "scheduler.params.warmup_type": ["linear"],
    "scheduler.params.last_batch_iteration": [-1],
    "scheduler.params.total_num_steps": "max_steps",
    "train_batch_size": "global_batch_size",
    "train_micro_batch_size_per_gpu": "{micro}",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
}
FREE = ("optimizer.params.torch_adam", "optimizer.params.fused", "optimizer.legacy_fusion")  # how AdamW is computed
TYPES = {  # in the file -> in the flags; DeepSpeed's Adam decays weights as AdamW does
    "adam": ("auto", "adamw", "fused_adam", "cpu_adam"),
    "adamw": ("auto", "adamw", "fused_adam", "cpu_adam"),
    "warmuplr": ("constant_with_warmup",),
    "warmupdecaylr": ("linear",),
    "warmupcosinelr": ("cosine",),
}
PARALLEL = ("tensor_parallel", "expert_parallel", "sequence_parallel_size", "hybrid_engine")  # they change the model itself
WITHOUT_EFFECT = {  # in the steps, which make their batches and their graph themselves
    "activation_checkpointing": "; --gradient_checkpointing recomputes activations",
    **dict.fromkeys(("autotuning", "compile", "data_efficiency", "dataloader_drop_last", "pipeline"), ""),
}
POSITIVE = ("steps_per_print", "gradient_predivide_factor")  # DeepSpeed divides by them


def read_deepspeed_config(path: str | None) -> dict[str, Any]:
    """Return what --deepspeed_config sets for DeepSpeed, {} for None: neither "auto" nor keys of the flags. Raises UserError
    for a file that cannot be read.
    """
    owned = {place.split(".")[0] for place in OWNED}
    return {key: value for key, value in read_file(path).items() if key not in owned}


def read_file(path: str | None) -> dict[str, Any]:
    """Return the content of --deepspeed_config without what is "auto" and without comments, {} for None. Raises UserError for
    a file that cannot be read, that has another form, a key twice, or a number that is not finite.
    """
    if not path:
        return {}
    try:
        config = loads(Path(path).read_text(encoding="utf-8"), path)
    except OSError as error:
        raise UserError(f"--deepspeed_config {path}: {error.strerror}; name an existing JSON file.") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}).") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--deepspeed_config {path} is no text in UTF-8; name a JSON file of DeepSpeed keys.") from error
    except ValueError as error:  # nested too deep, a number of 6,000 digits
        raise UserError(f"{path}: not valid JSON ({error}).") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected a JSON object of DeepSpeed keys, found {json.dumps(config)[:40]}.")
    config = without_auto(config)
    for key in ("zero_optimization", "optimizer", "scheduler", *PRECISION):
        if not isinstance(config.get(key, {}), dict):
            raise UserError(f'{path}: "{key}" must be an object of DeepSpeed keys, found {json.dumps(config[key])[:40]}.')
    for where, value in places(config):
        numbers = value if isinstance(value, list) else [value]
        infinite = any(isinstance(one, float) and not math.isfinite(one) for one in numbers)
        refuse(infinite, f'{path}: "{where}" is {json.dumps(value)}; give finite numbers.')
    return config


def loads(text: str, path: str) -> Any:
    """Return the content of a JSON text, which may have the comments and last commas that DeepSpeed's own reader takes.

    Raises JSONDecodeError, and UserError for a key that stands twice.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        twice = next((name for name in names if names.count(name) > 1), None)
        refuse(twice is not None, f'{path}: "{twice}" stands twice in one section; keep one of the two.')
        return dict(pairs)

    try:
        return parse_json(text, object_pairs_hook=once)
    except json.JSONDecodeError:
        with suppress(hjson.HjsonDecodeError, RecursionError, ValueError):
            return hjson.loads(text, object_pairs_hook=once)
        raise


def without_auto(section: dict[str, Any]) -> dict[str, Any]:
    """Return a section without the keys that are "auto", those of comments ("_comment"), and sections that have nothing else."""
    named = {key: value for key, value in section.items() if not key.startswith(("_", "//", "#"))}
    kept = {key: without_auto(value) if isinstance(value, dict) else value for key, value in named.items()}
    return {key: value for key, value in kept.items() if value not in (AUTO, {})}


def places(section: dict[str, Any], inside: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each value of a file with the names that lead to it, as in optimizer.params.lr."""
    for key, value in section.items():
        if isinstance(value, dict):
            yield from places(value, f"{inside}{key}.")
        else:
            yield f"{inside}{key}", value


def check_against_flags(args: Any, stages: dict[str, int | str]) -> None:
    """Raise UserError, one for all of them, where the file sets what the flags decide to other values than theirs.

    stages: what --zero_stage says, by what stands before the names of each model's flags ("", or "actor_" and "critic_"). It
    also rules how weights are loaded and saved.
    """
    path, config = args.deepspeed_config, read_file(args.deepspeed_config)
    for key in PARALLEL:
        refuse(key in config, f'{path}: "{key}" changes the model, and the steps train it whole or by ZeRO; remove it.')
    for key, instead in WITHOUT_EFFECT.items():
        used = config.get(key)
        if used and not (isinstance(used, dict) and used.get("enabled") is False):
            logger.warning('%s: "%s" has no effect in the steps%s.', path, key, instead)
    stage = config.get("zero_optimization", {}).get("stage")
    others = [prefix for prefix, flag in stages.items() if stage is not None and stage != flag]
    found = [f'"stage" is {json.dumps(stage)}, and the flags say --{prefix}zero_stage {stages[prefix]}' for prefix in others]
    for where, value in places({key: config[key] for key in config if any(place.split(".")[0] == key for place in OWNED)}):
        found += differences(args, where, value, list(stages))
    one = len(found) == 1
    way_out = f"remove the {'key' if one else 'keys'}, or give the {'flag the value' if one else 'flags the values'} you want"
    refuse(found, f"{path}: {'; '.join(found)}; {way_out}.")


def differences(args: Any, where: str, value: Any, prefixes: list[str]) -> list[str]:
    """Return in words where a value of the file differs from the flags. Raises UserError for what no flag can say."""
    path, given = args.deepspeed_config, f'"{where}" is {json.dumps(value)}'
    refuse(where not in (*OWNED, *FREE), f'{path}: "{where}" has no flag here; remove it.')
    flag, found = OWNED.get(where, [value]), []
    if isinstance(flag, list):
        refuse(value not in flag, f"{path}: {given}, and the steps have {json.dumps(flag[0])} alone; remove it.")
        return []
    micro = "per_device_training_batch_size" if args.section == "ppo" else "per_device_train_batch_size"
    for role in prefixes if "{role}" in flag else prefixes[:1]:
        names = flag.format(role=role, micro=micro).split()
        asked = [getattr(args, name) for name in names]
        unknown = where.endswith(".type") and str(value).lower() not in TYPES
        refuse(unknown, f"{path}: {given}, which --{names[0]} does not have; remove the section.")
        said = " ".join(f"--{name} {number}" for name, number in zip(names, asked, strict=True))
        found += [f"{given}, and the flags say {said}"] * (not equal(where, value, asked))
    return found


def equal(where: str, value: Any, asked: list[Any]) -> bool:
    """Return whether a value of the file means the same as the flags."""
    if where.endswith(".type"):
        return asked[0] in TYPES.get(str(value).lower(), ())
    return (value if isinstance(value, list) else [value]) == asked


def check_offload(args: Any) -> None:
    """Raise UserError if the file moves optimizer states to the host and the flags do not, or the other way round.

    The flags choose the optimizer: one for the card would be given states on the host.
    """
    zero = read_file(args.deepspeed_config).get("zero_optimization", {})
    section = zero.get("offload_optimizer")
    device = section.get("device", "none") if isinstance(section, dict) else section
    device = "cpu" if zero.get("cpu_offload") is True else device
    asked = args.offload or args.offload_optimizer
    refuse(
        device is not None and (device != "none") != asked,
        f'{args.deepspeed_config}: "zero_optimization" offloads the optimizer to {device}, and the flags '
        f"{'move it to the host' if asked else 'keep it on the card'}; {'remove the key' if asked else 'add --offload_optimizer'}"
        f"{'' if asked else ', or remove the key'}.",
    )


def check_precision(path: str | None, dtype: str) -> None:
    """Raise UserError if the file switches on another number format than that of the run, or switches that off.

    dtype: fp32, fp16 or bf16.
    """
    config = read_deepspeed_config(path)
    for section, name in PRECISION.items():
        enabled = config.get(section, {}).get("enabled")
        given = f'{path}: "{section}.enabled" is {json.dumps(enabled)}'
        refuse(enabled is not None and not isinstance(enabled, bool), f"{given}; give true or false.")
        if enabled is not None and enabled != (name == dtype):
            said = "on" if enabled else "off"
            raise UserError(
                f'{path}: the section "{section}" is switched {said}, and the run computes in {dtype}; remove "enabled" and '
                "choose by --dtype."
            )


@cache
def words_of_deepspeed() -> frozenset[str]:
    """Return the strings and the names of fields in the files of the installed DeepSpeed that read a configuration."""
    package = Path(find_spec("deepspeed").origin).parent
    files = [file for file in package.rglob("*.py") if "config" in file.name or "constants" in file.name]
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    found = re.findall(r"""["'](\w+)["']|^    (\w+) *:""", text, re.MULTILINE)
    return frozenset(string or name for string, name in found)


def check_words(path: str | None) -> None:
    """Raise UserError for a key of --deepspeed_config that stands nowhere in DeepSpeed. Imports nothing: check_keys, which
    takes seconds, says what is right in another section alone. Names further inside may be the user's own.
    """
    for where, _ in places(read_deepspeed_config(path)):
        names = where.split(".")
        for place, name in enumerate(names[: 3 if names[0] == "zero_optimization" else 2], start=1):
            if name not in words_of_deepspeed():
                refuse_unknown(path, ".".join(names[:place]), words_of_deepspeed())


class Asked(dict):
    """A section that remembers the keys that were asked for, with the defaults that came with the question."""

    def __init__(self, section: dict[str, Any]) -> None:
        super().__init__({key: Asked(value) if isinstance(value, dict) else value for key, value in section.items()})
        self.asked: dict[str, Any] = {}

    def get(self, key: str, default: Any = None) -> Any:
        """Answer as dict.get."""
        self.asked[key] = default
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.asked.setdefault(key, None)
        return super().__getitem__(key)

    def __contains__(self, key: Any) -> bool:
        self.asked.setdefault(key, None)
        return super().__contains__(key)

    def __iter__(self) -> Iterator[str]:
        return super().__iter__()  # without a method of its own ``**section`` would copy the values and ask for none

    def keys(self) -> Any:
        """Return the section itself: ``in`` over its keys is a question too."""
        return self


def check_keys(args: Any) -> None:
    """Raise UserError for a key of --deepspeed_config that the installed DeepSpeed does not know, or a value that it cannot use.

    Its pydantic models check some sections. It passes over unknown keys everywhere else: known are those that it asks for.
    Imports DeepSpeed: call it after models.device.detect_platform, which chooses DeepSpeed's accelerator.
    """
    path = args.deepspeed_config
    stages = {value for name, value in vars(args).items() if name.endswith("zero_stage") and value != AUTO}
    for key, value in read_deepspeed_config(path).items():
        for stage in stages or {1}:
            config = read_by_deepspeed(path, key, value, stage)
        check_value(path, key, config, key)
        section = config[key]
        for inside in section if isinstance(section, Asked) and section.asked else ():
            check_value(path, f"{key}.{inside}", section, inside)


def read_by_deepspeed(path: str, key: str, value: Any, stage: int) -> Asked:
    """Return a config that holds one key of the file, after DeepSpeed has read it. Raises UserError with DeepSpeed's reason."""
    from deepspeed.runtime.config import DeepSpeedConfig
    from pydantic import ValidationError

    if key in PRECISION and isinstance(value, dict):
        value = value | {"enabled": True}  # DeepSpeed before 0.17 asks for the rest only then
    config = Asked({"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}, key: value})
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # the engine says the same when it is built
    try:
        DeepSpeedConfig(config)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, dict.fromkeys((key, *first["loc"]))))  # the monitors' own path begins with the key
        if first["type"] == "extra_forbidden":
            refuse_unknown(path, where, model_fields(error.title if len(first["loc"]) == 1 else ""))
        raise UserError(f'{path}: "{where}" is {json.dumps(first["input"])[:60]}; {as_clause(first["msg"].lower())}.') from error
    except Exception as error:  # its own errors, and what becomes of a value where it expects a section
        check_value(path, key, config, key)
        form = isinstance(error, (AttributeError, TypeError)) and not isinstance(value, dict)
        refuse(form, f'{path}: "{key}" must be an object of DeepSpeed keys, found {json.dumps(value)[:40]}.')
        raise UserError(f'{path}: "{key}" does not suit the installed DeepSpeed: {as_clause(str(error))}.') from error
    finally:
        logging.disable(disabled)
    return config


def as_clause(message: str) -> str:
    """Return a library's message as the end of a sentence."""
    return " ".join(message.split()).rstrip(".")


def model_fields(title: str) -> set[str]:
    """Return the names of the fields in DeepSpeed's pydantic model of this name, or in all of them."""
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    models = [model for model in DeepSpeedConfigModel.__subclasses__() if title in ("", model.__name__)]
    fields = [item for model in models for item in model.model_fields.items()]
    return {name for name, _ in fields} | {field.alias for _, field in fields if field.alias}


def refuse_unknown(path: str, where: str, known: Collection[str]) -> NoReturn:
    """Raise UserError for a key that DeepSpeed does not know."""
    key = where.rpartition(".")[2]
    near = None if key in known else nearest(key, known)  # it may be a key of another section
    hint = f'did you mean "{near}"?' if near else "remove it."
    raise UserError(f'{path}: "{where}" is no key of the installed DeepSpeed; {hint}')


def check_value(path: str, where: str, section: Asked, key: str) -> None:
    """Raise UserError if DeepSpeed did not ask for a key, or asked with a default of another type."""
    if key not in section.asked:
        refuse_unknown(path, where, section.asked)
    default, value = section.asked[key], section[key]
    found = f'{path}: "{where}" is {json.dumps(value)[:60]}'
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if key in POSITIVE:
        refuse(not number or value <= 0, f"{found}; give a number above 0.")
    elif isinstance(default, bool):
        refuse(not isinstance(value, bool), f"{found}; give true or false.")
    elif isinstance(default, (int, float)):
        refuse(not number or value < min(default, 0), f"{found}; give a number from {min(default, 0):g} up.")
    elif isinstance(default, str):
        refuse(not isinstance(value, str), f"{found}; give a text.")
