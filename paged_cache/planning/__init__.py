"""How much memory a model's weights, keys and values take, and how many requests fit: from its config alone."""

from .planner import Plan, plan
from .requests import ContextLine, Lengths, Way
from .traces import read_trace

__all__ = ["ContextLine", "Lengths", "Plan", "Way", "plan", "read_trace"]
