"""Kubernetes manifests from a recipe: claim, downloads, training, TensorBoard, a dialogue; and checks of manifests.

    python -m scripts.k8s render --kind pytorchjob --recipe configs/multi_node/llama-2-7b.yaml --step all --out DIR
    python -m scripts.k8s render --kind deepspeedjob --recipe configs/dcu_z100l/chatglm-6b.yaml --step 2 --image NAME:TAG
    python -m scripts.k8s check DIR FILE…       # what a cluster would refuse, or take and not mean
    python -m scripts.k8s set [--check]         # write, or compare, the committed set under configs/kubernetes

Kinds: deepspeedjob (TensorStack), pytorchjob and mpijob (Kubeflow), trainjob (Kubeflow Trainer 2). docs/en/kubernetes.md
"""

import argparse
import sys
from pathlib import Path

from errors import UserError, refuse, told
from scripts.generated import write_files
from scripts.launch.platforms import ROOT

COMMITTED = ROOT / "configs" / "kubernetes"
STEPS = ("steps/step1_sft.yaml", "steps/step2_reward.yaml", "steps/step3_ppo.yaml")
# The committed set. The nine training jobs and the dialogue have predecessors elsewhere (docs/en/kubernetes.md); the rest
# shows every other kind and every platform with an accelerator once.
SETS = (
    ("deepspeedjob", "single_gpu/opt-1.3b", ("1-storage.yaml", "2-download.yaml", "5-chat.yaml", *STEPS)),
    ("deepspeedjob", "single_node/opt-13b", STEPS),
    ("deepspeedjob", "multi_node/opt-66b", STEPS),
    ("deepspeedjob", "dcu_z100l/chatglm-6b", ("3-train.yaml",)),
    ("pytorchjob", "ascend_910/chatglm2-6b", ("3-train.yaml",)),
    ("trainjob", "multi_node/opt-13b", ("3-train.yaml",)),
    ("mpijob", "multi_node/chatglm3-6b", ("3-train.yaml",)),
)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of render, check and set."""
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


def set_texts(parser: argparse.ArgumentParser) -> dict[Path, str]:
    """Return path -> text of everything under configs/kubernetes."""
    from scripts.kubernetes.render import make_job, render

    files = {}
    for kind, recipe, names in SETS:
        path = ROOT / "configs" / f"{recipe}.yaml"
        texts = render(make_job(parser.parse_args(["render", "--kind", kind, "--recipe", str(path)])))
        files |= {COMMITTED / kind / recipe / name: texts[name] for name in names}
    return files


def render_command(args: argparse.Namespace) -> int:
    """Render to the terminal or to files. Raise UserError for a recipe or a value that would fail in the cluster."""
    from scripts.kubernetes.check import check_memory
    from scripts.kubernetes.pod import STEP_OF
    from scripts.kubernetes.render import make_job, render
    from training.utils.flags.parse import parse

    job, choices = make_job(args), [] if args.step == ["all"] else list(dict.fromkeys(args.step))
    for word in choices:
        refuse(word not in STEP_OF, f"--step {word} is unknown; use {', '.join(STEP_OF)} or all.")
    steps = [STEP_OF[choice] for choice in choices] or job.steps
    files = render(job, choices)
    for step in steps:  # a pod would hear of a wrong flag only after it got its cards
        parse(step.arguments_class, ["--config", job.recipe.path, *job.flags])
        check_memory(job, step)
    if not choices and "5-chat.yaml" not in files:
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


def check_command(paths: list[str]) -> int:
    """Check files, print one line a problem, and return 2 if there are any. Raise UserError for files that cannot be read."""
    from scripts.kubernetes.check import check_file

    files: list[Path] = []
    for path in map(Path, paths):
        files += sorted(path.rglob("*.y*ml")) if path.is_dir() else [path]
    refuse(not files, f"{', '.join(paths)}: no .yaml files there; name manifests or folders with some.")
    documents, wrong = 0, []
    for file in files:
        number, sentences = check_file(file)
        documents, wrong = documents + number, wrong + sentences
    for sentence in wrong:
        print(f"error: {sentence}", file=sys.stderr)
    print(f"{documents} documents in {len(files)} files, {len(wrong)} problems")
    return 2 if wrong else 0


@told
def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0, 1 for a committed set that differs, 2 for wrong input."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.command == "check":
        return check_command(args.paths)
    if args.command == "set":
        return write_files(set_texts(parser), COMMITTED.rglob("*.yaml"), args.check)
    return render_command(args)


if __name__ == "__main__":
    sys.exit(main())
