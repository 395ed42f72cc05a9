"""From preference files to the token ids of a batch.

records.py          a file -> one JSON object after the other
shapes.py           a record -> what it says, by one of the published shapes (readings.py, messages.py)
preferences.py      what it says -> a prompt with two responses, or one, as text (chat_template.py writes
                    messages), or the prompt alone; preference_files.py all records of a file
tokenizer.py        text -> token ids; truncation.py cuts them to the limits, report.py counts every record
dataset.py          all of it -> the pairs to train on and those held out, in flat arrays (pair_tokens.py)
sampler.py          which pairs a step draws, and how its batch is cut into micro-batches
"""

from minidpo.data.chat_template import ChatTemplate
from minidpo.data.dataset import load_pairs, require_fit, require_margins, require_messages, split_by_prompt
from minidpo.data.messages import Message, Prompt
from minidpo.data.pair_tokens import PairTokens, TokenPair
from minidpo.data.preference_files import read_preferences, stop_if_glued
from minidpo.data.preferences import PreferencePair, Unusable, pair_of, prompt_of, split_hh
from minidpo.data.records import BadRecord, read_records
from minidpo.data.report import DataReport, FileReport
from minidpo.data.sampler import PairOrder, micro_batches
from minidpo.data.shapes import renamed, shape_of
from minidpo.data.tokenizer import Tokenizer
from minidpo.data.truncation import describe_pair, tokenize_pairs
