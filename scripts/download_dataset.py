"""Save a data set of the hub as a folder, for machines without network.

python -m scripts.download_dataset Dahoas/rm-static
python -m training.step1_sft.main --data_path Dahoas/rm-static …     # finds datasets/Dahoas/rm-static by itself
"""

import shutil
import sys
from pathlib import Path

from errors import CommandLine, UserError, told
from training.utils.data.paths import check_hub, download_folder

CHINESE = """把 hub 上的数据集存为文件夹，供没有网络的机器使用。

python -m scripts.download_dataset Dahoas/rm-static
python -m training.step1_sft.main --data_path Dahoas/rm-static …     # 会自动找到 datasets/Dahoas/rm-static
"""


def download(name: str, output_dir: str | None = None) -> Path:
    """Fetch all splits of a set and write them with save_to_disk. name: a named set, ID or ID:CONFIG."""
    folder = Path(output_dir).expanduser() if output_dir else download_folder(name)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: already there; delete it to fetch {name} again, or choose another --output_dir.")
    check_hub(name)
    from training.utils.data.sources import load_from_hub  # imports datasets, which takes two seconds

    splits = load_from_hub(name)
    unfinished = folder.with_name(f".{folder.name}.unfinished")  # a broken download is never mistaken for a whole one
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        splits.save_to_disk(str(unfinished))
        unfinished.replace(folder)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror or error}); choose another --output_dir."
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    counts = ", ".join(f"{split} {len(rows)}" for split, rows in splits.items())
    use = name if folder == download_folder(name) else folder
    print(f"Saved to {folder}: {counts} records. Use it with --data_path {use}")
    return folder


def build_parser() -> CommandLine:
    """Define the flags."""
    parser = CommandLine("--help lists the flags.", prog="python -m scripts.download_dataset", description=__doc__, zh=CHINESE)
    add = parser.add_argument
    add("dataset_id", help="name of a set, hub id, or ID:CONFIG for a set with configurations",
        zh="数据集的内置名称、hub 上的名称，或有多个配置时的 ID:CONFIG")
    add("--output_dir", "--output-dir", help="folder to write; by default datasets/ID of this folder",
        zh="写入的文件夹；缺省：当前文件夹的 datasets/ID")
    return parser


@told
def main(argv: list[str] | None = None) -> int:
    """Parse the command line and download; return the exit code: 0, or 2 for a UserError."""
    args = build_parser().parse_args(argv)
    download(args.dataset_id, args.output_dir)
    return 0


if __name__ == "__main__":
    sys.exit(main())
