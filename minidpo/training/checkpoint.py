"""Training state on disk: OUT/checkpoints/step-N/ is a model directory, or that of an adapter, with
optimizer.safetensors and state.json.

A checkpoint is renamed into place when it is complete, so a killed save leaves the one before. There is no
random state to keep: the data order is a function of (seed, step) and no layer draws random numbers.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.optim import AdamW

from minidpo.config import DPOConfig, RewardConfig, settings_of_run, to_dict
from minidpo.data import PairTokens
from minidpo.data.dataset import HELD_OUT_BY
from minidpo.distributed import rank, require_same
from minidpo.errors import UserError, one_line
from minidpo.files import remove_directory, replacing_directory, writing
from minidpo.log import print0
from minidpo.losses import BradleyTerry
from minidpo.model import RewardModel, Transformer, model_fingerprint, save_model
from minidpo.model.adapter_files import STEM, adapter_tensors, save_adapter
from minidpo.model.tensors import read_tensors, write_tensors
from minidpo.training.optim import learning_rate, optimizer_tensors
from minidpo.training.saved_tokenizer import edit_field, write_tokenizer

OF_HELD_OUT = "held-out pairs chosen by"
# What an identity means that has no such key: that of train_rm.py, and that of a run without adapters.
ABSENT = {"loss.name": BradleyTerry.name, "lora.rank": 0}


def run_identity(config: DPOConfig | RewardConfig, train: PairTokens) -> dict[str, Any]:
    """What makes a run this run: settings of loss, optimizer and precision, fingerprints of data and models.

    Its length, its directory, what is logged and how batches are cut are left out: they may change.
    """
    free = ("optim.epochs", "optim.max_steps", "optim.micro_tokens", "lora.final_dtype")
    settings, sections = to_dict(config), ["loss", "optim", "lora"][: 3 if config.lora.rank else 2]
    identity = {f"{name}.{key}": value for name in sections for key, value in settings[name].items()}
    identity = {key: value for key, value in identity.items() if key not in free}
    identity |= {"run.seed": config.run.seed, "run.dtype": config.run.dtype}
    identity["model"] = model_fingerprint(config.model.path)
    if isinstance(config, DPOConfig) and config.loss.needs_reference:
        same = config.reference_path == Path(config.model.path)  # Equal paths are read once.
        identity["reference"] = identity["model"] if same else model_fingerprint(config.reference_path)
    identity["data"] = train.fingerprint()
    if train.date:
        identity["data.date"] = train.date
    if config.data.eval_pairs and not config.data.eval:
        identity[OF_HELD_OUT] = HELD_OUT_BY
    return identity


@dataclass(frozen=True)
class Checkpoints:
    """The model directories that a run writes: OUT/checkpoints/step-N and OUT/final. All ranks call it."""

    config: DPOConfig | RewardConfig
    identity: dict[str, Any]  # see `run_identity`
    steps: int  # of the whole run
    files: dict[str, bytes]  # the `tokenizer_files` of the model that the run started from
    template: str | None = None  # the chat template, where it is not among `files`
    on_messages: bool = True  # whether a chat template wrote any of the pairs to train on

    @property
    def _out(self) -> Path:
        return Path(self.config.run.out)

    def save(self, step: int, model: Transformer, optimizer: AdamW) -> Path:
        """Write OUT/checkpoints/step-N, then delete the oldest ones."""
        path = self._out / "checkpoints" / f"step-{step}"
        save = self._save_adapter if self.config.lora.rank else save_model
        with self._model_directory(path, save, model) as directory:
            write_tensors(directory, optimizer_tensors(model, optimizer), "optimizer")
            if rank() == 0:
                state = {"step": step, "steps": self.steps, "identity": self.identity}
                (directory / "state.json").write_text(json.dumps(state, indent=2) + "\n")
        self._remove_oldest(step)
        return path

    def save_final(self, model: Transformer) -> Path:
        """Write OUT/final, a model like any other; adapters are merged, and stay apart in adapter/."""
        lora, path = self.config.lora, self._out / "final"
        dtype = torch.bfloat16 if lora.rank and lora.final_dtype == "bf16" else None
        save = partial(save_model, lm_head=not isinstance(model, RewardModel), dtype=dtype)
        with self._model_directory(path, save, model) as directory:
            if lora.rank:
                self._save_adapter(model, directory / "adapter")
            if lora.rank and rank() == 0:
                write_tokenizer(directory / "adapter", self.files, self.template, rewards=False)
        return path

    def resume(self, model: Transformer, optimizer: AdamW) -> int:
        """Load the newest complete checkpoint into model and optimizer; returns its step, 0 without one. A
        checkpoint of another run, none that is complete and different ones per process are UserErrors."""
        checkpoints, step = self._saved(), 0
        for path in reversed(checkpoints):
            try:
                state = json.loads((path / "state.json").read_text())
                if state["step"] != _step(path):
                    raise ValueError(f"state.json is of step {state['step']!r}")
                difference = self._difference(dict(state["identity"]))
                if not difference:
                    self._load(path, model, optimizer)
            except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
                print0(f"{path}: not a whole checkpoint ({one_line(error)}); it is passed over")
                continue
            if difference:
                hint = "give the run another run.out, or the old settings, files and version"
                raise UserError(f"{path} was made with {difference}; {hint}")
            print0(f"resuming from {path}")
            step = _step(path)
            self._tell_new_schedule(step, state.get("steps", self.steps))
            break
        else:
            if checkpoints:
                where = self._out / "checkpoints"
                raise UserError(f"{where}: no checkpoint in it is whole; remove it to start anew")
            if {path.name for path in self._out.iterdir()} - {".lock", "tokens"}:
                print0(f"{self._out} has files but no checkpoint: the run starts anew in it")
        require_same(self.identity | {"the step of the last checkpoint": step})
        self._remove_oldest(step)  # A run that was killed after a save has left one too many.
        return step

    def _difference(self, was: dict[str, Any]) -> str:
        """In what a checkpoint with the identity `was` is another run's; empty if it is this one's."""
        was, now = ABSENT | was, ABSENT | self.identity
        # A setting that the version before did not have is off by default.
        names = [name for name in was | now if (was.get(name) or None) != (now.get(name) or None)]
        if not names:
            return ""
        # Another loss, or one with adapters, has other settings, too, so that is said first. The content of
        # the data comes last: other differences explain it.
        last = ("data", "data.date", OF_HELD_OUT)
        name = min(names, key=lambda name: (name not in ABSENT, name in last, name))
        if "." in name:
            return f"{name} = {was.get(name)!r}, now it is {now.get(name)!r}"
        # A fingerprint says nothing to a reader, but the settings that it follows from do.
        section = "data" if name in last else name
        before, after = settings_of_run(self._out, section), to_dict(self.config)[section]
        changed = [key for key in before.keys() & after if before[key] != after[key] and key != "cache"]
        said = (f"{section}.{key} = {before[key]!r}, now it is {after[key]!r}" for key in sorted(changed))
        return " and ".join(said) or f"other content of the files in [{section}]"

    def _load(self, path: Path, model: Transformer, optimizer: AdamW) -> None:
        # In place, because a second copy may not fit in memory. If the files turn out to be torn, the
        # checkpoint before overwrites all that was read, or the run ends.
        of_model = (STEM, adapter_tensors(model)) if self.config.lora.rank else ("model", model.state_dict())
        for stem, tensors in (of_model, ("optimizer", optimizer_tensors(model, optimizer))):
            # Numbers that are not finite would stop the run in training, too.
            for name, value in read_tensors(path, tensors, stem=stem, finite=True):
                tensors[name].copy_(value)

    def _tell_new_schedule(self, step: int, planned: int) -> None:
        """Say what becomes of lr if a run goes on after `step` with other steps than were planned."""
        optim = self.config.optim
        was, now = (learning_rate(step, steps, optim) for steps in (planned, self.steps))
        if step < self.steps and was != now:
            print0(
                f"{self.steps} steps, where {planned} were planned: with optim.schedule = {optim.schedule}"
                f" lr is {now:.3g} at the next step, where {was:.3g} was planned"
            )

    @contextmanager
    def _model_directory(self, path: Path, save: Callable[..., None], model: Transformer) -> Iterator[Path]:
        """On rank 0, a directory with model and tokenizer that takes the place of `path` after the block."""
        if rank() > 0:
            save(model, path)  # Other ranks write nothing.
            yield path
            return
        with writing(path), replacing_directory(path) as directory:
            save(model, directory)
            rewards = isinstance(model, RewardModel)
            if rewards and not self.on_messages:
                edit_field(directory / "config.json", "reward_read_at", "EOS of text")
            write_tokenizer(directory, self.files, self.template, rewards)
            yield directory

    def _save_adapter(self, model: Transformer, directory: Path) -> None:
        config = self.config
        save_adapter(model, directory, config.lora, config.model.path, self.identity["model"])

    def _saved(self) -> list[Path]:
        """The checkpoints, oldest first; complete, unless more than a kill spoilt them."""
        paths = (self._out / "checkpoints").glob("step-*")
        return sorted((path for path in paths if path.name[5:].isdecimal()), key=_step)

    def _remove_oldest(self, last: int) -> None:
        # Those of later steps do not count: they are torn, or this run would have begun there.
        saved = [path for path in self._saved() if _step(path) <= last]
        for path in saved[: -self.config.run.keep_checkpoints] if rank() == 0 else ():
            with writing(path):
                remove_directory(path)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name[5:])
