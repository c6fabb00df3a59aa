"""What a trained model is worth: loss, completion benchmarks, the lm-eval harness, the report."""
