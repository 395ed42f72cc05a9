"""The language model, the reward model, and what one pass over a packed row gives.

transformer.py (the decoder; its settings are in model_config.py, rotary embeddings in rotary.py) ->
attention.py (packed rows) -> packed.py (log-probs of responses) -> reward_model.py; generate.py samples;
pretrained.py reads and writes Hugging Face directories, with hf_config.py, hf_fields.py and tensors.py.
"""

from minidpo.model.generate import Sampling, generate
from minidpo.model.hf_config import read_config
from minidpo.model.packed import hidden_states, response_logps, response_token_logps
from minidpo.model.pretrained import (
    load_model,
    load_reward_model,
    model_fingerprint,
    new_reward_model,
    require_language_model,
    require_reward_model,
    save_model,
    save_reward_model,
)
from minidpo.model.reward_model import RewardModel
from minidpo.model.transformer import ModelConfig, Transformer
