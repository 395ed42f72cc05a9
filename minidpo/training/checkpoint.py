"""Training state on disk: OUT/checkpoints/step-N/, a model directory, optimizer.safetensors and state.json.
With adapters it is the directory of an adapter, whose frozen base is known by its fingerprint.

A checkpoint is renamed into place when it is complete, so a killed save leaves the one before. Nothing is
pickled. There is no random state to keep: the data order is a function of (seed, step) and no layer draws
random numbers.
"""

import json
import re
import shutil
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.optim import AdamW

from minidpo.data.tokenizer_files import (
    ADDED_TOKENS,
    CHAT_TEMPLATE,
    CONFIG,
    GENERATION,
    MORE_TEMPLATES,
    SPECIAL_TOKENS,
    find_template,
)
from minidpo.distributed import rank, require_same
from minidpo.errors import UserError, one_line
from minidpo.files import read_object, remove_directory, replacing_directory, writing
from minidpo.log import print0
from minidpo.model import RewardModel, Transformer, save_model, save_reward_model
from minidpo.model.adapter_files import STEM, adapter_tensors, save_adapter
from minidpo.model.tensors import read_tensors, write_tensors
from minidpo.sections import LoRASection
from minidpo.training.optim import load_optimizer_tensors, optimizer_tensors
from minidpo.training.special_tokens import align_special_tokens, edit_field

TOKENIZER_FILES = ("tokenizer.json", CONFIG, SPECIAL_TOKENS, ADDED_TOKENS, CHAT_TEMPLATE, GENERATION)


def run_identity(config: dict[str, Any], fingerprints: dict[str, str]) -> dict[str, Any]:
    """The settings that make a run this run: the loss, the optimizer, the data, the model and the precision.

    Its length, its directory, what is logged and how batches are cut are left out: they may change.
    """
    free = {"epochs", "max_steps", "micro_tokens"}
    settings = {f"loss.{k}": v for k, v in config["loss"].items()}
    settings |= {f"optim.{k}": v for k, v in config["optim"].items() if k not in free}
    if config["lora"]["rank"]:
        settings |= {f"lora.{k}": v for k, v in config["lora"].items() if k != "final_dtype"}
    return settings | {f"run.{k}": config["run"][k] for k in ("seed", "dtype")} | fingerprints


def tokenizer_files(directory: Path) -> dict[str, bytes]:
    """The tokenizer and generation files of a model directory, by name. They are read once, at the start.

    A link is followed, because model caches are made of links. Raises UserError for content that is not what
    the name says: it would be copied to a place from which models are published.
    """
    files = {}
    more = (f"{MORE_TEMPLATES}/{file.name}" for file in (directory / MORE_TEMPLATES).glob("*.jinja"))
    for name in (*TOKENIZER_FILES, *more):
        file = directory / name
        if not file.is_file():
            continue
        template = "default" if name == CHAT_TEMPLATE else file.stem
        if file.suffix == ".json":
            read_object(file)
        elif not re.search("{[{%]", find_template(directory, template) or ""):
            raise UserError(f"{file}: not a jinja template, it has no {{{{ and no {{%; fetch it again")
        files[name] = file.read_bytes().removeprefix(BOM_UTF8)  # transformers reads no JSON that has one.
    return files


@dataclass(frozen=True)
class Checkpoints:
    """The model directories that a run writes: OUT/checkpoints/step-N and OUT/final. All ranks call it."""

    out: Path
    identity: dict[str, Any]  # setting -> value of everything that would silently make this another run
    keep: int  # how many checkpoints stay, the newest ones
    files: dict[str, bytes]  # the `tokenizer_files` of the model that the run started from
    template: str | None  # the chat template, where it is not among `files`
    on_messages: bool = True  # whether a chat template wrote any of the pairs to train on
    lora: LoRASection = field(default_factory=LoRASection)
    base: str = ""  # the directory of the weights that adapters leave frozen

    def save(self, step: int, model: Transformer, optimizer: AdamW) -> Path:
        """Write OUT/checkpoints/step-N, then delete the oldest ones."""
        path = self.out / "checkpoints" / f"step-{step}"
        save = self._save_adapter if self.lora.rank else save_model
        with self._model_directory(path, save, model) as directory:
            write_tensors(directory, optimizer_tensors(model, optimizer), "optimizer")
            if rank() == 0:
                state = {"step": step, "identity": self.identity}
                (directory / "state.json").write_text(json.dumps(state, indent=2) + "\n")
        # Checkpoints of later steps do not count: they are torn, or this run would have begun there.
        _remove(self._saved(step)[: -self.keep])
        return path

    def save_final(self, model: Transformer) -> Path:
        """Write OUT/final, which transformers or the next script opens; adapters are merged, and in adapter/
        too."""
        save: Callable[..., None] = save_reward_model if isinstance(model, RewardModel) else save_model
        if self.lora.rank and self.lora.final_dtype == "bf16":
            save = partial(save, dtype=torch.bfloat16)
        with self._model_directory(self.out / "final", save, model) as directory:
            if self.lora.rank:
                self._save_adapter(model, directory / "adapter")
                for name in (*self.files, CHAT_TEMPLATE) if rank() == 0 else ():
                    if (directory / name).is_file() and "/" not in name:
                        shutil.copy(directory / name, directory / "adapter" / name)
        return self.out / "final"

    def resume(self, model: Transformer, optimizer: AdamW) -> int:
        """Load the newest complete checkpoint into model and optimizer; returns its step, 0 without one.

        Raises UserError that names the first setting in which the checkpoint is another run's. Also raises it
        if there are checkpoints but none is complete, and if the processes found different ones.
        """
        checkpoints, step = self._saved(), 0
        for path in reversed(checkpoints):
            try:
                difference = self._load(path, model, optimizer)
            except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
                print0(f"{path}: not a whole checkpoint ({one_line(error)}); it is passed over")
                continue
            if difference:
                hint = "give the run another run.out, or the old settings, files and version"
                raise UserError(f"{path} was made with {difference}; {hint}")
            print0(f"resuming from {path}")
            step = _step(path)
            break
        else:
            if checkpoints:
                where = self.out / "checkpoints"
                raise UserError(f"{where}: no checkpoint in it is whole; remove it to start anew")
        require_same(self.identity | {"the step of the last checkpoint": step})
        # A run killed between a save and the removal of the oldest has left one too many.
        complete = self._saved(step)
        if len(complete) == self.keep + 1:
            _remove(complete[:1])
        return step

    def _load(self, path: Path, model: Transformer, optimizer: AdamW) -> str:
        """Load a checkpoint, unless it is another run's: then returns in what it differs."""
        state = json.loads((path / "state.json").read_text())
        was, now = dict(state["identity"]), self.identity
        if state["step"] != _step(path):
            raise ValueError(f"state.json is of step {state['step']!r}")
        # A setting that the version before did not have is off by default.
        if names := [name for name in was | now if (was.get(name) or None) != (now.get(name) or None)]:
            # Another loss, or one with adapters, has other settings, too, so that is said first, then what
            # only one of them has; the content of the data comes last: other differences explain it.
            first = ("loss.name", "lora.rank")
            name = min(names, key=lambda n: (n not in first, n in was and n in now, n == "data", n))
            return f"{name} = {was.get(name)!r}, now it is {now.get(name)!r}"
        # In place, because a second copy may not fit in memory. If the files turn out to be torn, the
        # checkpoint before overwrites all that was read, or the run ends.
        moments = optimizer_tensors(model, optimizer)
        weights = adapter_tensors(model) if self.lora.rank else model.state_dict()
        of_model = STEM if self.lora.rank else "model"
        for stem, tensors in ((of_model, weights), ("optimizer", moments)):
            # Numbers that are not finite would stop the run in training, too.
            for name, value in read_tensors(path, tensors, stem=stem, finite=True):
                tensors[name].copy_(value)
        load_optimizer_tensors(model, optimizer, moments)
        return ""

    @contextmanager
    def _model_directory(self, path: Path, save: Callable[..., None], model: Transformer) -> Iterator[Path]:
        """On rank 0, a directory with model and tokenizer that takes the place of `path` after the block."""
        if rank() > 0:
            save(model, path)  # Other ranks write nothing.
            yield path
            return
        with writing(path), replacing_directory(path) as directory:
            save(model, directory)
            for name, content in self.files.items():
                if self.template is None or Path(name).parent.name != MORE_TEMPLATES:
                    (directory / name).parent.mkdir(exist_ok=True)
                    (directory / name).write_bytes(content)
            if self.template is not None:
                (directory / CHAT_TEMPLATE).write_text(self.template, encoding="utf-8")
                edit_field(directory / CONFIG, "chat_template", None)  # Some programs look there first.
            if isinstance(model, RewardModel) and not self.on_messages:
                edit_field(directory / "config.json", "reward_read_at", "EOS of text")
            if "tokenizer.json" in self.files and (directory / "config.json").is_file():
                align_special_tokens(directory, rewards=isinstance(model, RewardModel))
            yield directory

    def _save_adapter(self, model: Transformer, directory: Path) -> None:
        save_adapter(model, directory, self.lora, self.base, self.identity["model"])

    def _saved(self, last: float = float("inf")) -> list[Path]:
        """The checkpoints up to step `last`, oldest first; complete, unless more than a kill spoilt them."""
        paths = [p for p in (self.out / "checkpoints").glob("step-*") if p.name[5:].isdecimal()]
        return sorted((path for path in paths if _step(path) <= last), key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name[5:])


def _remove(checkpoints: list[Path]) -> None:
    for path in checkpoints if rank() == 0 else ():
        with writing(path):
            remove_directory(path)
