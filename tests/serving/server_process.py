"""Starts `dlm serve` and speaks with it."""

import contextlib
import dataclasses
import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

KEY = "sesame"
CONTEXT = 128


@dataclasses.dataclass(frozen=True)
class Server:
    """A running server."""

    url: str
    process: subprocess.Popen
    log: str  # a file

    def logged(self):
        """What it has written to stderr."""
        return Path(self.log).read_text()

    def get(self, path, **headers):
        """(status, body) of a GET."""
        return self.send("GET", path, None, **headers)

    def post(self, path, body, **headers):
        """(status, JSON) of a POST; bytes go as they are."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        status, text = self.send("POST", path, data, **{"Content-Type": "application/json",
                                                        "Authorization": f"Bearer {KEY}", **headers})
        return status, json.loads(text)

    def send(self, method, path, data, **headers):
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


@contextlib.contextmanager
def serving(directory, tmp_path, *flags):
    """Starts `dlm serve` and waits until it says where."""
    keys, log = tmp_path / "keys", tmp_path / "log"
    keys.write_text(f"other\n{KEY}\n")
    command = [sys.executable, "-m", "dlm_jax", "serve", str(directory), "--port", "0", "--context", str(CONTEXT),
               "--api-keys", str(keys), *flags]
    with open(log, "w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True,
                                   env=os.environ | {"JAX_PLATFORMS": "cpu"})
        try:
            line = process.stdout.readline()
            assert line, log.read_text()
            yield Server(re.search(r" at (\S+) ", line).group(1), process, str(log))
        finally:
            process.kill()
            process.wait()
