"""Detection: options, model, the task that the loop trains, COCO's metrics, the run."""
