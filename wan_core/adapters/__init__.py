"""What a user adds to a model, one file a kind: each a `Condition` that tells the trunk's slots what to take in."""

from .injection import Canvas, Condition, Injection, Rank, neutral

__all__ = ["Canvas", "Condition", "Injection", "Rank", "neutral"]
