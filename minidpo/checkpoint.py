"""Training state on disk: OUT/checkpoints/step-N/, a Hugging Face directory plus optimizer.safetensors and state.json.

A checkpoint is renamed into place when it is whole, so a killed save leaves the one before. Nothing is pickled.
There is no random state to keep: the data order is a function of (seed, step) and no layer draws numbers.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from minidpo.distributed import let_go, rank, require_same
from minidpo.errors import UserError, one_line
from minidpo.files import remove_directory, replacing_directory, writing
from minidpo.metrics import say
from minidpo.model import Transformer
from minidpo.optim import AdamW
from minidpo.reward import RewardModel
from minidpo.tensor_files import read_tensors, take_part, tensor_files, write_tensors
from minidpo.tokenizer_files import CHAT_TEMPLATE, CONFIG, SPECIAL_TOKENS
from minidpo.weights import classification_tensors, save_model, save_reward_model

TOKENIZER_FILES = (
    "tokenizer.json",
    CONFIG,
    SPECIAL_TOKENS,
    CHAT_TEMPLATE,
    "generation_config.json",
)


def save_checkpoint(
    out: Path,
    step: int,
    model: Transformer,
    optimizer: AdamW,
    identity: dict[str, Any],
    keep: int,
    tokenizer_from: Path,
    template: str | None,
) -> Path:
    """Write OUT/checkpoints/step-N, then delete all but the `keep` newest. `identity`: see `resume`; `template`: see
    `copy_tokenizer`."""
    path = out / "checkpoints" / f"step-{step}"
    let_go(model)
    if rank():
        take_part(model.state_dict() | optimizer.state)
        return path
    with writing(path), replacing_directory(path) as directory:
        save_model(model, directory)
        copy_tokenizer(tokenizer_from, directory, template)
        write_tensors(directory, optimizer.state, "optimizer")
        state = {"step": step, "identity": identity}
        (directory / "state.json").write_text(json.dumps(state, indent=2) + "\n")
    # Not those of later steps: they are torn, or this run would have begun there.
    for old in [p for p in _checkpoints(out) if _step(p) <= step][:-keep]:
        with writing(old):
            remove_directory(old)
    return path


def resume(out: Path, model: Transformer, optimizer: AdamW, identity: dict[str, Any], keep: int) -> int:
    """Load the newest whole checkpoint of `out` into model and optimizer; returns its step, 0 if there is none.

    keep: as many checkpoints stay; a kill between a save and the removal of the one before it has left one more.
    identity: setting -> value, for everything that would silently make this another run. Raises UserError that
    names the first setting in which the checkpoint differs, where there are checkpoints but none is whole, and where
    processes found different ones: each would train on from its own.
    """
    step = _take_up(out, model, optimizer, identity)
    require_same(identity | {"the step of the last checkpoint": step})
    whole = [path for path in _checkpoints(out) if _step(path) <= step]
    if rank() == 0 and len(whole) == keep + 1:
        with writing(whole[0]):
            remove_directory(whole[0])
    return step


def _take_up(out: Path, model: Transformer, optimizer: AdamW, identity: dict[str, Any]) -> int:
    checkpoints = _checkpoints(out)
    for path in reversed(checkpoints):
        try:
            _require_same_run(path, _read_identity(path), identity)
            weights = _read(path, "model", model.state_dict())
            state = _read(path, "optimizer", optimizer.like())
        except _AnotherRun:
            raise
        except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
            say(f"{path}: not a whole checkpoint ({one_line(error)}); it is passed over")
            continue
        model.load_state_dict(weights, strict=True)
        optimizer.state = state
        say(f"resuming from {path}")
        return _step(path)
    if checkpoints:
        raise UserError(f"{checkpoints[0].parent}: no checkpoint in it is whole; remove it to start anew")
    return 0


def save_final(out: Path, model: Transformer, tokenizer_from: Path, template: str | None) -> Path:
    """OUT/final: what transformers, or the next script, opens. `template`: see `copy_tokenizer`."""
    let_go(model)
    if rank():
        take_part(classification_tensors(model) if isinstance(model, RewardModel) else model.state_dict())
        return out / "final"
    with writing(out / "final"), replacing_directory(out / "final") as directory:
        if isinstance(model, RewardModel):
            save_reward_model(model, directory)
            copy_tokenizer(tokenizer_from, directory, template)
            _pad_as_the_config_says(directory)
        else:
            save_model(model, directory)
            copy_tokenizer(tokenizer_from, directory, template)
    return out / "final"


def copy_tokenizer(source: Path, target: Path, template: str | None) -> None:
    """The files beside the weights. template: what messages were written by, where that is not the model's own."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if template is not None:
        (target / CHAT_TEMPLATE).write_text(template, encoding="utf-8")
        if (target / CONFIG).is_file():  # some programs look there first
            _edit(target / CONFIG, lambda fields: fields.pop("chat_template", None))


def _pad_as_the_config_says(directory: Path) -> None:
    """Give the tokenizer files of a reward model the pad token of its config.json.

    transformers reads the score at the last token that is not the config's pad: a tokenizer that pads with
    another one (EOS, often) would have it read off the padding.
    """
    pad_id = json.loads((directory / "config.json").read_text())["pad_token_id"]
    vocabulary = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    pad = next((t["content"] for t in vocabulary.get("added_tokens", []) if t["id"] == pad_id), None)
    for name in (CONFIG, SPECIAL_TOKENS):
        if pad is not None and (directory / name).is_file():
            _edit(directory / name, lambda fields: fields.update(pad_token=pad))


def _edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    fields = json.loads(file.read_text(encoding="utf-8"))
    change(fields)
    file.write_text(json.dumps(fields, indent=2, ensure_ascii=False), encoding="utf-8")


def run_identity(config: dict[str, Any], fingerprints: dict[str, str]) -> dict[str, Any]:
    """The settings that make a run this run: the loss, the optimizer, the data, the model and the precision.

    Left out is what may change on the way: how long, where to, what is logged and how it is cut into micro-batches.
    """
    free = {"epochs", "max_steps", "micro_tokens"}
    settings = {f"loss.{k}": v for k, v in config["loss"].items()}
    settings |= {f"optim.{k}": v for k, v in config["optim"].items() if k not in free}
    settings |= {f"run.{k}": config["run"][k] for k in ("seed", "dtype")}
    return settings | fingerprints


def _checkpoints(out: Path) -> list[Path]:
    """Whole checkpoints, oldest first, unless something else has harmed them."""
    found = [p for p in (out / "checkpoints").glob("step-*") if p.name[5:].isdecimal()]
    return sorted(found, key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name[5:])


def _read_identity(path: Path) -> dict[str, Any]:
    state = json.loads((path / "state.json").read_text())
    if state["step"] != _step(path):
        raise ValueError(f"state.json is of step {state['step']!r}")
    return dict(state["identity"])


def _read(path: Path, stem: str, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of STEM.safetensors, which must be those expected, in their shapes and dtypes."""
    files = tensor_files(path, stem)
    for name in sorted(files.keys() ^ expected.keys()):
        raise ValueError(f"tensor {name!r} is {'missing' if name in expected else 'unknown'}")
    return read_tensors(files, expected)


class _AnotherRun(UserError):
    """A checkpoint of other settings."""


def _require_same_run(path: Path, was: dict[str, Any], identity: dict[str, Any]) -> None:
    for name in sorted(was.keys() & identity.keys()):
        if was[name] != identity[name]:
            if name in ("data", "model", "reference"):  # fingerprints, which say nothing to a reader
                raise _AnotherRun(
                    f"{path} was made with another {name}: its files, or settings that say how they are read, have changed"
                    " since; give the run another run.out, or the old files"
                )
            raise _AnotherRun(
                f"{path} was made with {name} = {was[name]!r}, now it is {identity[name]!r};"
                " give the run another run.out, or the old setting"
            )
    for name in sorted(was.keys() ^ identity.keys()):
        raise _AnotherRun(
            f"{path} is of another script, or another version of it: {name} is a setting of one of them alone; give the"
            " run another run.out"
        )
