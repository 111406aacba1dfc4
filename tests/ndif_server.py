"""NDIF's own server code in a process that has no vtv_nnsight: `python ndif_server.py SOCKET`, with HF_HOME set.

As a runner's Python (`ndif_server.py -m MODULE …`) it hides the package there, too."""

import io
import json
import runpy
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Listener
from pathlib import Path

sys.modules["vtv_nnsight"] = None  # not installed here

import torch  # noqa: E402
from nnsight.modeling.transformers import TransformersModel  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402


def trusted(model, blob, compress):
    from ndif.common.schema.request import BackendRequestModel
    from ndif.services.ray.deployments.modeling.nns import block_scope, execute_traced_block, prepare_traced_block

    with block_scope():
        tracer, _ = prepare_traced_block(model, blob, compress, BackendRequestModel.deserialize)
        saved, buffer = execute_traced_block(tracer, torch.float32), io.BytesIO()
        torch.save(saved, buffer)
    return buffer.getvalue()


def sandboxed(model, blob, compress, sandbox):
    from ndif.services.ray.sandbox.driver import SandboxDriver

    connection = sandbox.connection()
    connection.send((blob, compress, "torch.float32", None, None))
    try:
        return SandboxDriver(model, torch.float32).pump(connection)[0]
    finally:
        connection.close()
        sandbox.stop()


def serve(path):
    from ndif.services.ray.sandbox.host import spawn

    models, python = {}, Path(f"{path}.python")
    python.write_text(f"#!{sys.executable}\n{Path(__file__).read_text()}")
    python.chmod(0o755)
    runners, runner = ThreadPoolExecutor(1), None
    with Listener(path, "AF_UNIX") as listener:
        while True:
            with listener.accept() as client:
                kind, key, blob, compress = client.recv()
                if kind == "stop":
                    return runner and runner.result().stop()
                try:
                    repo = json.loads(key.partition(":")[2])["repo_id"]
                    if repo not in models:
                        options = {"task": "text-generation", "tokenizer": AutoTokenizer.from_pretrained(repo)}
                        models[repo] = TransformersModel(repo, dispatch=True, **options)
                    if kind == "trusted":
                        client.send(trusted(models[repo], blob, compress))
                    else:
                        sandbox = (runner or runners.submit(spawn, str(python), timeout=120)).result()
                        runner = runners.submit(spawn, str(python), timeout=120)  # for the next job
                        client.send(sandboxed(models[repo], blob, compress, sandbox))
                except Exception:
                    client.send(traceback.format_exc())


if __name__ == "__main__":
    if sys.argv[1] == "-m":
        module, sys.argv = sys.argv[2], sys.argv[2:]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        serve(sys.argv[1])
