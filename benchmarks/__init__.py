"""Benchmarks, and the small checkpoints that they and the tests run on."""
