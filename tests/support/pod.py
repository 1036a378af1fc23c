"""A machine to rent: a real sshd on the loopback, with a disk of its own, that can be killed, rebooted and cut off.

A word in the environment of its processes identifies them.
"""

import contextlib
import os
import pwd
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import yaml

SSHD = shutil.which("sshd", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"]))
ABSENT = [name for name, path in [("sshd", SSHD), *((n, shutil.which(n)) for n in ("ssh", "rsync"))] if not path]
PYTHON = Path(sys.executable).resolve()  # the virtual environment's base
CONFIG = """
ListenAddress 127.0.0.1
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/authorized_keys
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin yes
PidFile none
MaxStartups 100
SetEnv PGOLF_POD={word} HOME={folder}/home PATH={path}
"""


class Pod:
    """A context manager, up inside of it. `disk` is its folder, path the PATH of its shell.

    kill() ends every process at once, as when the machine dies; start() boots it again, with the disk as it was.
    cut() drops every connection and accepts no more, while the machine goes on; start() accepts them again.
    """

    def __init__(self, folder: Path, path: str = f"{PYTHON.parent}:/usr/local/bin:/usr/bin:/bin"):
        if ABSENT:
            pytest.skip(f"{', '.join(ABSENT)} not installed: tools/install.py --test-tools")
        if os.geteuid() == 0:
            os.makedirs("/run/sshd", mode=0o755, exist_ok=True)  # root's sshd refuses to start without
        self.folder, self.path, self.word = folder, path, secrets.token_hex(8)
        self.disk = folder / "disk"
        for name in ("disk", "home"):
            (folder / name).mkdir(parents=True)
        for name in ("host_key", "key", "other_key"):
            subprocess.run([*["ssh-keygen", "-q", "-t", "ed25519", "-N"], "", "-f", folder / name], check=True)
        shutil.copy(folder / "key.pub", folder / "authorized_keys")
        self.process: subprocess.Popen | None = None
        self.sockets = tempfile.mkdtemp()  # short: a socket's path has 108 characters at most
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]

    def __enter__(self) -> "Pod":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        shutil.rmtree(self.sockets, ignore_errors=True)  # ssh removes its own meanwhile

    def yaml(self, **keys: object) -> Path:
        """POD.yaml of this machine, and how it is used in tests."""
        # A tenth of a second less per connection: no post-quantum key exchange, and one shared connection.
        quick = ["KexAlgorithms=curve25519-sha256", "ControlMaster=auto", "ControlPersist=5"]
        options = ["BatchMode=yes", "ConnectTimeout=10", "StrictHostKeyChecking=accept-new", *quick]
        options += [f"UserKnownHostsFile={self.folder}/known_hosts", f"ControlPath={self.sockets}/%C"]
        content = {"host": "127.0.0.1", "user": pwd.getpwuid(os.geteuid()).pw_name, "port": self.port}
        content |= {"key": str(self.folder / "key"), "dir": str(self.disk / "pgolf"), "gpus": 0, "free_gb": 0}
        content |= {"pull_seconds": 0.05, "ssh_options": options}
        path = self.folder / "POD.yaml"
        path.write_text(yaml.safe_dump(content | keys))
        return path

    def start(self) -> None:
        config = self.folder / "sshd_config"
        config.write_text(CONFIG.format(folder=self.folder, word=self.word, path=self.path))
        words = [SSHD, "-D", "-e", "-f", config, "-p", str(self.port)]
        with open(self.folder / "sshd.log", "wb") as log:
            self.process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stderr=log)
        while b"Server listening" not in (self.folder / "sshd.log").read_bytes():
            assert self.process.poll() is None, (self.folder / "sshd.log").read_text()
            time.sleep(0.01)

    def processes(self) -> list[psutil.Process]:
        """Everything that runs on it, except sshd."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("PGOLF_POD") == self.word and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def cut(self) -> None:
        if self.process is not None:
            listener = psutil.Process(self.process.pid)
            for process in [listener, *listener.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):  # a session may end meanwhile
                    if process.name().startswith("sshd"):
                        process.kill()
            self.process.wait()
            self.process = None

    def kill(self) -> None:
        self.cut()
        while family := self.processes():  # until no process is left that could have started another
            for process in family:
                with contextlib.suppress(psutil.Error):
                    process.kill()

    def replace_disk(self) -> None:
        """Become another machine at the same address; kill() first."""
        self.disk.rename(self.folder / f"disk-{secrets.token_hex(4)}")
        self.disk.mkdir()
