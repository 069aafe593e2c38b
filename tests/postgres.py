"""A PostgreSQL server of the tests, on the loopback, in a folder of its own."""

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from training.utils.run.environment import free_port


class Postgres:
    """A server that can be stopped and started. It refuses to run as root."""

    def __init__(self, folder: Path, programs: Path) -> None:
        names = {user.pw_name: user for user in pwd.getpwall()}
        user = names.get("postgres", names.get("nobody")) if os.getuid() == 0 else pwd.getpwuid(os.getuid())
        os.chown(folder, user.pw_uid, user.pw_gid)
        self.as_user = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []} if os.getuid() == 0 else {}
        self.folder, self.programs, port = folder, programs, free_port()
        self.url = f"postgresql://sanbu@127.0.0.1:{port}/postgres"
        self.run("initdb", "-D", folder / "data", "-U", "sanbu", "-A", "trust", "-E", "UTF8", "--no-sync", "--no-instructions")
        self.options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c fsync=off"

    def run(self, program: str, *words: str | Path) -> None:
        subprocess.run([self.programs / program, *words], check=True, cwd=self.folder, stdout=subprocess.DEVNULL, **self.as_user)

    def start(self) -> None:
        self.run("pg_ctl", "start", "-w", "-D", self.folder / "data", "-l", self.folder / "log", "-o", self.options)

    def stop(self) -> None:
        self.run("pg_ctl", "stop", "-w", "-m", "immediate", "-D", self.folder / "data")


@contextlib.contextmanager
def postgres() -> Iterator[Postgres]:
    """Run a server; skip the test where there is none."""
    program = shutil.which("initdb") or next(map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))), None)
    if program is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    with tempfile.TemporaryDirectory(prefix="sanbu-postgres-") as folder:
        server = Postgres(Path(folder), Path(program).parent)
        server.start()
        try:
            yield server
        finally:
            server.stop()
