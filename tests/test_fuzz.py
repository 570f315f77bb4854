"""A short run of fuzz.py: garbage is graded or refused, and never raises anything else."""
from fuzz import LATEX, MODEL_FILES, by_math, fuzz_completions, fuzz_files


def test_any_completion_is_graded_quickly():
    assert fuzz_completions(2000, seed=2)[0] < 0.05
    assert fuzz_completions(200, by_math, tuple(LATEX), seed=3)[0] < 0.05


def test_any_file_is_loaded_or_refused():
    counts = fuzz_files(600, seed=2)
    assert sum(counts.values()) == 600
    for name in ("place/data.jsonl", "run/config.json", "step_1/checksums.json",
                 *(f"model/{file}" for file in MODEL_FILES)):
        assert counts.get(f"{name} refused"), name
    for name in ("place/data.jsonl", "run/config.json", "model/config.json"):
        assert counts.get(f"{name} loaded"), name
