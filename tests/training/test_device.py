"""Which device a run takes, and what it does where that lacks something. No GPU is needed: PyTorch is told."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minidpo.errors import UserError
from minidpo.model.attention import KINDS
from minidpo.tools.explain import main as explain
from minidpo.tools.score import main as score
from minidpo.training import device as device_module
from minidpo.training.device import choose_device, compiles_layers

CUDA = torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch):
    """A machine with an H100 that has all it needs; the arguments take something away."""

    def make(capability=(9, 0), triton=True, compiler=True, headers=True) -> list[str]:
        stances: list[str] = []
        for dtype, kind in list(KINDS.items()):
            monkeypatch.setitem(KINDS, dtype, kind)  # so that what `choose_device` sets is undone
        monkeypatch.delenv("CC", raising=False)
        for name, value in (
            ("is_available", True),
            ("get_device_capability", capability),
            ("get_device_name", "Some GPU"),
            ("is_bf16_supported", capability >= (8, 0)),
        ):
            monkeypatch.setattr(torch.cuda, name, lambda *_, value=value, **__: value)
        monkeypatch.setattr(torch.compiler, "set_stance", stances.append)
        monkeypatch.setattr(device_module, "find_spec", lambda name: triton or None)
        monkeypatch.setattr(shutil, "which", lambda name: compiler or None)
        here = Path(__file__).parent if headers else Path("/nowhere")
        monkeypatch.setattr(device_module, "sysconfig", SimpleNamespace(get_path=lambda name: here))
        monkeypatch.setattr(Path, "is_file", lambda path: path.parent == Path(__file__).parent)
        return stances

    return make


LACKING = [
    ({"capability": (7, 5)}, "older than the compiler supports"),
    ({"triton": False}, "pip install triton"),
    ({"compiler": False}, "apt install gcc"),
    ({"headers": False}, "apt install python3-dev"),
]


@pytest.mark.parametrize(("lacking", "says"), LACKING)
def test_fallback(gpu, capsys, lacking, says):
    """Where PyTorch cannot compile for a GPU, auto compiles nothing, and says why; who asks for a compiled
    kernel gets an error."""
    stances = gpu(**lacking)
    assert choose_device("auto") == CUDA and KINDS[torch.float32] == "sdpa" and stances == ["force_eager"]
    # FlashAttention needs no compiler, but a GPU that has its instructions.
    assert KINDS[torch.bfloat16] == ("sdpa" if "capability" in lacking else "flash")
    assert says in capsys.readouterr().out and not compiles_layers("auto", CUDA)
    with pytest.raises(UserError, match=f'{says}.*run.attention = "sdpa"'):
        choose_device("cuda", attention="flex")
    with pytest.raises(UserError, match=f"run.compile = true, but .*{says}"):
        compiles_layers(True, CUDA)


def test_all_there(gpu, capsys):
    """Otherwise a GPU gets FlashAttention in bf16, FlexAttention in float32 and compiled layers, unless
    something else is asked for."""
    stances = gpu()
    assert choose_device("auto", dtype="bf16") == CUDA and not stances
    assert {torch.bfloat16: "flash", torch.float32: "flex"} == KINDS
    assert compiles_layers("auto", CUDA) and not compiles_layers(False, CUDA)
    for kind in ("sdpa", "flex"):
        choose_device("auto", attention=kind)
        assert set(KINDS.values()) == {kind} and capsys.readouterr().out == ""
    assert not compiles_layers("auto", torch.device("cpu")) and compiles_layers(True, torch.device("cpu"))


TEXTS = ["--prompt", "a cat?", "--chosen", " yes", "--rejected", " no"]
ASK_FOR_BF16 = {
    "run": lambda out: choose_device("cuda", dtype="bf16"),
    "score": lambda out: score(["--model", "m", "--data", "d", "--out", str(out), "--dtype", "bf16"]),
    "explain": lambda out: explain(["--model", "m", *TEXTS, "--dtype", "bf16"]),
}


@pytest.mark.parametrize("ask", ASK_FOR_BF16.values(), ids=ASK_FOR_BF16.keys())
def test_no_bf16(gpu, tmp_path, ask):
    """A GPU of before bf16, such as a T4, is refused before any model is read, by what makes it work."""
    gpu(capability=(7, 5))
    with pytest.raises(UserError, match='Some GPU .*run.dtype = "fp32" .--dtype fp32'):
        ask(tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"name": "cuda"}, "no CUDA device"),
        ({"name": "mps"}, "no Apple GPU"),
        ({"name": "cpu", "attention": "flex"}, "needs a CUDA GPU"),
    ],
)
def test_refused(monkeypatch, arguments, says):
    """What the machine does not have is one line."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=says):
        choose_device(**arguments)
