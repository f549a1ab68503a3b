"""Expert buffers: networks as flat parameter vectors, the layout that trajectories share."""

from expert_buffers.params import ParamSpec

__all__ = ["ParamSpec"]
