"""What `bench_kernels.py` is made of: shapes, tensors, candidates, machines, goals, tables and a picture."""
