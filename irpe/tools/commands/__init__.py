"""What each subcommand does: ``run(given)``, imported once its arguments are read."""
