"""Images for the scripts: sources, seeded transforms, samplers and loaders."""
