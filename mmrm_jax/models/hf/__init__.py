"""InternVL checkpoints in the Hugging Face layout: configuration, name tables, reading and writing."""
