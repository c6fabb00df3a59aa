"""Evaluating a trained model: loss, completion benchmarks, the lm-eval harness, the report."""
