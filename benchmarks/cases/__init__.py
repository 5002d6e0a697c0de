"""Benchmark cases: each one is set up once and measured for time, memory and error."""
