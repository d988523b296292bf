from pathlib import Path

from zeroflow.training import job


def test_compiled_code_is_kept_with_the_cache_unless_the_user_says_where(monkeypatch):
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "mine")
    environment = job._environment(Path("cache/compile"))
    assert environment["TRITON_CACHE_DIR"] == str(Path("cache/compile/triton"))
    assert environment["TORCHINDUCTOR_CACHE_DIR"] == "mine"
    assert "TRITON_CACHE_DIR" not in job._environment(None)
