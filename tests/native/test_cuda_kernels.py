"""Runs the CUDA kernels on the CPU against a reference; README.md describes the method and its limits."""

import harness
import mutants
import pytest

pytestmark = pytest.mark.skipif(harness.missing() is not None, reason=str(harness.missing()))


@pytest.mark.slow  # compiles the kernels and their tests for a minute
def test_kernels_agree_with_the_reference_in_every_order_of_threads():
    done = harness.run(harness.build("plain"), "plain")
    assert done.returncode == 0, done.stdout
    assert "OK" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["label off by one", "label out of range let in"])
def test_a_planted_bug_is_found(name):
    """The tests still detect planted bugs; `run.py mutants` tries all of them."""
    mutant = next(m for m in mutants.MUTANTS if m.name == name)
    assert mutants.verdict(mutant, "plain") is not None


def test_every_planted_bug_still_fits_the_sources(tmp_path):
    for i, mutant in enumerate(mutants.MUTANTS):
        mutants.plant(mutant, tmp_path / str(i))


def test_a_planted_bug_matches_code_and_no_comment(tmp_path):
    comment = "every warp has written its value"
    assert comment in (harness.ROOT / "csrc" / mutants.TEAM).read_text()
    with pytest.raises(ValueError, match="holds 0 times"):
        mutants.plant(mutants.Mutant("in a comment", mutants.TEAM, comment, ""), tmp_path)
    assert mutants.without_comments('f("a // b", \'"\');  // c\ng();\n') == 'f("a // b", \'"\');\ng();\n'
