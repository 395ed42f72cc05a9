"""From preference files to the token ids of a batch.

records.py          a file -> one JSON object after the other
preferences.py      a record -> one prompt with two responses (chat_template.py writes messages as text)
tokenizer.py        text -> token ids, cut to the limits; report.py counts what became of every record
dataset.py          all of it -> the pairs to train on and those held out, in flat arrays (pair_tokens.py)
sampler.py          which pairs a step draws, and how its batch is cut into micro-batches
"""

# ruff: noqa: F401  (these names are imported from here)
from minidpo.data.chat_template import ChatTemplate, Message
from minidpo.data.dataset import load_pairs, longest_pair, require_fit, require_margins, split_by_prompt
from minidpo.data.pair_tokens import PairTokens, TokenPair
from minidpo.data.preferences import (
    PreferencePair,
    Prompt,
    Unusable,
    pair_of,
    prompt_of,
    read_preferences,
    shape_of,
    split_hh,
)
from minidpo.data.records import BadRecord, read_records
from minidpo.data.report import DataReport, FileReport
from minidpo.data.sampler import PairOrder, micro_batches
from minidpo.data.tokenizer import Tokenizer, describe_pair, tokenize_pairs
