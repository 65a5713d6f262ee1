"""GGUF files: writing random weights as a stream, reading keys and shapes."""

from __future__ import annotations

import math
import mmap
import os
import struct
import uuid
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["QUANTS", "Array", "ModelWriter", "read_gguf"]

QUANTS = ("f32", "f16", "q8_0")

Array = NDArray[Any]
Make = Callable[[np.random.Generator], Array]


@dataclass(frozen=True)
class Tensor:
    """A tensor to be written: its bytes are made when its turn comes."""

    name: str
    shape: tuple[int, ...]
    quant: str
    make: Make

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        count = math.prod(self.shape)
        return count // 32 * 34 if self.quant == "q8_0" else count * (2 if self.quant == "f16" else 4)


class ModelWriter:
    """Collects keys and tensors of a model, with seeded random weights, then streams them to a GGUF file.

    Shapes are NumPy's: the last axis is the input of a matrix, which llama.cpp calls ne[0].
    """

    def __init__(self, arch: str, *, seed: int, quant: str, keys: dict[str, Any] | None = None) -> None:
        """Start a file of an architecture, with keys to begin with."""
        self.arch, self.seed, self.quant = arch, seed, quant
        self.keys: dict[str, Any] = dict(keys or {})
        self.tensors: list[Tensor] = []

    def describe(self, name: str, description: str) -> None:
        """Set the general keys."""
        self.key("general.name", name)
        self.key("general.description", description)
        self.key("general.file_type", {"f32": 0, "f16": 1, "q8_0": 7}[self.quant])
        self.key("general.quantization_version", 2)

    def key(self, name: str, value: object) -> None:
        """Set a key; integers are written as uint32."""
        self.keys[name] = value

    def param(self, name: str, value: object) -> None:
        """Set a key of the architecture."""
        self.key(f"{self.arch}.{name}", value)

    def matrix(self, name: str, n_in: int, n_out: int, *, gain: float = 1.0, lead: Sequence[int] = ()) -> None:
        """Add a matrix whose product with a vector of unit size has size `gain`; `lead` stacks several."""
        shape = (*lead, n_out, n_in)
        std = gain / math.sqrt(n_in)
        quant = "f32" if self.quant == "q8_0" and n_in % 32 else self.quant
        self.tensors.append(Tensor(name, shape, quant, lambda rng: _random(rng, shape, std, quant)))

    def vector(self, name: str, n: int, *, mean: float = 1.0, std: float = 0.1) -> None:
        """Add a vector in F32: a norm's weights, a bias."""
        self.exact(name, (n,), lambda rng: mean + std * rng.standard_normal(n, dtype=np.float32))

    def normal(self, name: str, shape: tuple[int, ...], *, gain: float) -> None:
        """Add a matrix in F32, for those that llama.cpp wants so."""
        std = gain / math.sqrt(shape[-1])
        self.exact(name, shape, lambda rng: std * rng.standard_normal(shape, dtype=np.float32))

    def exact(self, name: str, shape: tuple[int, ...], make: Make) -> None:
        """Add a tensor in F32 that a function makes."""
        self.tensors.append(Tensor(name, shape, "f32", lambda rng: make(rng).astype(np.float32)))

    def write(self, path: Path, progress: Callable[[float], object] | None = None) -> Path:
        """Write the file under a temporary name, then rename it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
        try:
            self._write(part, progress or (lambda fraction: None))
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
        return path

    def _write(self, path: Path, progress: Callable[[float], object]) -> None:
        gguf = _gguf()
        writer = gguf.GGUFWriter(os.fspath(path), self.arch)
        for name, value in self.keys.items():
            writer.add_key_value(name, value, _value_type(value))
        for tensor in self.tensors:
            kind = gguf.GGMLQuantizationType[tensor.quant.upper()]
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, kind)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            total, done = sum(tensor.nbytes for tensor in self.tensors), 0
            for tensor in self.tensors:
                rng = np.random.default_rng([self.seed, zlib.crc32(tensor.name.encode())])
                writer.write_tensor_data(tensor.make(rng))
                done += tensor.nbytes
                progress(done / total)
        finally:
            writer.close()


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Read the keys and the tensors' shapes (ne) of a GGUF file; strings stay bytes."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cursor = _Cursor(data)
        magic, _, n_tensors, n_keys = cursor.unpack("<4sIQQ")
        if magic != b"GGUF":
            raise ValueError(f"{path} is no GGUF file")
        keys = {cursor.text().decode(): cursor.value(cursor.number("I")) for _ in range(n_keys)}
        tensors = {}
        for _ in range(n_tensors):
            name = cursor.text().decode()
            tensors[name] = cursor.unpack(f"<{cursor.number('I')}Q")
            cursor.unpack("<IQ")  # type and offset
    return keys, tensors


class _Cursor:
    """Reads the parts of a GGUF file in turn."""

    _CODES = "BbHhIif?saQqd"  # struct's, by GGUF type; s and a are its strings and arrays

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def unpack(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from(layout, self.data, self.at)
        self.at += struct.calcsize(layout)
        return values

    def number(self, code: str) -> Any:
        return self.unpack(f"<{code}")[0]

    def text(self) -> bytes:
        size = self.number("Q")
        self.at += size
        return self.data[self.at - size : self.at]

    def value(self, kind: int) -> Any:
        code = self._CODES[kind]
        if code == "s":
            return self.text()
        if code != "a":
            return self.number(code)
        item, count = self.unpack("<IQ")
        if self._CODES[item] == "s":
            return [self.text() for _ in range(count)]
        return list(self.unpack(f"<{count}{self._CODES[item]}"))


def _value_type(value: object) -> Any:
    kinds = {list: "ARRAY", str: "STRING", bytes: "STRING", bool: "BOOL", float: "FLOAT32", int: "UINT32"}
    return _gguf().GGUFValueType[kinds[type(value)]]


def _random(rng: np.random.Generator, shape: tuple[int, ...], std: float, quant: str) -> Array:
    if quant == "q8_0":
        return _random_q8_0(rng, shape, std)
    values = rng.standard_normal(shape, dtype=np.float32)
    values *= std
    return values.astype(np.float16) if quant == "f16" else values


def _random_q8_0(rng: np.random.Generator, shape: tuple[int, ...], std: float) -> Array:
    """Draw the blocks themselves: an F16 scale and 32 int8 values, which are uniform, so their size is 127/sqrt(3)."""
    blocks = np.empty((math.prod(shape) // 32, 34), np.uint8)
    blocks[:, 2:] = np.frombuffer(rng.bytes(len(blocks) * 32), np.uint8).reshape(-1, 32)
    quants = blocks[:, 2:].view(np.int8)
    np.maximum(quants, -127, out=quants)
    scales = std * math.sqrt(3) / 127 * rng.uniform(0.8, 1.2, len(blocks))
    blocks[:, :2] = scales.astype("<f2").view(np.uint8).reshape(-1, 2)
    return blocks


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ImportError('making models needs the gguf package: pip install "llamacancel[models]"') from error
    return gguf
