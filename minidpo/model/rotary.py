"""Rotary position embeddings (Su et al. 2021), and the ways in which models stretch them to longer contexts.

Rotary: a token's position is not added to its embedding, but turns its queries and keys by angles, so that
their product depends on how far apart two tokens are.
Dimensions: H heads, E coordinates per head, D of which are rotated; ... stands for rows and tokens.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def rotary_frequencies(
    size: int, theta: float, scaling: "RopeScaling | None", device: torch.device, dtype: torch.dtype
) -> Tensor:
    """theta^(-2i/D) for i < D/2: radians per position, (D/2,); `size` is D."""
    # The first coordinates turn by one radian per position, the last ones by nearly 1 / theta.
    exponents = torch.arange(0, size, 2, device=device, dtype=dtype) / size
    frequencies = 1.0 / theta**exponents
    return frequencies if scaling is None else scaling.stretch(frequencies, theta)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair of coordinates (i, i + D/2) of heads (..., H, E), rotated by its angle; those past D as they
    are. cos and sin (..., 1, D/2)."""
    size = 2 * cos.shape[-1]
    if size < heads.shape[-1]:
        return torch.cat((rotate(heads[..., :size], cos, sin), heads[..., size:]), dim=-1)
    # Hugging Face's weights are ordered for these halves; Su et al. rotate neighbours (2i, 2i + 1).
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


@dataclass(frozen=True)
class RopeScaling:
    """One rope_type of config.json, whose numbers are the fields of a subclass, by the same names."""

    rope_type = "default"
    factor: float  # how much longer the stretched context is

    def stretch(self, frequencies: Tensor, theta: float) -> Tensor:
        """The frequencies (D/2,) of the stretched context, from those of the original one."""
        return frequencies

    @property
    def magnitude(self) -> float:
        """A factor of cos and sin, and so of every rotated query and key."""
        return 1.0


@dataclass(frozen=True)
class LinearRope(RopeScaling):
    """Position interpolation (Chen et al. 2023): all positions are divided by `factor`."""

    rope_type = "linear"

    def stretch(self, frequencies: Tensor, theta: float) -> Tensor:
        return frequencies / self.factor


@dataclass(frozen=True)
class DynamicRope(RopeScaling):
    """Dynamic NTK scaling: theta grows with the longest text of a pass beyond max_position_embeddings. No
    text may be longer here, because texts of one packed row may not depend on each other."""

    rope_type = "dynamic"


@dataclass(frozen=True)
class Llama3Rope(RopeScaling):
    """Llama 3.1: a frequency that makes few turns over the original context is divided by `factor`, so that
    its angles stay in the range seen in training. One that makes many is kept; between, it is interpolated.
    """

    rope_type = "llama3"
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def stretch(self, frequencies: Tensor, theta: float) -> Tensor:
        # How often each pair of coordinates turns around over the whole original context
        turns = self.original_max_position_embeddings * frequencies / (2 * torch.pi)
        keep = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        # The share of the frequency that is kept: linear between the two limits.
        keep = keep.clamp(0, 1)
        return keep * frequencies + (1 - keep) * frequencies / self.factor


@dataclass(frozen=True)
class YarnRope(RopeScaling):
    """YaRN (Peng et al. 2023): as Llama 3.1, but interpolated over the frequencies' indices between those
    that make beta_fast and beta_slow turns; and queries and keys grow with the context."""

    rope_type = "yarn"
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    def stretch(self, frequencies: Tensor, theta: float) -> Tensor:
        # Frequency i makes theta^(-2i/D) radians per position: solved for i.
        size = 2 * len(frequencies)

        def index(turns: float) -> float:
            """The i at which theta^(-2i/D) makes so many turns over the original context."""
            radians_per_position = 2 * math.pi * turns / self.original_max_position_embeddings
            return -size * math.log(radians_per_position) / (2 * math.log(theta))

        # Whole indices at both ends of the ramp, as in the authors' code
        first = max(math.floor(index(self.beta_fast)), 0)
        last = min(math.ceil(index(self.beta_slow)), size - 1)
        indices = torch.arange(len(frequencies), device=frequencies.device, dtype=frequencies.dtype)
        divide = ((indices - first) / (last - first or 0.001)).clamp(0, 1)  # the share that is divided
        return (1 - divide) * frequencies + divide * frequencies / self.factor

    @property
    def magnitude(self) -> float:
        return self.attention_factor or 0.1 * math.log(max(self.factor, 1)) + 1


@dataclass(frozen=True)
class LongRope(RopeScaling):
    """LongRoPE (Ding et al. 2024), of Phi-3 and Phi-4-mini: a divisor for each frequency. Texts longer than
    the original context have others, long_factor, kept for other programs: they are refused here."""

    rope_type = "longrope"
    original_max_position_embeddings: int
    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    attention_factor: float | None = None

    def stretch(self, frequencies: Tensor, theta: float) -> Tensor:
        return frequencies / frequencies.new_tensor(self.short_factor)

    @property
    def magnitude(self) -> float:
        # The paper's factor of attention: it grows with the logarithm of the length.
        growth = math.log(self.factor) / math.log(self.original_max_position_embeddings)
        return self.attention_factor or math.sqrt(1 + max(growth, 0))


ROPE_SCALINGS = {kind.rope_type: kind for kind in (LinearRope, DynamicRope, Llama3Rope, YarnRope, LongRope)}
