"""A short run of fuzz.py: garbage is graded or refused, and never raises anything else."""
from fuzz import LATEX, by_math, fuzz_completions, fuzz_files


def test_any_completion_is_graded_quickly():
    assert fuzz_completions(2000, seed=2)[0] < 0.05
    assert fuzz_completions(200, by_math, tuple(LATEX), seed=3)[0] < 1  # ended after 0.6 s


def test_any_file_is_loaded_or_refused():
    counts = fuzz_files(300, seed=2)
    assert sum(counts.values()) == 300
    assert min(counts["data", "loaded"], counts["data", "refused"], counts["config", "loaded"],
               counts["config", "refused"], counts["weights", "refused"]) > 0
