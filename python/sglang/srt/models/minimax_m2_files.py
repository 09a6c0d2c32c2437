"""Says which files of a checkpoint are missing or cut off, once its load has failed: safetensors does not."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from pathlib import Path

from huggingface_hub import snapshot_download

INDEX = "model.safetensors.index.json"
_PREFIX_BYTES = 8  # the length of the header, little-endian, in front of it


def folder_of(model_path: str, revision: str | None = None, cache: str | None = None) -> Path:
    """Where the files of a checkpoint are: ``model_path`` itself, or what was downloaded of that hub name.

    Args:
        cache: the hub's folder on this host, where it is not the usual one.
    """
    if not Path(model_path).is_dir():
        with contextlib.suppress(Exception):  # no hub name, or nothing of it is here
            return Path(snapshot_download(model_path, revision=revision, cache_dir=cache, local_files_only=True))
    return Path(model_path)


def damaged_files(folder: str | Path) -> list[str]:
    """One sentence for each file of the checkpoint in ``folder`` that is missing or not as long as it should be.

    Empty if all are there and whole, or if ``folder`` is none on this host. Reads headers, no tensor.
    """
    folder = Path(folder)
    return _missing_files(folder) + [
        f"{path.name} {fault}" for path in sorted(folder.glob("*.safetensors")) if (fault := _length_fault(path))
    ]


def _missing_files(folder: Path) -> list[str]:
    try:
        files = Counter(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    except FileNotFoundError:
        return []  # a checkpoint in one file has no index
    except (OSError, ValueError, KeyError, AttributeError) as error:
        return [f"{INDEX} cannot be read ({type(error).__name__}: {error})"]
    return [
        f"{file} does not exist, and {INDEX} names it for {count} tensors"
        for file, count in sorted(files.items())
        if not (folder / file).exists()
    ]


def _length_fault(path: Path) -> str | None:
    """What is wrong with the length of a safetensors file, told from its header."""
    size = path.stat().st_size
    with open(path, "rb") as stream:
        end_of_header = _PREFIX_BYTES + int.from_bytes(stream.read(_PREFIX_BYTES), "little")
        if size < max(_PREFIX_BYTES, end_of_header):
            return f"is cut off in its header: it has {size} bytes"
        try:
            header = json.loads(stream.read(end_of_header - _PREFIX_BYTES))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError):
            return "has no header that can be read: it is no safetensors file"
    described = end_of_header + max(ends, default=0)
    return f"has {size} bytes where its header describes {described}" if size != described else None
