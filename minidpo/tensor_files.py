"""Named tensors on disk: one safetensors file, or shards with an index as Hugging Face writes them.

Sharded tensors (several processes) are read a rank's own rows at a time and gathered one file at a time when
written, so that no process ever holds more of a large model than its share and one file.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minidpo.distributed import from_rows, own_rows, whole
from minidpo.errors import UserError
from minidpo.files import replacing_file

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MOST_BYTES = 5 * 10**9  # of one file


def tensor_files(directory: Path, stem: str = "model") -> dict[str, Path]:
    """Tensor name -> the file that holds it, of STEM.safetensors or of the shards in STEM.safetensors.index.json."""
    single, index_file = directory / f"{stem}.safetensors", directory / f"{stem}.safetensors.index.json"
    if single.is_file():
        with open_safetensors(single) as handle:
            return {name: single for name in handle.keys()}
    if not index_file.is_file():
        hint = "; .bin weights are pickles and are not read" if any(directory.glob("*.bin")) else ""
        raise UserError(f"{directory}: neither {single.name} nor {index_file.name} is there{hint}")
    try:
        index = json.loads(index_file.read_text(encoding="utf-8"))["weight_map"]
        files = {name: directory / file for name, file in index.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index_file}: not an index of shards ({error!r})") from None
    for file in set(files.values()):
        # By name, not resolved: in Hugging Face's download cache every file is a link to elsewhere.
        if file.parent != directory or not file.is_file():
            raise UserError(f"{index_file}: names {file.name!r}, which is not a file in {directory}")
    return files


def open_safetensors(file: Path):
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a safetensors file ({error})") from None


def read_tensors(
    files: Mapping[str, Path],
    wanted: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """The tensors named in `wanted`, sharded as they are, as `dtype` on `device`.

    dtype, device None: as in `wanted`, and the file must hold that dtype already. Raises UserError for a tensor
    that is not in its file, has another shape than wanted, or is not of floats.
    """
    tensors = {}
    for file in sorted({files[name] for name in wanted}):
        with open_safetensors(file) as handle:
            there = set(handle.keys())
            for name in (name for name in wanted if files[name] == file):
                if name not in there:
                    raise UserError(f"{file}: tensor {name!r} is not in it, though the index says so")
                like, stored = wanted[name], handle.get_slice(name)
                shape, kind = tuple(stored.get_shape()), stored.get_dtype()
                if shape != tuple(like.shape):
                    raise UserError(
                        f"{file}: tensor {name!r} has shape {shape}; config.json means {tuple(like.shape)}"
                    )
                if kind not in FLOATS:
                    raise UserError(
                        f"{file}: tensor {name!r} holds {kind}; {', '.join(FLOATS)} are read (not quantized weights)"
                    )
                if dtype is None and FLOATS[kind] != like.dtype:
                    raise UserError(f"{file}: tensor {name!r} holds {kind}; {like.dtype} was saved")
                rows = own_rows(like)
                read = handle.get_tensor(name) if rows is None else stored[rows]
                tensors[name] = from_rows(read.to(device or like.device, dtype or like.dtype), like)
    return tensors


def write_tensors(directory: Path, tensors: Mapping[str, Tensor], stem: str = "model") -> None:
    """Write STEM.safetensors, or shards of at most MOST_BYTES and their index. Every rank but 0 calls `take_part`."""
    names = _shards(tensors)
    files = [f"{stem}-{i:05}-of-{len(names):05}.safetensors" for i in range(1, len(names) + 1)]
    if len(names) == 1:
        files = [f"{stem}.safetensors"]
    for file, shard in zip(files, names, strict=True):
        members = {name: whole(tensors[name].detach()).contiguous().cpu() for name in shard}
        # "format" tells transformers that these are PyTorch's layouts.
        with replacing_file(directory / file) as path:
            save_file(members, path, metadata={"format": "pt"})
    if len(names) > 1:
        homes = {name: file for file, shard in zip(files, names, strict=True) for name in shard}
        index = {"metadata": {"total_size": sum(map(_bytes, tensors.values()))}, "weight_map": homes}
        (directory / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def take_part(tensors: Mapping[str, Tensor]) -> None:
    """What every rank but 0 does while rank 0 writes: hand over its shards, in the order in which they are asked for."""
    for tensor in tensors.values():
        whole(tensor.detach())


def _shards(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """Names by file, in order, each file full before the next begins."""
    shards: list[list[str]] = [[]]
    room = MOST_BYTES
    for name, tensor in tensors.items():
        if shards[-1] and _bytes(tensor) > room:
            shards.append([])
            room = MOST_BYTES
        shards[-1].append(name)
        room -= _bytes(tensor)
    return shards


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
