"""Named tensors on disk: one safetensors file, or several with an index, as Hugging Face writes large models.

Tensors that are sharded over several processes are read whole, one at a time, of which each process keeps its
part; they are gathered, merged with their adapters and written one at a time.

Phi-3 stores the matrices of queries, keys and values as one tensor, and those of the MLP's gate and up as
another. Outside this file every matrix has a name of its own, under which its rows alone are read.
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
from minidpo.files import ADAPTER, replacing_file, require_file

NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
MOST_BYTES = 5 * 10**9  # of one file
# What is stored as one tensor, by rows from the first to the last.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
FUSED_INTO = {part: fused for fused, parts in FUSED.items() for part in parts}


def tensor_files(directory: Path, stem: str = "model") -> dict[str, Path]:
    """Tensor name -> the file that holds it: STEM.safetensors, or what STEM.safetensors.index.json names. A
    fused tensor is there under the names of its parts."""
    single, index_file = directory / f"{stem}.safetensors", directory / f"{stem}.safetensors.index.json"
    if single.is_file():
        with _open(single) as handle:
            return _split(dict.fromkeys(handle.keys(), single))
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
    return _split(files)


def _split(files: Mapping[str, Path]) -> dict[str, Path]:
    """Names and files of tensors, with the names of its parts for each fused one."""
    parts: dict[str, Path] = {}
    for name, file in files.items():
        if repeated := parts.keys() & set(_parts(name)):
            raise UserError(f"{file}: tensor {name!r} holds {min(repeated)!r}, which is there as well")
        parts |= dict.fromkeys(_parts(name), file)
    return parts


def _parts(name: str) -> list[str]:
    """The names of the parts of a fused tensor; of another tensor its own."""
    fused = next((piece for piece in name.split(".") if piece in FUSED), None)
    return [name.replace(fused, part) for part in FUSED[fused]] if fused else [name]


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
            stored_as = {part: name for name in handle.keys() for part in _parts(name)}
            for name in (name for name in expected if files[name] == file):
                like, whole = expected[name], stored_as.get(name, name)
                stored = handle.get_slice(whole)
                shape, kind = tuple(stored.get_shape()), stored.get_dtype()
                first, shape_needed = 0, tuple(like.shape)
                if whole != name:
                    # The rows of this part come after those of the parts before it.
                    sizes = [len(expected[part]) for part in _parts(whole)]
                    first = sum(sizes[: _parts(whole).index(name)])
                    shape_needed = (sum(sizes), *like.shape[1:])
                if shape != shape_needed or kind not in NAMES.values():
                    needed = f"{shape_needed}, as config.json says, in {', '.join(NAMES.values())}"
                    raise UserError(f"{file}: tensor {whole!r} is {shape} in {kind}; {needed} is needed")
                values = handle.get_tensor(name) if whole == name else stored[first : first + len(like)]
                tensor = values.to(device or like.device, like.dtype)
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


def equal_tensors(files: Mapping[str, Path], names: tuple[str, str], dtype: torch.dtype) -> bool:
    """Whether two stored tensors have the same shape and the same values, read as `dtype`."""
    values = []
    for name in names:
        with _open(files[name]) as handle:
            values.append(handle.get_tensor(name).to(dtype))
    return torch.equal(*values)


def write_tensors(
    directory: Path,
    tensors: Mapping[str, Tensor],
    stem: str = "model",
    dtype: torch.dtype | None = None,
    change: Callable[[str, Tensor], Tensor] = lambda name, full: full,
    about: Mapping[str, str] = {},
    fused: bool = False,
) -> None:
    """Write STEM.safetensors, or several files of about MOST_BYTES and their index.

    All ranks call it with the same names, to gather sharded tensors together; rank 0 writes. dtype: of what
    is written (default: as it is). change: what becomes of each whole tensor, one at a time. about: what else
    the header says. fused: whether the parts of FUSED are written as one tensor.
    """

    def whole_tensor(name: str) -> Tensor:
        parts = [change(part, full_tensor(tensors[part].detach())) for part in stored[name]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    stored: dict[str, list[str]] = {}  # the name on disk -> the tensors that it consists of, in their order
    for name in tensors:
        whole = ".".join(FUSED_INTO.get(piece, piece) for piece in name.split(".")) if fused else name
        stored.setdefault(whole, []).append(name)
    files: dict[int, list[str]] = {}
    size = 0
    for whole, parts in stored.items():
        files.setdefault(size // MOST_BYTES, []).append(whole)
        size += sum(tensors[name].numel() * (dtype or tensors[name].dtype).itemsize for name in parts)
    weight_map: dict[str, str] = {}  # tensor name -> file name
    for number, names in enumerate(files.values(), start=1):
        suffix = f"-{number:05}-of-{len(files):05}" if len(files) > 1 else ""
        weight_map |= dict.fromkeys(names, file := f"{stem}{suffix}.safetensors")
        full = map(whole_tensor, names)
        if rank() > 0:
            for _ in full:  # Other ranks only hand over their shards.
                pass
            continue
        directory.mkdir(parents=True, exist_ok=True)
        kinds = {}
        for name in names:
            first, *others = [tensors[part] for part in stored[name]]
            rows = [len(first) + sum(map(len, others))] if others else []
            shape = torch.Size([*rows, *first.shape[len(rows) :]])
            kinds[name] = (dtype or first.dtype, shape)
        with replacing_file(directory / file) as path, path.open("wb") as stream:
            # "format" tells transformers that the tensors are laid out as PyTorch has them.
            stream.write(_header(kinds, {"format": "pt", **about}))
            for tensor, (kind, _) in zip(full, kinds.values(), strict=True):
                stream.write(tensor.to("cpu", kind).contiguous().reshape(-1).view(torch.uint8).numpy().data)
    if rank() == 0 and len(files) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (directory / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _header(kinds: Mapping[str, tuple[torch.dtype, torch.Size]], about: Mapping[str, str]) -> bytes:
    """What a safetensors file begins with, before the numbers of its tensors in this order. The library's own
    save_file would need all of them in memory at once."""
    fields: dict[str, object] = {"__metadata__": about}
    start = 0
    for name, (dtype, shape) in kinds.items():
        end = start + shape.numel() * dtype.itemsize
        fields[name] = {"dtype": NAMES[dtype], "shape": [*shape], "data_offsets": [start, end]}
        start = end
    text = json.dumps(fields).encode()
    text += b" " * (-len(text) % 8)  # The numbers begin at a multiple of 8.
    return len(text).to_bytes(8, "little") + text


@contextmanager
def _open(file: Path):
    require_file(file, "fetch it again")
    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a safetensors file, or not with all its tensors ({error})") from None
