"""Files the package carries: a small language model for tests, examples and benchmarks without a download."""

from pathlib import Path

MODEL_PATH: Path = Path(__file__).resolve().parent / "pythonette"
"""Folder of *pythonette*, a 2.3 million parameter Llama that writes Python; see its README.md.

Load it with `AutoModelForCausalLM.from_pretrained(MODEL_PATH)` and `AutoTokenizer.from_pretrained(MODEL_PATH)`.
"""

__all__ = ["MODEL_PATH"]
