"""The global generators of torch, numpy and Python, watched."""

from ddengine.reruns import global_rng_untouched

__all__ = ["global_rng_untouched"]
