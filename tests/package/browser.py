"""A page in headless Chromium, driven over its pipe by the DevTools protocol: nothing to install beside Chromium."""

import base64
import contextlib
import json
import os
import select
import subprocess
import time

# Containers often have 64 MB of shared memory, in which a page crashes: it uses files instead.
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
    "--remote-debugging-pipe",
)  # fmt: skip
# WebGPU that is computed on the CPU.
WEBGPU = (
    *(flag for flag in FLAGS if flag != "--disable-gpu"),
    "--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan",
)  # fmt: skip
ANSWER_S = 120  # a page that crashed never answers


class Page:
    """A page, and the events that it has reported."""

    def __init__(self, reading, writing):
        self.reading, self.writing = reading, writing
        self.number, self.rest, self.session, self.events = 0, b"", {}, []

    def send(self, method, **parameters):
        self.number += 1
        command = {"id": self.number, "method": method, "params": parameters, **self.session}
        os.write(self.writing, json.dumps(command).encode() + b"\0")
        while (answer := self._message()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, f"{method}: {answer}"
        return answer["result"]

    def _message(self):
        while b"\0" not in self.rest:
            assert select.select([self.reading], [], [], ANSWER_S)[0], f"Chromium has not answered for {ANSWER_S} s"
            part = os.read(self.reading, 1 << 20)
            assert part, "Chromium has ended"
            self.rest += part
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def value(self, expression):
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, expression, seconds=60):
        end = time.monotonic() + seconds
        while not (value := self.value(expression)):
            assert time.monotonic() < end, f"{expression}: not in {seconds} s\n{self.value('document.body.innerText')}"
            time.sleep(0.02)
        return value

    def open(self, address):
        """Open a page and wait until its model is loaded; the seconds."""
        start = time.monotonic()
        self.send("Page.navigate", url=address)
        assert self.until("document.body && document.body.dataset.ready") == "yes", self.text("status")
        return time.monotonic() - start

    def text(self, part):
        return self.value(f"document.getElementById({part!r}).innerText")

    def choose(self, file):
        """Choose a file as with a click on the page; waits for the answer."""
        before = int(self.value("document.body.dataset.answers") or 0)
        document = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=document, selector="#file")["nodeId"]
        self.send("DOM.setFileInputFiles", nodeId=node, files=[str(file)])
        self.until(f"document.body.dataset.answers === '{before + 1}'")

    def rows(self):
        """The labels and percentages of the answer."""
        words = self.value("[...document.querySelectorAll('#answer span')].map((one) => one.innerText)")
        return list(zip(words[::2], words[1::2], strict=True))

    def screenshot(self):
        return base64.b64decode(self.send("Page.captureScreenshot")["data"])

    def addresses(self):
        """Every address that was asked for."""
        self.value("0")  # reads the events that have come meanwhile
        sent = [one["params"] for one in self.events if one.get("method") == "Network.requestWillBeSent"]
        return {one["request"]["url"] for one in sent}

    def complaints(self):
        """What the page and its browser complain of."""
        self.value("0")
        logged = [one["params"]["entry"] for one in self.events if one.get("method") == "Log.entryAdded"]
        thrown = [one["params"] for one in self.events if one.get("method") == "Runtime.exceptionThrown"]
        return [one for one in logged if one["text"] != "No available adapters."] + thrown


@contextlib.contextmanager
def page(profile, flags=FLAGS, width=1100, height=760):
    """A page of a Chromium whose profile is a new folder."""
    reading, to_browser = os.pipe()
    from_browser, writing = os.pipe()
    words = ["chromium", *flags, f"--user-data-dir={profile}", f"--window-size={width},{height}", "about:blank"]
    process = subprocess.Popen(
        ["bash", "-c", f'exec "$0" "$@" 3<&{reading} 4>&{writing}', *words],
        pass_fds=(reading, writing), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(reading)
    os.close(writing)
    try:
        opened = Page(from_browser, to_browser)
        target = next(one for one in opened.send("Target.getTargets")["targetInfos"] if one["type"] == "page")
        answer = opened.send("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        opened.session = {"sessionId": answer["sessionId"]}
        for domain in ("Page", "Runtime", "Network", "Log"):
            opened.send(f"{domain}.enable")
        yield opened
    finally:
        process.kill()  # a browser that hangs does not end on SIGTERM
        process.wait()
        os.close(from_browser)
        os.close(to_browser)
