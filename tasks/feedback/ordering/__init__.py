"""Which pairs of the queue come first, and what that saves."""
