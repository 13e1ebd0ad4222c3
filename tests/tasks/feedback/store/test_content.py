"""The preference store from one end to the other."""

from tasks.feedback.store.records import Answer, NewPair


def test_a_pair_goes_in_once(project):
    pair = NewPair("why?", Answer("so"), Answer("because"), wanted=1)
    [first] = project.content.add([pair])
    [again] = project.content.add([NewPair("why?", pair.b, pair.a)])
    assert (first.id, True) == (again.id, again.swapped)
