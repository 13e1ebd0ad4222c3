"""Groups of nearly equal texts."""

from random import Random

from rlhf_core.data.near import NEAR, jaccard, near_groups, shingles_of


def words(seed, n=30):
    random = Random(seed)
    return [f"w{random.randrange(10_000)}" for _ in range(n)]


def test_an_edited_prompt_is_in_the_group_of_its_original_and_others_are_not():
    texts = [" ".join(words(i)) for i in range(50)]
    edited = [f"{text} please" for text in texts]
    groups = near_groups(texts + edited)
    assert groups[:50] == groups[50:] == list(range(50))


def test_case_and_white_space_do_not_count():
    assert near_groups(["What is the best  room?", "what IS the best room?"]) == [0, 0]


def test_short_texts_are_grouped_with_equal_ones_only():
    assert near_groups(["a b", "a c", "a b", ""]) == [0, 1, 0, 2]


def test_a_chain_is_one_group():
    chain = [words(0, 60)]
    for i in range(8):
        chain.append(chain[-1][5:] + words(i + 1, 5))
    texts = [" ".join(one) for one in chain]
    assert jaccard(shingles_of(texts[0]), shingles_of(texts[-1])) < NEAR
    assert set(near_groups(texts)) == {0}


def test_pairs_over_the_threshold_are_together_and_the_order_of_texts_does_not_matter():
    texts = [" ".join(words(i % 20, 25) + words(i, 1 + i % 9)) for i in range(120)]
    groups = near_groups(texts)
    turned = near_groups(texts[::-1])[::-1]
    for i in range(120):
        for k in range(i):
            near = jaccard(shingles_of(texts[i]), shingles_of(texts[k])) >= NEAR
            if near:
                assert groups[i] == groups[k]
            assert (groups[i] == groups[k]) == (turned[i] == turned[k])
