"""Kubernetes manifests from a recipe: claim, downloads, training, TensorBoard, a dialogue, a server; and checks of manifests.

    python -m scripts.k8s render --kind pytorchjob --recipe configs/multi_node/llama-2-7b.yaml --step all --out DIR
    python -m scripts.k8s render --kind deepspeedjob --recipe configs/dcu_z100l/chatglm-6b.yaml --step 2 --image NAME:TAG
    python -m scripts.k8s check DIR FILE…       # what a cluster would refuse, or take and not mean
    python -m scripts.k8s set [--check]         # write, or compare, the committed set under configs/kubernetes

Kinds: deepspeedjob (TensorStack), pytorchjob and mpijob (Kubeflow), trainjob (Kubeflow Trainer 2). docs/en/kubernetes.md
"""

import argparse
import sys
from functools import partial
from pathlib import Path

from errors import CommandLine, UserError, in_language, refuse, told
from scripts.generated import write_files
from scripts.launch.platforms import ROOT

CHINESE = """由配方生成 Kubernetes 清单：存储卷声明、下载、训练、TensorBoard、对话；并检查清单。

    python -m scripts.k8s render --kind pytorchjob --recipe configs/multi_node/llama-2-7b.yaml --step all --out DIR
    python -m scripts.k8s render --kind deepspeedjob --recipe configs/dcu_z100l/chatglm-6b.yaml --step 2 --image NAME:TAG
    python -m scripts.k8s check DIR FILE…       # 集群会拒绝的，或接受却另作理解的
    python -m scripts.k8s set [--check]         # 写出 configs/kubernetes 下随代码提交的清单，或与之比较

种类：deepspeedjob（TensorStack）、pytorchjob 和 mpijob（Kubeflow）、trainjob（Kubeflow Trainer 2）。见 docs/zh/kubernetes.md
"""
COMMITTED = ROOT / "configs" / "kubernetes"
STEPS = ("steps/step1_sft.yaml", "steps/step2_reward.yaml", "steps/step3_ppo.yaml")
# The committed set. The nine training jobs and the dialogue have predecessors elsewhere (docs/en/kubernetes.md); the rest
# shows every other kind and every platform with an accelerator once.
SETS = (
    ("deepspeedjob", "single_gpu/opt-1.3b", ("1-storage.yaml", "2-download.yaml", "5-chat.yaml", "6-serve.yaml", *STEPS)),
    ("deepspeedjob", "single_node/opt-13b", STEPS),
    ("deepspeedjob", "multi_node/opt-66b", STEPS),
    ("deepspeedjob", "dcu_z100l/chatglm-6b", ("3-train.yaml",)),
    ("pytorchjob", "ascend_910/chatglm2-6b", ("3-train.yaml",)),
    ("trainjob", "multi_node/opt-13b", ("3-train.yaml",)),
    ("mpijob", "multi_node/chatglm3-6b", ("3-train.yaml",)),
)


def build_parser() -> CommandLine:
    """Build the parser of render, check and set."""
    advice = "--help lists commands and flags."
    parser = CommandLine(advice, prog="python -m scripts.k8s", description=__doc__, zh=CHINESE)
    kinds = {"dest": "command", "required": True, "metavar": "render|check|set"}
    commands = parser.add_subparsers(parser_class=partial(CommandLine, advice), **kinds)
    one = commands.add_parser("render", help=in_language("manifests from a recipe", "由配方生成清单"))
    add = one.add_argument
    add("--kind", required=True, help="deepspeedjob, pytorchjob, trainjob or mpijob",
        zh="deepspeedjob、pytorchjob、trainjob 或 mpijob 之一")
    add("--recipe", required=True, help="configs/PLATFORM/MODEL.yaml, or PLATFORM/MODEL",
        zh="configs/PLATFORM/MODEL.yaml，或 PLATFORM/MODEL")
    add("--step", nargs="+", default=["all"], help="1, 2, 3, dpo: that job; several: one job for them; all (default): the set",
        zh="1、2、3、dpo：该步骤的作业；给多个：合成一个作业；all（缺省）：全套清单")
    add("--out", help="folder to write to (default: to the terminal)", zh="写入的文件夹（缺省：打印到终端）")
    add("--image", help="image of the pods (default: sanbu:cuda, sanbu:dcu or sanbu:ascend; configs/docker)",
        zh="Pod 的镜像（缺省：sanbu:cuda、sanbu:dcu 或 sanbu:ascend；见 configs/docker）")
    add("--pvc", help="name of the claim (default: --name)", zh="存储卷声明的名称（缺省：--name）")
    add("--pvc-size", help="its size, such as 500Gi (default: 64 bytes a weight of the model)",
        zh="其大小，例如 500Gi（缺省：模型每个参数 64 字节）")
    add("--access-mode", default="ReadWriteMany", help="of the claim; ReadWriteOnce is enough where all pods share one node",
        zh="声明的访问方式；所有 Pod 在同一节点时 ReadWriteOnce 即可")
    add("--storage-class", help="of the claim (default: the cluster's)", zh="声明的存储类（缺省：集群的）")
    add("--namespace", help="of everything (default: none written, so that of kubectl)",
        zh="所有对象的命名空间（缺省：不写，随 kubectl）")
    add("--name", help="what all names begin with (default: sanbu-MODEL)", zh="所有名称的开头（缺省：sanbu-MODEL）")
    add("--resource", help="the accelerator's name in limits (default: the platform's, such as hygon.com/dcu)",
        zh="limits 中加速卡的名称（缺省：平台的，例如 hygon.com/dcu）")
    add("--cpu", type=int, help="cores that a training pod requests (default: 4 a device); twice that is its limit",
        zh="训练 Pod 请求的 CPU 核数（缺省：每张卡 4 个）；上限为其两倍")
    add("--memory", help="of a training pod, at least what scripts.plan says (default: its share of 7/8 of the host's memory)",
        zh="训练 Pod 的内存，不少于 scripts.plan 的结果（缺省：按比例分得主机内存的 7/8）")
    add("--shm", help="size of /dev/shm, part of the memory (default: 4Gi a device, at most a quarter of the memory)",
        zh="/dev/shm 的大小，计入内存（缺省：每张卡 4Gi，至多为内存的四分之一）")
    add("--interface", default="eth0", help="network interface between pods (default: eth0)",
        zh="Pod 之间的网卡（缺省：eth0）")
    add("--queue", help="queue of the scheduler (deepspeedjob, pytorchjob, mpijob)",
        zh="调度器的队列（deepspeedjob、pytorchjob、mpijob）")
    add("--priority", type=int, help="priority of the scheduler (deepspeedjob)", zh="调度器的优先级（deepspeedjob）")
    add("--node-selector", nargs="+", default=[], metavar="KEY=VALUE", help="labels of the nodes with the cards",
        zh="有加速卡的节点的标签")
    add("--toleration", nargs="+", default=[], metavar="KEY[=VALUE][:EFFECT]", help="taints of theirs that pods with cards accept",
        zh="用卡的 Pod 所容忍的节点污点")
    add("--retries", type=int, default=3, help="how often a failed job starts again; it resumes (default: 3)",
        zh="失败的作业重启的次数，重启后续训（缺省：3）")
    add("--wait-minutes", type=int, default=10, help="how long a step, holding its cards, waits for the former one (default: 10)",
        zh="一个步骤占着卡等待前一步的分钟数（缺省：10）")
    add("--trainer-version", default="2.2", help="trainjob: 2.0, 2.1, 2.2 (default; later ones take it too) or 2.3",
        zh="trainjob：2.0、2.1、2.2（缺省，更新的版本也接受）或 2.3")
    add("--runtime", default="torch-distributed", help="trainjob: the ClusterTrainingRuntime (default: torch-distributed)",
        zh="trainjob：ClusterTrainingRuntime（缺省：torch-distributed）")
    add("--as-root", action="store_true", help="run as root with IPC_LOCK, which RDMA needs to pin memory (pytorchjob, trainjob)",
        zh="以 root 和 IPC_LOCK 运行，RDMA 锁定内存需要（pytorchjob、trainjob）")
    add("--recipe-in-pod", help="the recipe's path in the pod, where it is not the image's copy of configs/",
        zh="配方在 Pod 中的路径（不用镜像中 configs/ 的副本时）")
    add("--flags", default="", help='more flags of the steps, as --flags="--max_steps 10"; they win over the recipe',
        zh="步骤的更多参数，如 --flags=\"--max_steps 10\"；优先于配方")
    one = commands.add_parser("check", help=in_language("check manifests", "检查清单"))
    one.add_argument("paths", nargs="+", help="files, or folders with .yaml files",
        zh="文件，或含 .yaml 文件的文件夹")
    committed = in_language("the committed set under configs/kubernetes", "configs/kubernetes 下随代码提交的清单")
    one = commands.add_parser("set", help=committed)
    one.add_argument("--check", action="store_true", help="compare only; exit code 1 if a file differs",
        zh="只比较；有文件不同时退出码为 1")
    return parser


def set_texts(parser: CommandLine) -> dict[Path, str]:
    """Return path -> text of everything under configs/kubernetes."""
    from scripts.kubernetes.render import make_job, render

    files = {}
    for kind, recipe, names in SETS:
        path = ROOT / "configs" / f"{recipe}.yaml"
        job = make_job(parser.parse_args(["render", "--kind", kind, "--recipe", str(path)]))
        texts = render(job, with_server="6-serve.yaml" in names)
        files |= {COMMITTED / kind / recipe / name: texts[name] for name in names}
    return files


def render_command(args: argparse.Namespace) -> int:
    """Render to the terminal or to files. Raise UserError for a recipe or a value that would fail in the cluster."""
    from scripts.kubernetes.check import check_memory
    from scripts.kubernetes.pod import STEP_OF
    from scripts.kubernetes.render import make_job, render
    from training.utils.flags.parse import parse
    from training.utils.run.environment import check_writable

    job, choices = make_job(args), [] if args.step == ["all"] else list(dict.fromkeys(args.step))
    for word in choices:
        refuse(word not in STEP_OF, f"--step {word} is unknown; use {', '.join(STEP_OF)} or all.")
    steps = [STEP_OF[choice] for choice in choices] or job.steps
    for step in steps:  # a pod would hear of a wrong flag only after it got its cards
        parse(step.arguments_class, ["--config", job.recipe.path, *job.flags])
    if args.out:
        check_writable(Path(args.out), "--out")
    files = render(job, choices, with_server=bool(args.out))
    for step in steps:
        check_memory(job, step)
    if not choices and "5-chat.yaml" not in files:
        print(f"# no 5-chat.yaml, no 6-serve.yaml: {job.model} does not fit on one card, and both use one", file=sys.stderr)
    if not args.out:  # without single steps, beside the job that runs them all, and the server, which needs a secret and a card
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
