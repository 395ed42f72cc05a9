"""The blocks of 128 x 128 tokens that FlexAttention is told to compute, against brute force over all blocks.

The kernel never looks at a block that is not listed, so an allowed pair of tokens in it would be lost without
an error. The rule is written out here from the pairs' lengths alone.
"""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from minidpo.data import PairTokens, TokenPair
from minidpo.model.attention import shared_prompt_mask
from minidpo.packing import BLOCK, pack, padded
from tiny import random_pairs

SHAPES = {  # number of pairs, tokens of a prompt, tokens of a response
    "one pair over several blocks": (1, (1, 300), (1, 300)),
    "a long prompt": (2, (260, 400), (1, 20)),
    "pairs across blocks": (9, (20, 90), (1, 60)),
    "many pairs in a block": (40, (1, 9), (1, 12)),
    "pairs of any size": (12, (1, 150), (1, 150)),
}
SHAPE = pytest.mark.parametrize("shape", SHAPES)
SEEDS = range(12)


def some_pairs(shape: str, seed: int = 0) -> list[TokenPair]:
    return random_pairs(np.random.default_rng([seed, *shape.encode()]), *SHAPES[shape])


def block_mask(pairs: list[TokenPair], padding: int) -> BlockMask:
    """The mask under test: of the row of these pairs, with so many tokens of padding behind them."""
    tokens = PairTokens.from_pairs(pairs)
    row = padded(pack(tokens), len(tokens.ids) + padding)
    return shared_prompt_mask(row.prompt, row.response, row.position)


def rule(pairs: list[TokenPair], padding: int) -> tuple[Tensor, Tensor]:
    """(N, N) bool each: query and key are of one pair; and the query may attend to the key."""
    pair, response, position = [], [], []
    alone = TokenPair([0], [], [], 0)  # every token of padding is a pair of its own
    for number, (prompt, chosen, rejected, *_) in enumerate(pairs + [alone] * padding):
        for which, (ids, start) in enumerate([(prompt, 0), (chosen, len(prompt)), (rejected, len(prompt))]):
            pair += [number] * len(ids)
            response += [which] * len(ids)  # 0: the prompt
            position += range(start, start + len(ids))
    pair, response, position = map(torch.tensor, (pair, response, position))
    same_pair = pair[:, None] == pair
    not_later = position[:, None] >= position
    own_text = (response == 0) | (response[:, None] == response)
    return same_pair, same_pair & not_later & own_text


def padding_of(pairs: list[TokenPair], more: int = 0) -> int:
    """Tokens of padding: to a multiple of the block, as on a GPU, and `more`."""
    return -sum(len(p.prompt) + len(p.chosen) + len(p.rejected) for p in pairs) % BLOCK + more


def blocks_with_any(cells: Tensor) -> Tensor:
    """(N, N) bool -> (blocks, blocks) bool."""
    missing = -len(cells) % BLOCK
    cells = torch.nn.functional.pad(cells, (0, missing, 0, missing))
    return cells.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).any(dim=3).any(dim=1)


def listed(counts: Tensor, indices: Tensor) -> Tensor:
    """What the kernel reads, the first counts[r] of indices[r] in block row r: (blocks, blocks) bool."""
    counts, indices = counts[0, 0], indices[0, 0]
    table = torch.zeros(len(counts), len(counts), dtype=torch.bool)
    for row, count in enumerate(counts.tolist()):
        columns = indices[row, :count].tolist()
        assert len(set(columns)) == len(columns) == count  # each block once
        table[row, columns] = True
    return table


def computed(mask: BlockMask) -> Tensor:
    """(query blocks, key blocks) bool."""
    assert mask.full_kv_num_blocks is None  # such blocks would be computed without the rule
    return listed(mask.kv_num_blocks, mask.kv_indices)


@SHAPE
def test_no_block_with_an_allowed_pair_of_tokens_is_skipped(shape):
    for seed in SEEDS:
        pairs = some_pairs(shape, seed)
        for padding in (padding_of(pairs), padding_of(pairs, more=BLOCK)):
            _, allowed = rule(pairs, padding)
            needed = blocks_with_any(allowed)
            assert len(needed) > 1
            assert not (needed & ~computed(block_mask(pairs, padding))).any(), (seed, padding)


@SHAPE
def test_no_block_of_strangers_is_computed(shape):
    """It would change no number, but cost the square of the row."""
    for seed in SEEDS:
        pairs = some_pairs(shape, seed)
        padding = padding_of(pairs)
        same_pair, _ = rule(pairs, padding)
        assert not (computed(block_mask(pairs, padding)) & ~blocks_with_any(same_pair)).any(), seed


@SHAPE
def test_backward_goes_over_the_same_blocks_as_forward(shape):
    """Gradients of keys and values run over a list of their own: the query blocks of each key block."""
    pairs = some_pairs(shape)
    mask = block_mask(pairs, padding_of(pairs))
    assert torch.equal(listed(mask.q_num_blocks, mask.q_indices), computed(mask).T)


@SHAPE
def test_inside_the_blocks_the_rule_holds_token_by_token(shape):
    pairs = some_pairs(shape)
    padding = padding_of(pairs, more=BLOCK)
    _, allowed = rule(pairs, padding)
    q, k = torch.meshgrid(*[torch.arange(len(allowed))] * 2, indexing="ij")
    mask = block_mask(pairs, padding)
    assert mask.BLOCK_SIZE == (BLOCK, BLOCK)
    assert torch.equal(mask.mask_mod(torch.tensor(0), torch.tensor(0), q, k), allowed)
