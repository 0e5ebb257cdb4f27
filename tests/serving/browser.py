"""Headless Chromium, driven by the DevTools protocol over two pipes."""

import base64
import contextlib
import json
import os
import shlex
import shutil
import subprocess
import time

import pytest


class Page:
    """A tab."""

    def __init__(self, to_browser, from_browser):
        self._to, self._from, self._number, self._session = to_browser, from_browser, 0, None

    def call(self, method, **parameters):
        """The result of a method of the protocol."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._to.write(json.dumps(message).encode() + b"\0")
        self._to.flush()
        while True:
            answer = json.loads(b"".join(iter(lambda: self._from.read(1), b"\0")))
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def attach(self):
        """Opens the tab."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def size(self, width, height):
        """Sets the window."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def dark(self):
        """Prefers dark colors."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])

    def value(self, script):
        """What a script evaluates to."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, script, seconds=60):
        """Waits until a script evaluates to true."""
        end = time.monotonic() + seconds
        while not self.value(script):
            assert time.monotonic() < end, self.value("document.body.innerText")
            time.sleep(0.05)

    def screenshot(self, file):
        """Writes what is seen as PNG."""
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


@contextlib.contextmanager
def browse(url, profile):
    """A page at `url`; skips the test where there is no Chromium."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("needs Chromium")
    (read_end, to_browser), (from_browser, write_end) = os.pipe(), os.pipe()
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe",
               f"--user-data-dir={profile}"]
    process = subprocess.Popen(["bash", "-c", f"exec {shlex.join(command)} 3<&{read_end} 4>&{write_end}"],
                               pass_fds=(read_end, write_end), stderr=subprocess.DEVNULL)
    os.close(read_end)
    os.close(write_end)
    try:
        with os.fdopen(to_browser, "wb") as to, os.fdopen(from_browser, "rb") as back:
            page = Page(to, back)
            page.attach()
            page.call("Page.navigate", url=url)
            yield page
    finally:
        process.kill()
        process.wait()
