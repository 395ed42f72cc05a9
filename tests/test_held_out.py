"""Holding out by prompt: none on both sides, whatever the order of the file."""

import pytest

from minidpo.data import split_by_prompt
from minidpo.errors import UserError

PROMPTS = [f"question {i % 70}" for i in range(100)]  # 30 prompts have two pairs


def test_no_prompt_is_on_both_sides_of_the_split():
    held_out = split_by_prompt(PROMPTS, 25, seed=1)
    inside = {prompt for prompt, out in zip(PROMPTS, held_out, strict=True) if out}
    outside = {prompt for prompt, out in zip(PROMPTS, held_out, strict=True) if not out}
    assert sum(held_out) == 25 and not inside & outside


def test_the_split_is_a_function_of_the_seed_and_not_of_file_order():
    held_out = dict(zip(PROMPTS, split_by_prompt(PROMPTS, 25, seed=1), strict=True))
    backwards = dict(zip(PROMPTS[::-1], split_by_prompt(PROMPTS[::-1], 25, seed=1), strict=True))
    assert held_out == backwards
    assert held_out != dict(zip(PROMPTS, split_by_prompt(PROMPTS, 25, seed=2), strict=True))


def test_the_split_takes_text_and_bytes_alike():
    assert split_by_prompt([p.encode() for p in PROMPTS], 25, 1) == split_by_prompt(PROMPTS, 25, 1)


def test_a_split_that_leaves_a_side_empty_is_refused():
    assert split_by_prompt(PROMPTS, 0, seed=1) == [False] * 100
    for impossible in (-1, 100, 101):
        with pytest.raises(UserError, match=f"{impossible} pairs to hold out of 100"):
            split_by_prompt(PROMPTS, impossible, seed=1)
    with pytest.raises(UserError, match="none can be held out"):
        split_by_prompt(["same"] * 10, 5, seed=1)
