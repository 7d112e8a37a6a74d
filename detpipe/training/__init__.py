"""What surrounds a training: from a configuration to model and data, from those to a run folder, and its checkpoints."""
