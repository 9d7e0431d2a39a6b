"""The score cache: what safetensors reads is what was appended; damage is an error, not scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from cada_deploy.errors import RunFailed
from cada_deploy.score_cache import READ_ERRORS, ScoreFile, digest, read_scores, tensor_name


def scores(seed: int, shape: tuple[int, ...] = (3, 2, 4)) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(seed)).normal(0, 9, shape).astype(np.float16)


def written(path: Path, tensors: dict[int, np.ndarray], images: int) -> int:
    with ScoreFile(path, images) as file:
        for position, tensor in tensors.items():
            file.append(position, tensor)
        assert not path.exists(), "nothing stands under the final name before commit"
        return file.commit()


@given(
    st.dictionaries(
        st.integers(0, 9), st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9))
    )
)
def test_every_reader_finds_what_was_appended(
    tmp_path_factory: pytest.TempPathFactory, shapes: dict[int, tuple[int, int, int]]
) -> None:
    path = tmp_path_factory.mktemp("cache") / "000000.safetensors"
    tensors = {k: scores(k, shape) for k, shape in sorted(shapes.items())}
    size = written(path, tensors, 10)
    assert path.stat().st_size == size
    found = load_file(path)  # the library's own strict reader
    assert sorted(found) == [tensor_name(k) for k in sorted(tensors)]
    for k, tensor in tensors.items():
        assert read_scores(path, k).tobytes() == tensor.tobytes()
        assert read_scores(path, k).shape == tensor.shape
    assert list(path.parent.iterdir()) == [path]


def test_nan_and_infinities_keep_their_bits(tmp_path: Path) -> None:
    odd = np.array([[[np.nan, np.inf, -np.inf, -0.0, 6e-8]]], np.float16)
    written(tmp_path / "s", {0: odd}, 1)
    assert read_scores(tmp_path / "s", 0).tobytes() == odd.tobytes()


def test_a_strided_array_is_written_in_order(tmp_path: Path) -> None:
    turned = scores(1).transpose(2, 0, 1)
    written(tmp_path / "s", {0: turned}, 1)
    assert (read_scores(tmp_path / "s", 0) == turned).all()
    assert digest(turned) == digest(np.ascontiguousarray(turned))


def test_the_header_has_room_for_the_largest_shard(tmp_path: Path) -> None:
    """One million entries of the longest kind is too much to write; the arithmetic is not."""
    with ScoreFile(tmp_path / "s", 64) as file:
        for k in range(64):
            file._entries[tensor_name(999_936 + k)] = {
                "dtype": "F16",
                "shape": [255, 65535, 65535],
                "data_offsets": [2**63 - 2, 2**63 - 1],
            }
        file.commit()


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), ScoreFile(tmp_path / "s", 1) as file:
        file.append(0, scores(0))
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RunFailed, match="cannot write"):
        ScoreFile(tmp_path / "nowhere" / "s", 1)


def test_damage_is_never_taken_for_scores(tmp_path: Path) -> None:
    """Every single flipped bit is an error to the reader or another digest."""
    path = tmp_path / "s"
    tensor = scores(0)
    written(path, {0: tensor}, 1)
    whole, expected = path.read_bytes(), digest(tensor)
    silent = 0
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << (at % 8)
        path.write_bytes(bytes(damaged))
        try:
            found = read_scores(path, 0)
        except READ_ERRORS:
            continue
        silent += digest(found) == expected and found.shape == tensor.shape
    # Some bytes say nothing about the tensor: blanks behind the header may become other blanks.
    assert silent <= 2
    for cut in range(0, len(whole), 7):
        path.write_bytes(whole[:cut])
        with pytest.raises(READ_ERRORS):
            read_scores(path, 0)


def test_a_position_that_was_rejected_is_not_there(tmp_path: Path) -> None:
    written(tmp_path / "s", {1: scores(1)}, 2)
    with pytest.raises(READ_ERRORS):
        read_scores(tmp_path / "s", 0)
