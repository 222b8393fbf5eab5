"""What was measured of kernels is found again, and only where it holds."""

from pathlib import Path

from infopt.core.hardware.kernel_choices import (
    KernelChoices,
    choices_file,
    load_choices,
    store_choices,
)

MADE = KernelChoices(
    device="a CPU", dtype="bfloat16", threads=2, versions="1", chosen={"dense 4x4": "torch"}
)


def test_choices_are_found_again(tmp_path: Path) -> None:
    file = store_choices(MADE, cache=tmp_path)
    assert file == choices_file("a CPU", "bfloat16", 2, cache=tmp_path)
    assert load_choices("a CPU", "bfloat16", 2, "1", cache=tmp_path) == MADE


def test_those_of_other_versions_or_threads_say_nothing(tmp_path: Path) -> None:
    store_choices(MADE, cache=tmp_path)
    for threads, versions in ((2, "2"), (1, "1")):
        found = load_choices("a CPU", "bfloat16", threads, versions, cache=tmp_path)
        assert found.chosen == {} and found.versions == versions and found.threads == threads


def test_a_damaged_file_says_nothing(tmp_path: Path) -> None:
    store_choices(MADE, cache=tmp_path).write_text("{")
    assert load_choices("a CPU", "bfloat16", 2, "1", cache=tmp_path).chosen == {}
