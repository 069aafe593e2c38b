"""The process group of a run."""

import socket
import subprocess
import sys

from tests.launching import REPOSITORY, environment

JOIN = """
from models.device import PLATFORMS
from training.utils.run import join_process_group

print(join_process_group(PLATFORMS["cpu"]))
"""


def test_a_run_of_one_process_needs_no_port():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        group = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        group["MASTER_PORT"] = str(taken.getsockname()[1])   # as of another run that the shell still describes
        for described in (group, {}):
            command, env = [sys.executable, "-c", JOIN], environment(**described)
            done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=120)
            assert done.stdout.splitlines()[-1:] == ["(0, 0, 1)"], done.stderr[-2000:]
