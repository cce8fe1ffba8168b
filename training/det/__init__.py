"""Detection: options, model, the task that the loop trains, COCO's figures, the run."""
