"""What the tests of the two scripts share."""

import pytest

import train_dpo
import train_rm
from padded import write_pairs


@pytest.fixture(params=[train_dpo, train_rm], ids=["dpo", "rm"])
def script(request):
    """One script after the other: a test that asks for it runs twice."""
    return request.param


@pytest.fixture
def five_pairs(config, tmp_path) -> list[str]:
    """Arguments of a run of two steps, each of which averages over all five pairs of padded.py."""
    return config(
        data__train=write_pairs(tmp_path / "five.jsonl"),
        data__eval_pairs=0,
        optim__batch_size=5,
        optim__epochs=2,
        optim__max_steps=2,
        optim__micro_tokens=64,
        optim__lr=1e-2,
        optim__schedule='"constant"',
        optim__grad_clip=0.0,
    )
