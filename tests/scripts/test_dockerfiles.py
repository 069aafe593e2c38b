"""The images cannot be built here; what can be known without building them is checked."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.kubernetes.render import CODE, WORK
from scripts.launch.platforms import load_platforms

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "docker"
NAMES = ["cuda", "dcu", "ascend"]


def text_of(name: str) -> str:
    """A Dockerfile."""
    return (FOLDER / f"{name}.Dockerfile").read_text(encoding="utf-8")


def instructions(name: str) -> list[tuple[str, str]]:
    """(INSTRUCTION, arguments) with continued lines joined and comments left out."""
    lines = "\n".join(line for line in text_of(name).splitlines() if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", lines)
    return [tuple(line.split(" ", 1)) for line in joined.splitlines() if line.strip()]


@pytest.mark.parametrize("name", NAMES)
def test_hadolint_finds_nothing(name):
    program = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    assert program, "pip install -r requirements-test.txt"
    done = subprocess.run([program, "--no-color", str(FOLDER / f"{name}.Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_what_is_copied_exists_and_stays_in(name, repository):
    ignored = (repository / ".dockerignore").read_text().splitlines()
    for instruction, words in instructions(name):
        if instruction in ("COPY", "ADD"):
            assert instruction == "COPY"
            for source in words.split()[:-1]:
                assert (repository / source).exists(), source
                assert source.split("/")[0] not in ignored
    # What the pods run must not be left out of the image.
    for needed in ("configs", "scripts", "training", "models", "inference", "train.py", "chat.py", "errors.py", "data"):
        assert needed not in ignored and (repository / needed).exists()
    assert {".git", "output", "datasets", ".venv"} <= set(ignored)


@pytest.mark.parametrize("name", NAMES)
def test_versions_are_pinned_and_torch_is_left_alone(name, repository):
    found = instructions(name)
    base = next(words for instruction, words in found if instruction == "ARG")
    assert re.fullmatch(r"BASE_IMAGE=\S+:[\w.-]*\d[\w.-]*", base), base
    assert ("FROM", "${BASE_IMAGE}") in found
    shell = " && ".join(words for instruction, words in found if instruction == "RUN")
    for pip in re.findall(r"pip install (.*?)(?:&&|\)|$)", shell):
        assert "--no-cache-dir" in pip
        # From a list with versions, a pinned name, or wheels of the vendor; a list always under the constraint.
        names = [word.strip('"') for word in pip.split() if not word.startswith("-") and "/" not in word]
        assert all("==" in word for word in names), pip
        assert ("--requirement" not in pip) or "--constraint /tmp/constraints.txt" in pip
    # torch is taken out of the list that is installed, and a check after it says whose build is there.
    assert re.search(r"sed (-E )?'/\^(torch|\(torch\|deepspeed\|numpy\|pytest\.\*\))==/d'", shell)
    assert re.search(r"assert (torch\.version\.(cuda|hip)|version\('torch'\))", shell)
    listed = [line for line in (repository / "requirements.txt").read_text().splitlines() if re.match(r"(torch|deepspeed)\b", line)]
    assert all(re.match(r"(torch|deepspeed)==", line) for line in listed) and len(listed) == 2


@pytest.mark.parametrize("name", NAMES)
def test_what_the_kinds_of_jobs_need_is_there(name):
    found = instructions(name)
    shell = " ".join(words for instruction, words in found if instruction == "RUN")
    for needed in ("openssh-server", "pdsh", "openmpi-bin", "mkdir -p /run/sshd", "chown root:root /usr/lib"):
        assert needed in shell
    assert "rm -rf /var/lib/apt/lists/*" in shell and "--no-install-recommends" in shell
    # As the MPI operator's own base image: it mounts keys from a Secret, links in a folder that others may write to.
    assert "printf 'StrictModes no\\n' > /etc/ssh/sshd_config.d/sanbu.conf" in shell
    assert "StrictHostKeyChecking no" in shell and "UserKnownHostsFile /dev/null" in shell
    assert ("WORKDIR", WORK) in found and ("COPY", f". {CODE}") in found
    # A TrainJob before 2.2 and every plain pod without a user of its own runs as the image says.
    users = [words for instruction, words in found if instruction == "USER"]
    assert users[-1] == ("1000:1000" if name == "cuda" else "0")
    settings = " ".join(words for instruction, words in found if instruction == "ENV")
    if name == "cuda":
        assert f"PYTHONPATH={CODE}" in settings
    else:  # the vendor's files extend PYTHONPATH; the project is found by a .pth file, the variables by every bash
        assert "PYTHONPATH" not in settings and "sanbu.pth" in shell
        assert f"BASH_ENV={CODE}/scripts/vendor_env.sh" in settings


def test_the_platforms_name_these_images():
    tags = {platform.kubernetes["image"] for platform in load_platforms().values()}
    assert tags == {f"sanbu:{name}" for name in NAMES}
    assert {path.stem for path in FOLDER.glob("*.Dockerfile")} == set(NAMES)


@pytest.mark.parametrize("place", ["configs/docker/dcu.Dockerfile", "docs/en/hardware/dcu.md", "docs/zh/hardware/dcu.md"])
def test_the_deepspeed_of_the_dcu_imports(place, repository):
    """0.14.2 of the index wants a torch before 2.4; the vendor's, whose launcher is alike, a numpy before 2."""
    text = (repository / place).read_text(encoding="utf-8")
    assert "deepspeed==0.14.4" in text and "deepspeed==0.14.2" not in text
    assert "echo 'numpy<2' >> " in text and "/^(torch|deepspeed|numpy|pytest.*)==/d' " in text
    # torch is 2.4.1, with which transformers of requirements.txt does nothing.
    assert "requirements-oldest.txt" in text and "requirements.txt" not in text.replace("transformers of requirements.txt", "")
    assert 'python -c "import deepspeed.launcher.runner"' in text
