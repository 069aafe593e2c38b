"""The start of a run: its process group, and what is wrong on one of several nodes."""

import socket
from types import SimpleNamespace

import pytest

from errors import UserError
from models.device import PLATFORMS
from tests.launching import start, succeed
from training.utils.run import process_group as run
from training.utils.run.nodes import Nodes, keeps_disk, node_names
from training.utils.run.process_group import timeout_minutes

JOIN = """
import sys

from models.device import PLATFORMS
from training.utils.run.process_group import join_process_group

group = join_process_group(PLATFORMS["cpu"])
import deepspeed.runtime.zero.muon.muon_optimizer  # as every ZeRO engine does

print(group, "torch._inductor.compile_fx" in sys.modules)
"""


def test_a_run_of_one_process_needs_no_port_and_no_compiler(tmp_path):
    file = tmp_path / "join.py"
    file.write_text(JOIN)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        group = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        group["MASTER_PORT"] = str(taken.getsockname()[1])   # as of another run that the shell still describes
        assert succeed(str(file), [], **group).splitlines()[-1:] == ["(0, 0, 1) False"]


def test_the_first_of_two_processes_names_a_port_that_is_taken(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        group = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        for name, value in (group | {"MASTER_PORT": str(taken.getsockname()[1])}).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=rf"port {taken.getsockname()[1]} of \S+ is in use; give another --master_port"):
            run.join_process_group(PLATFORMS["cpu"])


WARN = """
import logging, sys, warnings
from pathlib import Path
from models.quiet import quiet_libraries

quiet_libraries()
quiet_libraries(Path(sys.argv[1]))
assert not Path(sys.argv[1]).exists()
for kind in (FutureWarning, UserWarning):
    warnings.warn_explicit(f"a {kind.__name__} of theirs", kind, "transformers/model.py", 7, module="transformers.model")
for name in ("transformers.model", "DeepSpeed", "peft.tuners", "datasets"):
    logging.getLogger(name).warning("a line of %s", name)
    logging.getLogger(name).error("an error of %s", name)
"""


def test_what_libraries_warn_of_goes_to_the_log_alone(tmp_path):
    (tmp_path / "warn.py").write_text(WARN)
    done = start(str(tmp_path / "warn.py"), [str(tmp_path / "training.log")])
    assert not done.returncode, done.stderr
    log = (tmp_path / "training.log").read_text()
    assert "transformers/model.py:7: FutureWarning: a FutureWarning of theirs" in log and "UserWarning" not in log
    assert "FutureWarning" not in done.stderr and "a UserWarning of theirs" in done.stderr
    for name in ("transformers.model", "DeepSpeed", "peft.tuners", "datasets"):
        assert f"a line of {name}" in log and f"a line of {name}" not in done.stderr
        assert f"an error of {name}" in log and f"an error of {name}" in done.stderr


@pytest.mark.parametrize("said", ["abc", "0", "-5", "1.5", ""])
def test_a_waiting_time_that_is_none_is_told(monkeypatch, said):
    monkeypatch.setenv("SANBU_TIMEOUT_MINUTES", said)
    with pytest.raises(UserError, match=f"SANBU_TIMEOUT_MINUTES is '{said}': expected a whole number of minutes"):
        timeout_minutes()
    monkeypatch.setenv("SANBU_TIMEOUT_MINUTES", "45")
    assert timeout_minutes() == 45


@pytest.mark.parametrize(
    ("processes", "numbers"),
    [
        ([("a", 0), ("a", 1), ("b", 0), ("b", 1)], [0, 0, 1, 1]),
        ([("a", 0), ("b", 0), ("a", 1), ("b", 1)], [0, 1, 0, 1]),  # mpirun --map-by node
        ([("a", 0), ("a", 0), ("a", 1)], [0, 1, 1]),  # two nodes that call themselves alike
    ],
)
def test_nodes_are_named_by_their_hosts(processes, numbers):
    named = [f"node {number} ({host})" for number, (host, _) in zip(numbers, processes, strict=True)]
    assert node_names(processes) == named


@pytest.mark.parametrize("trouble", ["resolve_dtype", "check_writable"])
def test_the_trouble_of_one_node_ends_all_with_its_name(tmp_path, monkeypatch, trouble):
    """Found before the nodes meet, it would leave the others waiting for this one."""

    def fail(*_) -> None:
        raise UserError("this one cannot")

    class Two(Nodes):
        def gather(self, value):
            return [value, None]

    met = []
    monkeypatch.setattr(run, "join_process_group", lambda platform: (0, 0, 1))
    monkeypatch.setattr(run, "set_device", lambda *_: "cpu")
    monkeypatch.setattr(run, "meet", lambda *_: met.append(True) or Two(["node 0 (a)", "node 1 (b)"], several=True))
    monkeypatch.setattr(run, trouble, fail)
    args = SimpleNamespace(output_dir=str(tmp_path), dtype="fp32", seed=1, deepspeed_config=None)
    with pytest.raises(UserError, match=r"^node 0 \(a\): this one cannot"):
        run.Run.start(args)
    assert met


def test_the_folder_is_made_before_nodes_look_for_each_others_marks(tmp_path):
    nodes = Nodes(["node 0 (a)"])
    assert keeps_disk(nodes, tmp_path / "new" / "out", 0, [0], "token")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--output_dir .* cannot be written"):
        keeps_disk(nodes, tmp_path / "file" / "out", 0, [0], "token")
