"""Samples as JSON values and back, exactly: what JSON lacks (arrays, tuples, bytes, other keys) is tagged."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

from lockstep.errors import DataError
from lockstep.types import Sample

PLAIN = {type(None), bool, int, float, str}
TAGS = {"$ndarray", "$tuple", "$bytes", "$items"}


def sample_to_json(sample: Sample) -> dict[str, Any]:
    """A copy of the sample as JSON values.

    Raises:
        DataError: the sample holds a value that cannot be written, such as a tensor or an object of the user's.
    """
    values = vars(sample) | {"status": sample.status.value}
    return {name: _encode(value, f"sample.{name}") for name, value in values.items()}


def sample_from_json(values: dict[str, Any]) -> Sample:
    """The inverse of `sample_to_json`."""
    return Sample.from_dict({name: _decode(value) for name, value in values.items()})


def _encode(value: Any, where: str) -> Any:
    if type(value) in PLAIN:
        return value
    if isinstance(value, list | tuple):
        items = list(value) if set(map(type, value)) <= PLAIN else [_encode(item, f"{where}[]") for item in value]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, dict):
        if all(type(key) is str for key in value) and not TAGS & value.keys():
            return {key: _encode(item, f"{where}.{key}") for key, item in value.items()}
        return {"$items": [[_encode(key, where), _encode(item, f"{where}.{key}")] for key, item in value.items()]}
    if isinstance(value, np.ndarray | np.generic) and not value.dtype.hasobject:
        return {"$ndarray": [value.dtype.str, list(value.shape), base64.b64encode(value.tobytes()).decode()]}
    if isinstance(value, bytes):
        return {"$bytes": base64.b64encode(value).decode()}
    raise DataError(
        where,
        type(value).__name__,
        "a checkpoint cannot hold a value of this type.",
        "Keep numbers, strings, lists, dicts or NumPy arrays in samples.",
    )


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return value if set(map(type, value)) <= PLAIN else [_decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    match value:
        case {"$tuple": items}:
            return tuple(_decode(items))
        case {"$items": items}:
            return {_decode(key): _decode(item) for key, item in items}
        case {"$bytes": text}:
            return base64.b64decode(text)
        case {"$ndarray": [dtype, shape, text]}:
            array = np.frombuffer(base64.b64decode(text), dtype=dtype).reshape(shape).copy()
            return array if shape else array[()]
    return {key: _decode(item) for key, item in value.items()}
