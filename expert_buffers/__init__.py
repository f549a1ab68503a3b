"""Expert buffers: training trajectories of networks on real data, recorded, verified and read by rows."""

from expert_buffers.params import ParamSpec
from expert_buffers.recorder import record
from expert_buffers.segment import Plan, Prefetch, Segment, Window
from expert_buffers.store import ExpertBuffer, Trajectory

__all__ = ["ExpertBuffer", "ParamSpec", "Plan", "Prefetch", "Segment", "Trajectory", "Window", "record"]
