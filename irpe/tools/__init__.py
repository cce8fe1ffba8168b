"""What people look at: costs now, plots and the command line later."""
