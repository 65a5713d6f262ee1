"""xllamacpp's server, until the process is told to stop: model, port, slots, context of all slots, threads."""

import sys
import threading

import xllamacpp


def main(model, port, slots, n_ctx, threads):
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.hostnames = ["127.0.0.1"]
    params.port, params.n_parallel, params.n_ctx = int(port), int(slots), int(n_ctx)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(threads)
    params.cache_ram_mib = 0
    params.endpoint_slots = params.endpoint_metrics = True
    params.fit_params = False
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
