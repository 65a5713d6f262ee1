from typing import Literal, TypedDict

class _Device(TypedDict):
    name: str
    description: str
    memory: int
    kind: Literal["cpu", "gpu", "igpu", "accel", "meta"]

class _BuildInfo(TypedDict):
    llama_cpp: str
    system: str
    gpu_offload: bool
    rpc: bool
    backends: list[str]
    devices: list[_Device]

def build_info() -> _BuildInfo: ...
def is_parked(ident: int) -> bool: ...
def serve_rpc(endpoint: str, n_threads: int) -> str: ...
