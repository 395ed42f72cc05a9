"""Training state on disk: OUT/checkpoints/step-N/, a Hugging Face directory plus optimizer.safetensors and state.json.

A checkpoint is renamed into place when it is whole, so a killed save leaves the one before. Nothing is pickled.
There is no random state to keep: the data order is a function of (seed, step) and no layer draws numbers.
"""

import json
import shutil
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
from minidpo.tokenizer_files import CHAT_TEMPLATE
from minidpo.weights import classification_tensors, save_model, save_reward_model

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
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
) -> Path:
    """Write OUT/checkpoints/step-N, then delete all but the `keep` newest. `identity`: see `resume`."""
    path = out / "checkpoints" / f"step-{step}"
    let_go(model)
    if rank():
        take_part(model.state_dict() | optimizer.state)
        return path
    with writing(path), replacing_directory(path) as directory:
        save_model(model, directory)
        copy_tokenizer(tokenizer_from, directory)
        write_tensors(directory, optimizer.state, "optimizer")
        state = {"step": step, "identity": identity}
        (directory / "state.json").write_text(json.dumps(state, indent=2) + "\n")
    _remove_old(out, step, keep)
    return path


def resume(out: Path, model: Transformer, optimizer: AdamW, identity: dict[str, Any], keep: int) -> int:
    """Load the newest whole checkpoint of `out` into model and optimizer; returns its step, 0 if there is none.

    keep: how many checkpoints may stay, for a kill can come between a save and the removal of those before it.
    identity: setting -> value, for everything that would silently make this another run. Raises UserError that
    names the first setting in which the checkpoint differs, where there are checkpoints but none is whole, and where
    processes found different ones: each would train on from its own.
    """
    step = _take_up(out, model, optimizer, identity)
    require_same(identity | {"the step of the last checkpoint": step})
    if rank() == 0:
        _remove_old(out, step, keep)
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
    """OUT/final: what transformers, or the next script, opens. template: what it was trained on, if not its own."""
    let_go(model)
    if rank():
        take_part(classification_tensors(model) if isinstance(model, RewardModel) else model.state_dict())
        return out / "final"
    with writing(out / "final"), replacing_directory(out / "final") as directory:
        if isinstance(model, RewardModel):
            save_reward_model(model, directory)
            copy_tokenizer(tokenizer_from, directory)
            _pad_as_the_config_says(directory)
        else:
            save_model(model, directory)
            copy_tokenizer(tokenizer_from, directory)
        if template is not None:
            (directory / CHAT_TEMPLATE).write_text(template, encoding="utf-8")
    return out / "final"


def copy_tokenizer(source: Path, target: Path) -> None:
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _pad_as_the_config_says(directory: Path) -> None:
    """Give the tokenizer files of a reward model the pad token of its config.json.

    transformers reads the score at the last token that is not the config's pad: a tokenizer that pads with
    another one (EOS, often) would have it read off the padding.
    """
    pad_id = json.loads((directory / "config.json").read_text())["pad_token_id"]
    vocabulary = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    pad = next((t["content"] for t in vocabulary.get("added_tokens", []) if t["id"] == pad_id), None)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if pad is not None and (directory / name).is_file():
            fields = json.loads((directory / name).read_text(encoding="utf-8")) | {"pad_token": pad}
            (directory / name).write_text(json.dumps(fields, indent=2, ensure_ascii=False), encoding="utf-8")


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


def _remove_old(out: Path, step: int, keep: int) -> None:
    """All but the `keep` newest up to `step`. Those of later steps are torn, or the run would have begun there."""
    for old in [p for p in _checkpoints(out) if _step(p) <= step][:-keep]:
        remove_directory(old)


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
    for name in sorted(was.keys() ^ identity.keys()):
        raise _AnotherRun(
            f"{path} is of another script, or another version of it: {name} is a setting of one of them alone; give the"
            " run another run.out"
        )
    for name in sorted(identity):
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
