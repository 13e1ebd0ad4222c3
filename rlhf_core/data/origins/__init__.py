"""Where the rows of prepared data come from: sources, licences, who wrote, who voted."""
