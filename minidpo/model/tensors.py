"""Named tensors on disk: one safetensors file, or several with an index, as Hugging Face writes large models.

Tensors that are sharded over several processes are read whole, one at a time, of which each process keeps its
part; they are gathered one at a time when they are written.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minidpo.distributed import full_tensor, rank, shard_like
from minidpo.errors import UserError
from minidpo.files import ADAPTER, replacing_file, require_file

FLOATS = ("F64", "F32", "F16", "BF16")
MOST_BYTES = 5 * 10**9  # of one file


def tensor_files(directory: Path, stem: str = "model") -> dict[str, Path]:
    """Tensor name -> the file that holds it: STEM.safetensors, or what STEM.safetensors.index.json names."""
    single, index_file = directory / f"{stem}.safetensors", directory / f"{stem}.safetensors.index.json"
    if single.is_file():
        with _open(single) as handle:
            return dict.fromkeys(handle.keys(), single)
    if not index_file.is_file():
        hint = "; .bin weights are pickles and are not read" if any(directory.glob("*.bin")) else ""
        if any(directory.glob("adapter_model.*")):
            hint = f"; {ADAPTER}"
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


def read_tensors(
    directory: Path,
    expected: Mapping[str, Tensor],
    device: torch.device | str | None = None,
    stem: str = "model",
    finite: bool = False,
) -> Iterator[tuple[str, Tensor]]:
    """Names and values of the tensors in `expected`, cast and sharded as those are, on `device` or on theirs.

    Raises UserError for a tensor that is not there, has another shape than expected, does not hold floats, or
    holds nan or inf where only `finite` numbers will do.
    """
    files = tensor_files(directory, stem)
    if missing := sorted(expected.keys() - files.keys()):
        raise UserError(f"{directory}: no tensor {missing[0]!r} among its weights ({len(missing)} missing)")
    for file in sorted({files[name] for name in expected}):
        with _open(file) as handle:
            for name in (name for name in expected if files[name] == file):
                like, stored = expected[name], handle.get_slice(name)
                shape, kind = tuple(stored.get_shape()), stored.get_dtype()
                if shape != tuple(like.shape) or kind not in FLOATS:
                    needed = f"{tuple(like.shape)}, as config.json says, in {', '.join(FLOATS)}"
                    raise UserError(f"{file}: tensor {name!r} is {shape} in {kind}; {needed} is needed")
                tensor = handle.get_tensor(name).to(device or like.device, like.dtype)
                # The whole tensor, before it is sharded, so that all processes find the same without talking.
                if finite and not tensor.isfinite().all():
                    raise UserError(f"{file}: tensor {name!r} holds numbers that are not finite")
                yield name, shard_like(tensor, like)


def equal_tensors(files: Mapping[str, Path], names: tuple[str, str], dtype: torch.dtype) -> bool:
    """Whether two stored tensors have the same shape and the same values, read as `dtype`."""
    values = []
    for name in names:
        with _open(files[name]) as handle:
            values.append(handle.get_tensor(name).to(dtype))
    return torch.equal(*values)


def write_tensors(directory: Path, tensors: Mapping[str, Tensor], stem: str = "model") -> None:
    """Write STEM.safetensors, or several files of about MOST_BYTES and their index.

    All ranks call it with the same names, to gather sharded tensors together; rank 0 writes.
    """
    parts: dict[int, list[str]] = {}
    size = 0
    for name, tensor in tensors.items():
        parts.setdefault(size // MOST_BYTES, []).append(name)
        size += tensor.nbytes
    weight_map: dict[str, str] = {}  # tensor name -> file name
    for number, names in enumerate(parts.values(), start=1):
        suffix = f"-{number:05}-of-{len(parts):05}" if len(parts) > 1 else ""
        weight_map |= dict.fromkeys(names, file := f"{stem}{suffix}.safetensors")
        full = ((name, full_tensor(tensors[name].detach())) for name in names)
        content = {name: tensor.contiguous().cpu() for name, tensor in full if rank() == 0}
        if rank() == 0:
            directory.mkdir(parents=True, exist_ok=True)
            with replacing_file(directory / file) as path:
                # "format" tells transformers that the tensors are laid out as PyTorch has them.
                save_file(content, path, metadata={"format": "pt"})
    if rank() == 0 and len(parts) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (directory / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


@contextmanager
def _open(file: Path):
    require_file(file, "fetch it again")
    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a safetensors file, or not with all its tensors ({error})") from None
