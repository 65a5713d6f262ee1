import os
from typing import final

import numpy as np
from numpy.typing import NDArray

from ..cancel.token import CancelToken
from .context import Context

_Path = str | os.PathLike[str]
_Buffer = bytes | bytearray | memoryview | NDArray[np.uint8]

@final
class State:
    def __init__(self, context: Context) -> None: ...
    def save(self, seq_id: int = 0, token: CancelToken | None = None) -> bytes: ...
    def load(self, seq_id: int, data: _Buffer, token: CancelToken | None = None) -> None: ...
    def save_file(self, path: _Path, seq_id: int = 0, token: CancelToken | None = None) -> None: ...
    def load_file(self, path: _Path, seq_id: int = 0, token: CancelToken | None = None) -> None: ...
