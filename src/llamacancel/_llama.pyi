from typing import TypedDict

class _Device(TypedDict):
    name: str
    description: str
    memory: int

class _BuildInfo(TypedDict):
    llama_cpp: str
    system: str
    gpu_offload: bool
    rpc: bool
    devices: list[_Device]

def build_info() -> _BuildInfo: ...
