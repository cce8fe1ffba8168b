"""Text: options, models, the tasks that the loop trains, the runs."""
