"""A small loop for tests: its settings, votes that come from elsewhere, and what was asked."""

from tasks.feedback.store.records import Answer, Ballot, NewPair
from tasks.feedback.store.tables import ASK, Batch

LENIENT = {
    "min_win_rate": 0.0,
    "min_win_rate_over_champion": 1.0,  # the first one is promoted, and no other one
    "max_kl": 1e6,
    "max_length_ratio": 1e3,
    "max_sign_excess": 1.0,
    "min_reward_accuracy": 0.0,
    "max_near_prompts": 1.0,
}


def loop(tiny, name, **changes):
    """The settings of a loop of one round."""
    pipeline = tiny.model_dump(mode="json") | {
        "project": name,
        "data": {"source": "files", "preferences": {"store": name}},
        "promotion": LENIENT,
    }
    pipeline["evaluation"] |= {"true_reward": ""}
    ask = {"project": name, "prompts": 6, "then": f"retrain/{name}"}
    return {"pipeline": pipeline, "min_new_preferences": 5, "rounds": 1, "ask": ask, **changes}


def cast(project, numbers):
    """Votes that came from elsewhere."""
    project.judgments.add(
        (
            NewPair(f"Review of hotel {n}:", Answer(f" fine {n}"), Answer(f" dull {n}")),
            [Ballot("a", "ada", "b")],
        )
        for n in numbers
    )


def asked(store, name):
    """The batches of a project that were asked for, oldest first."""
    project = store.project(name)
    with store.database.reading() as session:
        query = session.query(Batch).filter_by(project_id=project.id, kind=ASK)
        return [(row.name, row.details, row.flow_run) for row in query.order_by(Batch.id)]
