"""Whatever stands in a file, a variable or an answer: every loader and parser of ours takes it, or raises UserError."""

import contextlib
import json
import logging
from argparse import Namespace
from functools import partial

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from errors import UserError
from inference.command_line import flags_of
from inference.server.__main__ import build_parser
from models.checkpoint_folder import open_checkpoint
from models.templates import load_template
from scripts.done import read_done
from scripts.kubernetes.check import check_file
from scripts.launch.commands import user_settings
from scripts.launch.hostfile import read_hostfile
from scripts.launch.options import options_of, read_recipe
from scripts.plan.known import find_config
from scripts.report.page import write_report
from scripts.report.runs import find_runs
from tests.tiny import tiny_tokenizer
from training.step3_ppo.scoring import RewardEndpoint, checked_scores
from training.utils.data.named_sets import NAMED_SETS
from training.utils.data.names import OUR_NAMES
from training.utils.data.readers import SUFFIXES, read_rows
from training.utils.data.records import Reading, table_records
from training.utils.data.sources import Table
from training.utils.flags.deepspeed_file import check_against_flags, check_offload, check_precision
from training.utils.flags.parse import parse
from training.utils.flags.recipe import Recipe, load_recipe
from training.utils.flags.steps import STEPS, PPOArguments, SFTArguments
from training.utils.run.heartbeat import time_limit
from training.utils.run.manifest import read_manifest
from training.utils.run.metrics import Metrics, read_lines
from training.utils.run.ranks import adopt_ranks, check_alone

HEALTH = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
# The same examples in every run. To look for more: derandomize=False and a larger number.
junk = settings(deadline=None, max_examples=60, derandomize=True, database=None, suppress_health_check=HEALTH)
TEXT = st.text(max_size=8) | st.sampled_from(["", "auto", "user", "assistant", "1", "-1", "nan", "true", "cpu", "[[", "\ud800"])
NUMBER = st.integers() | st.floats() | st.sampled_from([0, -1, 10**30, 2**63])
PLAIN = st.none() | st.booleans() | NUMBER | TEXT
KNOWN = {
    "row": [*OUR_NAMES, "messages", "conversations", "role", "content", "from", "value", "history", "tools", "label", "images"],
    "model": ["model_type", "hidden_size", "num_attention_heads", "vocab_size", "architectures", "quantization_bit", "dtype"],
    "recipe": ["launch", "sft", "ppo", "platforms", "cpu", "platform", "processes", "env", "output_dir", "columns", "seed"],
    "deepspeed": ["zero_optimization", "stage", "offload_optimizer", "device", "fp16", "enabled", "optimizer", "params", "lr"],
    "run": ["step", "train/loss", "eval/perplexity", "seconds", "flags", "data_path", "prompt", "answer", "part", "preset", "ppo"],
    "manifest": ["kind", "apiVersion", "metadata", "spec", "name", "template", "containers", "resources", "limits", "volumes"],
    "checkpoint": ["step", "marks", "files", "checksums", "checksum", "format", "kind", "stop_token_ids", "scores"],
    "server": ["port", "path", "log_text", "adapter", "temperature"],
}


def trees(kind: str) -> st.SearchStrategy:
    """Values of JSON whose names are often those that the reader looks for."""
    names = st.sampled_from(KNOWN[kind]) | TEXT
    return st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=5), max_leaves=12)


def files(kind: str) -> st.SearchStrategy:
    """Bytes of a file: JSON, which YAML is too; JSON cut somewhere; anything."""
    whole = trees(kind).map(lambda value: json.dumps(value).encode())
    cut = st.tuples(whole, st.integers(0, 60)).map(lambda pair: pair[0][: pair[1]])
    return whole | cut | st.binary(max_size=40)


@contextlib.contextmanager
def only_user_errors():
    """Nothing but UserError; what libraries log stays away."""
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.suppress(UserError):
            yield
    finally:
        logging.disable(logging.NOTSET)


@junk
@given(trees("row"), st.sampled_from([None, *NAMED_SETS]))
def test_rows(row, named):
    for rows in ([row], row if isinstance(row, list) else []):
        located = [(f"line {number}", one) for number, one in enumerate(rows) if isinstance(one, dict)]
        with only_user_errors():
            list(table_records(Table("file", partial(iter, located), ""), named, None, Reading()))


@junk
@given(files("row"), st.sampled_from([f"{suffix}{packed}" for suffix in SUFFIXES for packed in ("", ".gz")]))
def test_data_files(tmp_path, content, suffix):
    file = tmp_path / f"file{suffix}"
    file.write_bytes(content)
    with only_user_errors():
        list(read_rows(file))


@junk
@given(files("recipe"))
def test_recipes(tmp_path, content):
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content)
    for read in (load_recipe, Recipe.read, read_recipe, partial(flags_of, parser=build_parser())):
        with only_user_errors():
            read(str(file))
    for step in STEPS:
        with only_user_errors():
            parse(step, ["--config", str(file)])
    with only_user_errors():
        given = Namespace(platform=None, node_rank=None)
        options_of(given, read_recipe(file).get("launch", {}), str(file), {})


@junk
@given(files("deepspeed"), st.sampled_from([SFTArguments, PPOArguments]))
def test_deepspeed_files(tmp_path, content, step):
    file = tmp_path / "deepspeed.json"
    file.write_bytes(content)
    models = ("actor_model_name_or_path", "critic_model_name_or_path") if step is PPOArguments else ("model_name_or_path",)
    words = [word for model in models for word in (f"--{model}", "m")]
    args = parse(step, [*words, "--output_dir", "o"])
    args.deepspeed_config = str(file)
    stages = dict.fromkeys(["actor_", "critic_"] if step is PPOArguments else [""], 0)
    with only_user_errors():
        check_against_flags(args, stages)
    with only_user_errors():
        check_offload(args)
    with only_user_errors():
        check_precision(str(file), "bf16")


@junk
@given(files("model"), files("model"))
@example(b'{"model_type": []}', b"")
def test_model_folders(tmp_path, config, adapter):
    folder = tmp_path / "model"
    folder.mkdir(exist_ok=True)
    for name, content in (("config.json", config), ("adapter_config.json", adapter), ("model.safetensors", config)):
        (folder / name).write_bytes(content)
    for look in (lambda: open_checkpoint(folder).weights, lambda: open_checkpoint(folder).gives_scores):
        with only_user_errors():
            look()
    with only_user_errors():
        find_config(str(folder))
    (folder / "config.json").unlink()
    (folder / "model.safetensors").unlink()
    with only_user_errors():
        open_checkpoint(folder)


TOKENIZER = tiny_tokenizer("llama")


@junk
@given(files("checkpoint"))
def test_templates_and_manifests(tmp_path, content):
    for name, read in {
        "sanbu_template.json": lambda: load_template(tmp_path, TOKENIZER),
        "checkpoint.json": lambda: read_manifest(tmp_path),
        "sanbu_done.json": lambda: read_done(tmp_path),
    }.items():
        (tmp_path / name).write_bytes(content)
        with only_user_errors():
            read()


@junk
@given(st.lists(files("run"), min_size=4, max_size=4))
def test_reports(tmp_path, contents):
    for name, content in zip(("metrics.jsonl", "sanbu_done.json", "samples.jsonl", "summary.json"), contents, strict=True):
        (tmp_path / name).write_bytes(content)
    with only_user_errors():
        write_report(tmp_path, find_runs(tmp_path), tmp_path / "report.html", "en")
    read_lines(tmp_path / "metrics.jsonl")
    Metrics(tmp_path, enabled=True).rewind(3)


@junk
@given(files("manifest"))
def test_manifests_of_kubernetes(tmp_path, content):
    pytest.importorskip("kubernetes_validate")
    file = tmp_path / "job.yaml"
    file.write_bytes(content)
    with only_user_errors():
        check_file(file)


@junk
@given(st.text(max_size=40) | st.binary(max_size=40))
def test_lines_of_hosts_and_variables(tmp_path, content):
    (tmp_path / "hosts").write_bytes(content.encode(errors="replace") if isinstance(content, str) else content)
    (tmp_path / ".deepspeed_env").write_bytes((tmp_path / "hosts").read_bytes())
    for read in (lambda: read_hostfile(tmp_path / "hosts"), lambda: user_settings({"HOME": str(tmp_path)})):
        with only_user_errors():
            read()


NAMES = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_NTASKS", "SANBU_NODE_TIMEOUT"]


@junk
@given(st.dictionaries(st.sampled_from(NAMES), TEXT | st.integers(-2, 5).map(str)))
def test_variables_of_launchers(environ):
    for read in (adopt_ranks, check_alone, time_limit):
        with only_user_errors():
            read(dict(environ))


@junk
@given(st.lists(st.sampled_from(sorted(f"--{name}" for name in vars(SFTArguments(output_dir="o", model_name_or_path="m")))) | TEXT))
def test_command_lines(words):
    for step in STEPS:
        with only_user_errors(), contextlib.suppress(SystemExit):
            parse(step, words)


@junk
@given(files("checkpoint"))
def test_answers_of_a_reward_endpoint(content):
    with only_user_errors():
        checked_scores(RewardEndpoint("http://x", 1.0, 0)._scores(content), ["p"], ["a"], "x")
