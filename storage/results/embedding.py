"""One vector that stands for an image: the result of embed jobs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from storage.results import Summary

DTYPES = ("float32", "float16")

# Raw bytes: they keep every bit, and are written and read several times faster than lists of numbers. What they mean
# is said beside them, so that a reader needs nothing else: numpy.frombuffer(vector, dtype).
SCHEMA = pa.schema(
    [
        pa.field("vector", pa.binary()),
        pa.field("dim", pa.int32()),
        pa.field("dtype", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True, eq=False)
class Result:
    """One image's embedding.

    Attributes:
        vector: (d,) float32 or float16, finite; d is the same for all images of a recipe.
    """

    vector: npt.NDArray[Any]

    def __post_init__(self) -> None:
        if self.vector.ndim != 1 or self.vector.dtype.name not in DTYPES:
            shape, dtype = self.vector.shape, self.vector.dtype
            raise ValueError(f"expected a vector of shape (d,) in {' or '.join(DTYPES)}, but got {shape} in {dtype}")
        if not np.isfinite(self.vector).all():
            raise ValueError("expected a finite vector, but got NaN or infinity")


def columns(results: Sequence[Result | None]) -> dict[str, pa.Array]:
    """The vectors as little-endian bytes, with their length and type; a None (failed item) is a null in each column."""
    return {
        "vector": pa.array([None if r is None else _bytes(r.vector) for r in results], pa.binary()),
        "dim": pa.array([None if r is None else len(r.vector) for r in results], pa.int32()),
        "dtype": pa.array([None if r is None else r.vector.dtype.name for r in results], pa.string()),
    }


def _bytes(vector: npt.NDArray[Any]) -> bytes:
    return vector.astype(vector.dtype.newbyteorder("<"), copy=False).tobytes()


def results(table: pa.Table) -> list[Result | None]:
    """The inverse of `columns`."""
    raw, dtypes = table.column("vector").to_pylist(), table.column("dtype").to_pylist()
    return [None if r is None else Result(_vector(r, dtype)) for r, dtype in zip(raw, dtypes, strict=True)]


def _vector(raw: bytes, dtype: str) -> npt.NDArray[Any]:
    return np.frombuffer(raw, np.dtype(dtype).newbyteorder("<")).astype(dtype, copy=False)


def matrix(table: pa.Table) -> npt.NDArray[Any]:
    """All vectors of a table at once: (rows, d), without a copy where the rows are together in memory.

    Args:
        table: of this kind's columns, without nulls.

    Raises:
        ValueError: the vectors differ in length or type, or a row is null.
    """
    if not table.num_rows:
        return np.zeros((0, 0), np.float32)
    dims, dtypes = (pc.unique(table.column(name)).to_pylist() for name in ("dim", "dtype"))
    if len(dims) > 1 or len(dtypes) > 1 or dims[0] is None:
        raise ValueError(f"expected vectors of one length and type, but got lengths {dims} in {dtypes}")
    parts = [_rows(chunk, dims[0], np.dtype(dtypes[0])) for chunk in table.column("vector").chunks]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _rows(chunk: pa.Array, dim: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    _, offsets, data = chunk.buffers()
    ends = np.frombuffer(offsets, np.int32, len(chunk) + 1, chunk.offset * 4)
    flat = np.frombuffer(data, np.uint8)[ends[0] : ends[-1]] if dim else np.zeros(0, np.uint8)
    return flat.view(dtype.newbyteorder("<")).astype(dtype, copy=False).reshape(len(chunk), dim)


def summary(result: Result) -> Summary:
    """One embedding, which has neither a label nor a score."""
    return Summary(1)


_SAME_COSINE = 0.999  # of two vectors that would be taken for the same image's


def agreement(expected: Result, found: Result, least: float = 0.0) -> float | None:
    """1 for vectors of a cosine of 0.999 or more, else 0; None for two of zeros."""
    one, other = (result.vector.astype(np.float64) for result in (expected, found))
    if one.shape != other.shape:
        return 0.0
    length = float(np.linalg.norm(one) * np.linalg.norm(other))
    if not length:
        return None if not one.any() and not other.any() else 0.0
    return float(one @ other / length >= _SAME_COSINE)
