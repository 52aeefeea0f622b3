"""A llama.cpp server : `python llama_server.py GGUF PORT` prints its address and serves until it is killed."""

import subprocess
import sys
from contextlib import contextmanager


def serve(gguf: str, port: str) -> None:
    import signal

    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.port, params.n_ctx, params.n_parallel = gguf, int(port), 2048, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.warmup = False
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    signal.pause()


@contextmanager
def running(gguf, port=0):
    """Yields (process, base URL of its OpenAI API); port 0 is any free one."""
    command = [sys.executable, "-P", __file__, str(gguf), str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            yield process, f"{process.stdout.readline().strip()}/v1"
        finally:
            process.kill()


if __name__ == "__main__":
    serve(*sys.argv[1:])
