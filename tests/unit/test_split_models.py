"""A model in several files: all of them are looked at before llama.cpp reads them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import llamacancel as lc
from tests.conftest import batch_of, prompt
from tests.laws.clock import FAR, deadline_at
from tests.unit.test_damaged_files import I32, U16, Gguf, Tensor

ModelPath = Callable[[str], Path]
F16 = 1  # a tensor type


def split(path: Path, folder: Path) -> tuple[list[Path], list[Gguf]]:
    """Writes the model in three parts."""
    whole = Gguf.read(path)
    n, third = len(whole.tensors), len(whole.tensors) // 3
    parts = []
    for number, tensors in enumerate((whole.tensors[:third], whole.tensors[third:-third], whole.tensors[-third:])):
        keys = whole.keys if number == 0 else {}
        keys = {**keys, "split.no": (U16, number), "split.count": (U16, 3), "split.tensors.count": (I32, n)}
        parts.append(replace(whole, keys=keys, tensors=tensors))
    paths = [folder / f"model-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    for file, part in zip(paths, parts, strict=True):
        file.write_bytes(part.to_bytes())
    return paths, parts


def logits(path: Path) -> bytes:
    with lc.Model.load(path) as model, model.context(n_ctx=64, n_threads=1) as context:
        context.decode(batch_of(prompt(model, 10)))
        return np.asarray(context.logits()).tobytes()


def test_a_model_in_parts_computes_as_the_whole_one(model_path: ModelPath, tmp_path: Path) -> None:
    paths, _ = split(model_path("llama"), tmp_path)
    assert logits(paths[0]) == logits(model_path("llama"))


def test_a_part_without_the_others_is_refused(model_path: ModelPath, tmp_path: Path) -> None:
    paths, parts = split(model_path("llama"), tmp_path)
    with pytest.raises(lc.ModelLoadError, match="part 2 of 3 of a model: load the first one"):
        lc.Model.load(paths[1])
    (tmp_path / "alone.gguf").write_bytes(parts[0].to_bytes())
    with pytest.raises(lc.ModelLoadError, match="first of 3 parts of a model, whose name does not say so"):
        lc.Model.load(tmp_path / "alone.gguf")
    paths[2].unlink()
    with pytest.raises(lc.ModelLoadError, match=f"part 3 of 3, {paths[2]}: No such file"):
        lc.Model.load(paths[0])


def test_what_is_wrong_with_a_later_part_is_told(model_path: ModelPath, tmp_path: Path) -> None:
    paths, parts = split(model_path("llama"), tmp_path)
    paths[1].write_bytes(parts[1].to_bytes()[:-100])
    with pytest.raises(lc.ModelLoadError, match=f"part 2 of 3, {paths[1]}: the file is truncated"):
        lc.Model.load(paths[0])

    def halved(tensor: Tensor) -> Tensor:
        return replace(tensor, kind=F16, data=tensor.data[: len(tensor.data) // 2])

    norm = next(tensor.name for tensor in parts[1].tensors if tensor.name.endswith(b"norm.weight"))
    paths[1].write_bytes(parts[1].with_tensor(norm, halved).to_bytes())
    with pytest.raises(lc.ModelLoadError, match=r"part 2 of 3, .*has one dimension and type f16"):
        lc.Model.load(paths[0])


@pytest.mark.parametrize("look", range(1, 40, 3))
def test_a_load_in_parts_is_cancelled_at_any_look(look: int, model_path: ModelPath, tmp_path: Path) -> None:
    paths, _ = split(model_path("llama"), tmp_path)
    token = lc.CancelToken(timeout=FAR)
    with deadline_at(look), pytest.raises(lc.LoadDeadlineExceeded):
        lc.Model.load(paths[0], token=token)
