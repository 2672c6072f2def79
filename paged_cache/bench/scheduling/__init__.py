"""Scheduling measured: workloads, an engine in virtual time, references."""
