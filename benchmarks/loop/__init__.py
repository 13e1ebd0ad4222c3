"""The loop, shown: simulated people on the real page, and rounds that they make possible.

    browser      what a browser does on the page for annotators, over HTTP
    people       people of the demo's world who label in one, with their habits
    world        the files and the people of a show
    services     `rlhf up` with a home of its own, and what is asked of it
    rounds       what came of each round, from MLflow
    show         the whole of it: python -m benchmarks.loop

They are a benchmark and no part of the product: people who vote at random or by length must never
be one setting away from a real project.
"""
