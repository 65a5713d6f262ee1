"""cyllama's server, until the process is told to stop: model, port, slots, context of a slot, threads.

Its own command line would start the same, but has no option for the threads.
"""

import sys
import threading

from cyllama.llama.server import ServerConfig

try:
    from cyllama.llama.server import EmbeddedServer as Server
except ImportError:
    from cyllama.llama.server import PythonServer as Server


def main(model, port, slots, n_ctx, threads):
    server = Server(
        ServerConfig(
            model_path=model,
            port=int(port),
            n_parallel=int(slots),
            n_ctx=int(n_ctx),
            n_threads=int(threads),
            n_gpu_layers=0,
        )
    )
    if not server.start():
        sys.exit("it did not start")
    print(type(server).__name__, flush=True)
    wait = getattr(server, "wait_for_shutdown", threading.Event().wait)
    wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
