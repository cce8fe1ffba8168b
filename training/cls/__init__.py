"""Image classification: options, model, task and run."""
