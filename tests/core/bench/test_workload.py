from infopt.core.bench.workload import WORDS, synthetic


def test_lengths_seed_and_distinctness() -> None:
    load = synthetic(64, 32, 8, seed=0, vocab_size=500)
    assert all(len(request.prompt) == 32 and request.output_tokens == 8 for request in load)
    assert all(0 <= int(token) < 500 for request in load for token in request.prompt)
    assert len({request.prompt[:16] for request in load}) == 64, "no first block is shared"
    assert load == synthetic(64, 32, 8, seed=0, vocab_size=500)
    assert load != synthetic(64, 32, 8, seed=1, vocab_size=500)


def test_a_longer_load_begins_as_the_shorter() -> None:
    short = synthetic(4, 8, 1, seed=3, vocab_size=100)
    assert synthetic(9, 8, 1, seed=3, vocab_size=100)[:4] == short


def test_words_where_ids_cannot_be_sent() -> None:
    (request,) = synthetic(1, 20, 8, seed=0, vocab_size=None)
    assert isinstance(request.prompt, str)
    assert len(request.prompt.split()) == 20 and set(request.prompt.split()) <= set(WORDS)
