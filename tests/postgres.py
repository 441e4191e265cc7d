"""A PostgreSQL server of its own for the tests, where its programs are installed."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

PLACES = "/usr/lib/postgresql/*/bin"  # Debian's, which are on nobody's path


def programs() -> Path | None:
    """Where the programs of a server are; None where there is no server."""
    on_path = shutil.which("initdb")
    places = (
        [os.path.dirname(os.path.realpath(on_path))] if on_path else sorted(glob.glob(PLACES), key=_version)
    )
    return Path(places[-1]) if places else None


def _version(place: str) -> float:
    return float(Path(place).parent.name)


class Server:
    """A cluster in a directory, which answers on a socket there and nowhere else.

    Args:
        directory: For the data and the socket.
    """

    def __init__(self, directory: Path) -> None:
        self._bin = programs()
        self._directory, self._data = directory, directory / "data"

    def url_of(self, database: str) -> str:
        """A new database's."""
        self._execute(
            "createdb",
            "--maintenance-db=postgres",
            f"--host={self._directory}",
            "--username=postgres",
            database,
        )
        return f"postgresql+psycopg://postgres@/{database}?host={self._directory}"

    def create(self) -> None:
        if os.geteuid() == 0:  # whom PostgreSQL does not run for
            shutil.chown(self._directory, "postgres", "postgres")
        self._run("initdb", "--username=postgres", "--auth=trust", "--no-sync")

    def start(self) -> None:
        # Tests kill their clients, not the machine: what is committed need not reach the disk.
        options = f"-c listen_addresses= -c unix_socket_directories={self._directory} -c fsync=off"
        self._run("pg_ctl", "start", "--wait", f"--log={self._directory}/log", f"--options={options}")

    def stop(self) -> None:
        """At once: connections break."""
        self._run("pg_ctl", "stop", "--wait", "--mode=immediate")

    def _run(self, program: str, *arguments: str) -> None:
        self._execute(program, f"--pgdata={self._data}", *arguments)

    def _execute(self, program: str, *arguments: str) -> None:
        assert self._bin is not None
        command = [str(self._bin / program), *arguments]
        if os.geteuid() == 0:
            command = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", *command]
        subprocess.run(command, check=True, timeout=120, stdout=subprocess.DEVNULL, cwd=self._directory)


@contextlib.contextmanager
def running() -> Iterator[Server]:
    """A server for as long as this takes."""
    # Not below a test's own directory: the path of a socket is short, and open to another user.
    directory = Path(tempfile.mkdtemp(prefix="pg"))
    server = Server(directory)
    try:
        server.create()
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(directory, ignore_errors=True)
