"""The parts of bench_batching.py."""
