"""What a user can set: the sections of a config, with units and bounds. Loads without torch."""
