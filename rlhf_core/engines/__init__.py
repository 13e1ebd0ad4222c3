"""Who samples the responses of a roll-out: this process, or a server elsewhere."""
