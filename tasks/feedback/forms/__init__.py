"""Other people's forms of votes and ratings: read into the store, and written from it."""
