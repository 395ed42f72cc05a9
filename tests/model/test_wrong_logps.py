"""The checks of logp_checks.py pass for the code, and refute every mistake of wrong_logps.py."""

import logp_checks as checks
import pytest
import torch.nn.functional as F
from wrong_logps import WRONG

from minidpo.logprobs import sequence_logps, sum_by_response, token_logps
from minidpo.model.attention import attention_per_text, masked_attention, shared_prompt_mask
from minidpo.packing import pack, padded


def flex(batch):
    """FlexAttention's mask on a row of whole blocks, for the tokens that are there."""
    row, n = padded(batch, 128), len(batch.tokens)
    attend = masked_attention(shared_prompt_mask(row.prompt, row.response, row.position))

    def of_tokens(q, k, v, layer):
        return attend(*(F.pad(t, (0, 0, 0, 0, 0, len(row.tokens) - n)) for t in (q, k, v)), layer)[:n]

    return of_tokens


RIGHT = {
    checks.check_rows: [sequence_logps],
    checks.check_row_gradients: [sequence_logps],
    checks.check_half_precision_rows: [sequence_logps],
    checks.check_refused_rows: [sequence_logps],
    checks.check_chunks: [token_logps],
    checks.check_chunk_precision: [token_logps],
    checks.check_autocast: [token_logps],
    checks.check_sums: [sum_by_response],
    checks.check_packed_logps: [pack],
    checks.check_packed_rewards: [pack],
    checks.check_attention: [attention_per_text, flex],
}


@pytest.mark.parametrize("check", RIGHT, ids=lambda check: check.__name__)
def test_the_code_passes(check):
    assert check in WRONG
    for right in RIGHT[check]:
        check(right)


@pytest.mark.parametrize(
    ("check", "wrong"),
    [
        pytest.param(check, form, id=f"{check.__name__}: {name}")
        for check, forms in WRONG.items()
        for name, form in forms.items()
    ],
)
def test_a_check_refutes(check, wrong):
    with pytest.raises(AssertionError):
        check(wrong)
