"""Image classification: options, model, the task that the loop trains, the run."""
