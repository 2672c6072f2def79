"""Tests that run kernels are collected only where something runs them: see on_device/."""

import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

collect_ignore = [] if INTERPRETED or torch.cuda.is_available() else ["on_device"]
