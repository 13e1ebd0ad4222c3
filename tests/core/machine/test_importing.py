"""Modules are imported without garbage collection, which goes on afterwards."""

import gc

import pytest

from rlhf_core.machine.imports import importing


@pytest.fixture(autouse=True)
def thawed():
    yield
    gc.unfreeze()
    gc.enable()


def test_no_collection_inside_and_what_was_made_is_spared():
    before = gc.get_freeze_count()
    with importing():
        assert not gc.isenabled()
        made = [[] for _ in range(1000)]
        with importing():
            pass
        assert not gc.isenabled()  # the inner one changes nothing
    assert gc.isenabled()
    assert gc.get_freeze_count() >= before + len(made)


def test_an_import_that_fails_leaves_collection_on():
    with pytest.raises(ImportError), importing():
        raise ImportError
    assert gc.isenabled()


def test_who_has_switched_it_off_keeps_it_off():
    gc.disable()
    with importing():
        pass
    assert not gc.isenabled()
