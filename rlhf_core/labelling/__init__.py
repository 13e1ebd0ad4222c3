"""Which pairs to ask people about first, what that saves, and what a judge may answer instead."""
