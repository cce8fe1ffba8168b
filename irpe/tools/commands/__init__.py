"""The subcommands: each has ``run(given)`` and is imported after its arguments are read."""
