"""Kubernetes manifests from a recipe: claim, downloads, training, TensorBoard, a dialogue; and checks of manifests.

    python -m scripts.k8s render --kind pytorchjob --recipe configs/multi_node/llama-2-7b.yaml --step all --out DIR
    python -m scripts.k8s render --kind deepspeedjob --recipe configs/dcu_z100l/chatglm-6b.yaml --step 2 --image NAME:TAG
    python -m scripts.k8s check DIR FILE…       # what a cluster would refuse, or take and not mean
    python -m scripts.k8s set [--check]         # write, or compare, the committed set under configs/kubernetes

Kinds: deepspeedjob (TensorStack), pytorchjob and mpijob (Kubeflow), trainjob (Kubeflow Trainer 2). docs/en/kubernetes.md
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errors import UserError, told

if TYPE_CHECKING:
    from scripts.kubernetes.render import Document, Job

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = ROOT / "configs" / "kubernetes"
# What is committed: the nine training jobs and the dialogue of the first three sets have predecessors elsewhere
# (docs/en/kubernetes.md); the rest shows every other kind and platform once.
SETS = (
    ("deepspeedjob", "single_gpu/opt-1.3b"),
    ("deepspeedjob", "single_node/opt-13b"),
    ("deepspeedjob", "multi_node/opt-66b"),
    ("deepspeedjob", "dcu_z100l/chatglm-6b"),
    ("pytorchjob", "cpu/opt-1.3b"),
    ("pytorchjob", "multi_node/llama-2-7b"),
    ("pytorchjob", "ascend_910/chatglm2-6b"),
    ("trainjob", "multi_node/opt-13b"),
    ("mpijob", "multi_node/chatglm3-6b"),
)


def build_parser() -> argparse.ArgumentParser:
    """render, check and set with their flags."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.k8s", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="render|check|set")
    one = commands.add_parser("render", help="manifests from a recipe", allow_abbrev=False)
    add = one.add_argument
    add("--kind", required=True, help="deepspeedjob, pytorchjob, trainjob or mpijob")
    add("--recipe", required=True, help="configs/PLATFORM/MODEL.yaml, or PLATFORM/MODEL")
    add("--step", nargs="+", default=["all"], help="1, 2, 3, dpo: that job; several: one job for them; all (default): the set")
    add("--out", help="folder to write to (default: to the terminal)")
    add("--image", help="image of the pods (default: sanbu:cuda, sanbu:dcu or sanbu:ascend; configs/docker)")
    add("--pvc", help="name of the claim (default: --name)")
    add("--pvc-size", help="its size, such as 500Gi (default: 64 bytes a weight of the model)")
    add("--access-mode", default="ReadWriteMany", help="of the claim; ReadWriteOnce is enough where all pods share one node")
    add("--storage-class", help="of the claim (default: the cluster's)")
    add("--namespace", help="of everything (default: none written, so that of kubectl)")
    add("--name", help="what all names begin with (default: sanbu-MODEL)")
    add("--resource", help="the accelerator's name in limits (default: the platform's, such as hygon.com/dcu)")
    add("--cpu", type=int, help="cores that a training pod requests (default: 4 a device); twice that is its limit")
    add("--memory", help="of a training pod, such as 400Gi (default: its share of 7/8 of the platform's host memory); "
        "at least what scripts.plan says")
    add("--shm", help="size of /dev/shm, part of the memory (default: 4Gi a device, at most a quarter of the memory)")
    add("--interface", default="eth0", help="network interface between pods (default: eth0)")
    add("--queue", help="queue of the scheduler (deepspeedjob, pytorchjob, mpijob)")
    add("--priority", type=int, help="priority of the scheduler (deepspeedjob)")
    add("--node-selector", nargs="+", default=[], metavar="KEY=VALUE", help="labels of the nodes with the cards")
    add("--toleration", nargs="+", default=[], metavar="KEY[=VALUE][:EFFECT]", help="taints of theirs that pods with cards accept")
    add("--retries", type=int, default=3, help="how often a failed job starts again; it resumes (default: 3)")
    add("--wait-minutes", type=int, default=10, help="how long a step, holding its cards, waits for the former one (default: 10)")
    add("--trainer-version", default="2.2", help="trainjob: 2.0, 2.1, 2.2 (default; later ones take it too) or 2.3")
    add("--runtime", default="torch-distributed", help="trainjob: the ClusterTrainingRuntime (default: torch-distributed)")
    add("--as-root", action="store_true", help="run as root with IPC_LOCK, which RDMA needs to pin memory (pytorchjob, trainjob)")
    add("--recipe-in-pod", help="the recipe's path in the pod, where it is not the image's copy of configs/")
    add("--flags", default="", help='more flags of the steps, as --flags="--max_steps 10"; they win over the recipe')
    one = commands.add_parser("check", help="check manifests")
    one.add_argument("paths", nargs="+", help="files, or folders with .yaml files")
    one = commands.add_parser("set", help="the committed set under configs/kubernetes")
    one.add_argument("--check", action="store_true", help="compare only; exit code 1 if a file differs")
    return parser


def make_job(args: argparse.Namespace) -> Job:
    """The job that the flags of `render` describe. UserError for a value that is none, or a recipe that the steps refuse."""
    from scripts.kubernetes.render import KINDS, LONGEST_NAME, Job, Settings, dns_name, quantity
    from scripts.launch.__main__ import find_recipe
    from scripts.launch.platforms import did_you_mean
    from training.utils.flags.recipe import recipe_file

    if args.kind not in KINDS:
        raise UserError(f"--kind {args.kind} is unknown{did_you_mean(args.kind, KINDS)}; use one of {', '.join(KINDS)}.")
    names = set(Settings.__dataclass_fields__) - {"flags"}
    settings = {name: getattr(args, name) for name in names}
    settings["recipe"] = args.recipe if recipe_file(args.recipe) else str(find_recipe(args.recipe))
    try:
        flags = tuple(shlex.split(args.flags))
    except ValueError as error:
        raise UserError(f"--flags cannot be read ({error}); check its quotes.") from error
    job = Job(Settings(**settings, flags=flags))
    for flag in ("name", "pvc", "namespace"):
        value = getattr(args, flag)
        if value and (value != dns_name(value) or len(value) > LONGEST_NAME):
            raise UserError(
                f"--{flag} {value}: Kubernetes takes small letters, digits and dashes, here at most {LONGEST_NAME} of them, "
                f"such as {dns_name(value)[:LONGEST_NAME]}."
            )
    if len(f"{job.name}-tensorboard") > LONGEST_NAME:
        raise UserError(f"{job.name} is too long for a name that operators append to; give a shorter --name.")
    for flag in ("memory", "shm", "pvc_size"):
        if getattr(args, flag):
            quantity(getattr(args, flag))
    return job


def parse_sections(job: Job, steps: list[str]) -> None:
    """UserError for a recipe or --flags that a step's own parser would refuse in the pod."""
    from scripts.kubernetes.pod import SECTIONS
    from training.utils.flags.parse import parse
    from training.utils.flags.steps import STEPS

    classes = {step.section: step for step in STEPS}
    for step in steps:
        parse(classes[SECTIONS[step]], ["--config", job.settings.recipe, *job.settings.flags])


def chosen_steps(job: Job, words: list[str]) -> list[str] | None:
    """The steps that --step names, or None for the whole set."""
    from scripts.kubernetes.pod import SECTIONS

    if words == ["all"]:
        return None
    for word in words:
        if word not in SECTIONS:
            raise UserError(f"--step {word} is unknown; use {', '.join(SECTIONS)} or all.")
    return list(dict.fromkeys(words))


def render(job: Job, steps: list[str] | None = None) -> dict[str, list[Document]]:
    """File name -> documents. steps: only the job that runs them; None: everything, each step also as a job of its own."""
    from scripts.kubernetes import render as parts
    from scripts.kubernetes.kinds import training
    from scripts.kubernetes.pod import SECTIONS

    def name_of(step: str) -> str:
        return f"step{step}_{SECTIONS[step]}.yaml" if step.isdigit() else f"{step}.yaml"

    if steps:
        return {name_of(steps[0]) if len(steps) == 1 else "train.yaml": [training(job, steps)]}
    files = {
        "1-storage.yaml": parts.storage(job),
        "2-download.yaml": parts.downloads(job),
        "3-train.yaml": [training(job, job.steps())],
        "4-tensorboard.yaml": parts.tensorboard(job),
        "5-chat.yaml": parts.chat(job),
    }
    files |= {f"steps/{name_of(step)}": [training(job, [step])] for step in job.steps()}
    return {name: documents for name, documents in files.items() if documents}


def heading(job: Job, file: str) -> str:
    """The comment at the top of a file: what it is, and what to know before it is applied."""
    from scripts.kubernetes.kinds import title

    step = file.removeprefix("steps/").partition("_")[0].removeprefix("step").removesuffix(".yaml")
    what = {
        "1-storage.yaml": "the claim for data, models, output and caches",
        "2-download.yaml": "models and data sets of the hub to the claim (a token: secret huggingface, key token)",
        "3-train.yaml": title(job.steps()) + "; a step that is done is skipped",
        "train.yaml": "several steps in order",
        "4-tensorboard.yaml": f"curves: kubectl port-forward service/{job.name}-tensorboard 6006:80",
        "5-chat.yaml": f"a dialogue, on one card: kubectl attach -it deployment/{job.name}-chat",
    }
    told = what.get(file) or f"{title([step])} alone; not beside 3-train.yaml, which writes to the same folders"
    return f"# {job.model}, {job.platform.title} ({job.settings.kind})\n# {told}\n"


def to_yaml(documents: list[Document]) -> str:
    """Documents as YAML without anchors; commands on one line."""
    import yaml

    from scripts.kubernetes.render import Words

    class Dumper(yaml.SafeDumper):
        """Writes every document in full."""

        def ignore_aliases(self, data: Any) -> bool:
            return True

        def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
            return super().increase_indent(flow, False)

    Dumper.add_representer(
        Words, lambda dumper, data: dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)
    )
    return yaml.dump_all(documents, Dumper=Dumper, sort_keys=False, width=118, allow_unicode=True)


def render_files(job: Job, steps: list[str] | None) -> dict[str, str]:
    """File name -> text, after our own checks. UserError for what they find."""
    from scripts.kubernetes.checks import problems

    parse_sections(job, steps or job.steps())
    files = render(job, steps)
    for name, documents in files.items():
        for document in documents:
            if found := problems(document):
                raise UserError(f"{name}, {document['kind']} {document['metadata']['name']}: {found[0]}")
    return {name: heading(job, name) + to_yaml(documents) for name, documents in files.items()}


def committed(arguments: argparse.ArgumentParser) -> dict[Path, str]:
    """Path -> text of everything under configs/kubernetes."""
    found = {}
    for kind, recipe in SETS:
        path = ROOT / "configs" / f"{recipe}.yaml"
        job = make_job(arguments.parse_args(["render", "--kind", kind, "--recipe", str(path)]))
        for name, text in render_files(job, None).items():
            found[COMMITTED / kind / recipe / name] = text
    return found


def write_set(arguments: argparse.ArgumentParser, compare: bool) -> int:
    """Write the committed set, or say which files differ; returns how many differ when comparing."""
    wanted = committed(arguments)
    there = set(COMMITTED.rglob("*.yaml"))
    different = [path for path, text in wanted.items() if path not in there or path.read_text(encoding="utf-8") != text]
    old = sorted(there - wanted.keys())
    for path in [] if compare else different:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(wanted[path], encoding="utf-8")
    for path in [*different, *old]:
        said = "differs" if compare else "written"
        print(f"{path.relative_to(ROOT)}: {said if path in wanted else 'belongs to no set; remove it'}")
    print(f"{len(wanted)} files, {len(different)} {'differ' if compare else 'written'}")
    return len(different) + len(old) if compare else 0


def check(paths: list[str]) -> int:
    """Check files; prints what is wrong with them and returns 2, or says how many documents are right."""
    from scripts.kubernetes.checks import check_file

    files: list[Path] = []
    for path in map(Path, paths):
        files += sorted(path.rglob("*.y*ml")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{', '.join(paths)}: no .yaml files there; name manifests or folders with some.")
    right, wrong = 0, []
    for file in files:
        documents, found = check_file(file)
        right += documents
        wrong += found
    for sentence in wrong:
        print(f"error: {sentence}", file=sys.stderr)
    print(f"{right} documents in {len(files)} files, {len(wrong)} problems")
    return 2 if wrong else 0


@told
def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 1 for a committed set that differs, 2 for wrong input."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.command == "check":
        return check(args.paths)
    if args.command == "set":
        return 1 if write_set(parser, args.check) else 0
    from scripts.kubernetes.memory import check_memory

    job = make_job(args)
    steps = chosen_steps(job, args.step)
    files = render_files(job, steps)
    check_memory(job, steps or job.steps())
    if steps is None and "5-chat.yaml" not in files:
        print(f"# no 5-chat.yaml: {job.model} does not fit on one card, and chat.py uses one", file=sys.stderr)
    if not args.out:  # single steps are left out beside the job that runs them all
        print("---\n".join(text for name, text in files.items() if not name.startswith("steps/")), end="")
        return 0
    for name, text in files.items():
        path = Path(args.out) / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"--out {args.out}: {error.strerror}; name a folder where you may create files.") from error
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
