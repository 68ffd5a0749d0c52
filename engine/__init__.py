"""The continuous-batching engine: scheduling, model execution and the logits pipeline."""
