"""Named tensors on disk, in safetensors files.

Tensors that are sharded over several processes are read whole, one at a time, of which each process keeps its
part; they are gathered, merged with their adapters and written one at a time.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minidpo.distributed import full_tensor, rank, shard_like
from minidpo.errors import UserError
from minidpo.files import ADAPTER, read_object, replacing_file, require_file

NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def tensor_files(directory: Path, stem: str = "model") -> dict[str, Path]:
    """Tensor name -> the file that holds it: STEM.safetensors, or what STEM.safetensors.index.json names, as
    Hugging Face has it for large models."""
    single, index_file = directory / f"{stem}.safetensors", directory / f"{stem}.safetensors.index.json"
    if single.is_file():
        with _open(single) as handle:
            return dict.fromkeys(handle.keys(), single)
    if not index_file.is_file():
        hint = "; .bin weights are pickles and are not read" if any(directory.glob("*.bin")) else ""
        if any(directory.glob("adapter_model.*")):
            hint = f"; {ADAPTER}"
        raise UserError(f"{directory}: neither {single.name} nor {index_file.name} is there{hint}")
    names = read_object(index_file).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
        raise UserError(
            f"{index_file}: not an index of shards: it has no weight_map of names; fetch it again"
        )
    files = {name: directory / file for name, file in names.items()}
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

    Raises UserError for a tensor that is missing, has another shape or no floats, or nan or inf although it
    must be `finite`.
    """
    files = tensor_files(directory, stem)
    if missing := sorted(expected.keys() - files.keys()):
        raise UserError(f"{directory}: no tensor {missing[0]!r} among its weights ({len(missing)} missing)")
    for file in sorted({files[name] for name in expected}):
        with _open(file) as handle:
            for name in (name for name in expected if files[name] == file):
                like, stored = expected[name], handle.get_slice(name)
                shape, kind = tuple(stored.get_shape()), stored.get_dtype()
                if shape != like.shape or kind not in NAMES.values():
                    needed = f"{tuple(like.shape)}, as config.json says, in {', '.join(NAMES.values())}"
                    raise UserError(f"{file}: tensor {name!r} is {shape} in {kind}; {needed} is needed")
                tensor = handle.get_tensor(name).to(device or like.device, like.dtype)
                # The whole tensor, before it is sharded, so that all processes find the same without talking.
                if finite and not tensor.isfinite().all():
                    raise UserError(f"{file}: tensor {name!r} holds numbers that are not finite")
                yield name, shard_like(tensor, like)


def count_parameters(directory: Path) -> int:
    """How many numbers the tensors of a model directory hold together."""
    count = 0
    for file in set(tensor_files(directory).values()):
        with _open(file) as handle:
            count += sum(math.prod(handle.get_slice(name).get_shape()) for name in handle.keys())
    return count


def read_about(file: Path) -> dict[str, str]:
    """What the header of a file says besides names and shapes."""
    with _open(file) as handle:
        return handle.metadata() or {}


def write_tensors(
    directory: Path,
    tensors: Mapping[str, Tensor],
    stem: str = "model",
    dtype: torch.dtype | None = None,
    change: Callable[[str, Tensor], Tensor] = lambda name, full: full,
    about: Mapping[str, str] = {},
) -> None:
    """Write STEM.safetensors. All ranks call it, to gather sharded tensors together; rank 0 writes.

    dtype: of what is written (default: as it is). change: what becomes of each whole tensor, of its shape.
    about: what else the header says.
    """
    # The tensors are written one by one. The library's save_file would need all of them in memory at once.
    full = (change(name, full_tensor(tensor.detach())) for name, tensor in tensors.items())
    if rank() > 0:
        for _ in full:  # Other ranks only hand over their shards.
            pass
        return
    # "format" tells transformers that the tensors are laid out as PyTorch has them.
    fields: dict[str, object] = {"__metadata__": {"format": "pt", **about}}
    end = 0
    for name, tensor in tensors.items():
        kind = dtype or tensor.dtype
        start, end = end, end + tensor.numel() * kind.itemsize
        fields[name] = {"dtype": NAMES[kind], "shape": [*tensor.shape], "data_offsets": [start, end]}
    header = json.dumps(fields).encode()
    header += b" " * (-len(header) % 8)  # The numbers begin at a multiple of 8.
    directory.mkdir(parents=True, exist_ok=True)
    with replacing_file(directory / f"{stem}.safetensors") as path, path.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        for tensor, like in zip(full, tensors.values(), strict=True):
            values = tensor.to("cpu", dtype or like.dtype).contiguous()
            stream.write(values.reshape(-1).view(torch.uint8).numpy().data)


@contextmanager
def _open(file: Path):
    require_file(file, "fetch it again")
    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a safetensors file, or not with all its tensors ({error})") from None
