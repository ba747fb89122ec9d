"""A server of the Open Inference Protocol (V2) that runs an artifact, for tests of clients."""

import contextlib
import http.server
import json
import threading

import numpy as np

DATATYPES = {"float32": "FP32", "uint8": "UINT8"}


@contextlib.contextmanager
def served(name, run, tensor, outputs, text=False, error=None, hang_up=False):
    """The address of a server.

    Args:
        name: of the model.
        run: a batch to a list of arrays.
        tensor, outputs: the input and the outputs as a sidecar has them.
        text: whether arrays are sent as JSON text, as servers without binary tensors do.
        error: a status and a message in place of answers.
        hang_up: whether the connection is closed in the middle of an answer.
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *words):
            pass

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if error:
                return self.reply(error[0], json.dumps({"error": error[1]}).encode())
            assert self.path == f"/v2/models/{name}/infer"
            length = int(self.headers["Inference-Header-Content-Length"])
            (described,) = json.loads(body[:length])["inputs"]
            assert described["name"] == tensor.name
            assert described["parameters"]["binary_data_size"] == len(body) - length
            assert described["datatype"] == DATATYPES[tensor.dtype]
            arrays = run(np.frombuffer(body[length:], tensor.dtype).reshape(described["shape"]))
            answers = [
                {"name": one.name, "datatype": DATATYPES[array.dtype.name], "shape": array.shape}
                | ({"data": array.ravel().tolist()} if text else {"parameters": {"binary_data_size": array.nbytes}})
                for one, array in zip(outputs, arrays, strict=True)
            ]
            head = json.dumps({"model_name": name, "outputs": answers}).encode()
            if text:
                return self.reply(200, head)
            content = head + b"".join(array.tobytes() for array in arrays)
            return self.reply(200, content[: len(content) // 2] if hang_up else content, len(head), len(content))

        def reply(self, status, content, head=None, length=None):
            self.send_response(status)
            self.send_header("Content-Length", str(length or len(content)))
            if head is not None:
                self.send_header("Inference-Header-Content-Length", str(head))
            self.end_headers()
            self.wfile.write(content)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
