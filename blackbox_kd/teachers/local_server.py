"""The server process of provider `local`: `python -m blackbox_kd.teachers.local_server '{"gguf": ...}'`.

A process of its own, because an abort in C++ takes its process along. It prints one JSON line once it is healthy
and ends when its standard input closes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time

import httpx
import xllamacpp


def main(options: dict[str, object]) -> None:
    """Serve until standard input closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which waits for what is in flight
    params = xllamacpp.CommonParams()
    params.model.path = str(options["gguf"])
    params.model_alias = {str(options["alias"])}
    params.hostnames = ["127.0.0.1"]
    params.port = int(str(options["port"]))
    params.n_parallel = int(str(options["slots"]))
    params.n_ctx = params.n_parallel * int(str(options["context_length"]))
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(str(options["threads"]))
    # llama.cpp draws from the 40 likeliest tokens, and of these from those above 5% of the likeliest, unless told not
    # to: then a text at temperature 1 is from another distribution than the logprobs beside it.
    params.sampling.top_k, params.sampling.top_p, params.sampling.min_p = 0, 1.0, 0.0
    server = xllamacpp.Server(params)
    url = str(server.listening_address).rstrip("/")
    while httpx.get(f"{url}/health", timeout=30, trust_env=False).status_code != 200:
        time.sleep(0.1)
    print(json.dumps({"url": url}), flush=True)
    sys.stdin.buffer.read()
    os._exit(0)  # the server's threads would keep the process alive


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
